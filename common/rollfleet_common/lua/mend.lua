-- Submit again, or close, the members of one group that are in no place any more. What waits to be
-- read, is leased, parked or delivered is left alone, so that a repeat changes nothing.
-- KEYS 1 fence  2 ledger  3 tombstones  4 group  5 prompts  6 delayed  7 parked  8 rollouts
-- ARGV 1 token  2 group  3 prompt body ('': not known, close what has no entry left)  4 task
--      5 position  6 first member to look at  7 how many, then pairs of index, entry: the rollouts that
--      the trainer holds, which count in place of what the group says
-- Returns {size of the group, state of each member looked at}: 0 left alone, 1 submitted again, 2
-- closed with a tombstone; 3 and 4 the same for one that was delivered and whose header is gone. {-2}
-- if the token is superseded.
local function number(raw, otherwise)
  if not raw then return otherwise end
  return #raw <= 16 and string.find(raw, '^%-?%d+$') and tonumber(raw) or nil
end
local fence = redis.call('HMGET', KEYS[1], 'token', 'epoch', 'version')
if fence[1] ~= ARGV[1] then return {-2} end
-- A record that somebody else wrote may claim anything: as in cancel.
local n = math.min(number(redis.call('HGET', KEYS[4], 'n'), 0) or 0, 100000)
local kind = redis.call('HGET', KEYS[4], 'kind')
if kind ~= 'train' and kind ~= 'eval' then return {0} end
local function numbers(id)
  local ms, seq = string.match(id, '^(%d+)-(%d+)$')
  return tonumber(ms), tonumber(seq)
end
-- The last entry that any worker was given; without a group, everything waits to be read.
local last_ms, last_seq = 0, 0
local groups = redis.pcall('XINFO', 'GROUPS', KEYS[5])
if not groups.err then
  for _, row in ipairs(groups) do
    local g = {}
    for i = 1, #row, 2 do g[row[i]] = row[i + 1] end
    if g.name == 'workers' then last_ms, last_seq = numbers(g['last-delivered-id']) end
  end
end
local function pending(stream, group, entry)
  local held = redis.pcall('XPENDING', stream, group, entry, entry, 1)
  return not held.err and #held > 0
end
local function submit(i, fields)
  if not fields then
    fields = {'g', ARGV[2], 'i', i, 'a', 1, 'k', kind, 'n', n, 'v', fence[2] .. ':' .. fence[3], 'd', ARGV[3]}
  end
  local entry = redis.call('XADD', KEYS[5], '*', unpack(fields))
  redis.call('HSET', KEYS[4], i, 'p' .. entry)
end
local function close(i)
  redis.call('XADD', KEYS[3], '*', 'g', ARGV[2], 'i', i, 'n', n, 'k', kind, 't', ARGV[4], 'p', ARGV[5],
    'r', 'vanished', 'e', 'it was in no place any more, and this trainer does not know its prompt')
  redis.call('HSET', KEYS[4], i, 'x')
  redis.call('HINCRBY', KEYS[2], 'dropped:vanished', 1)
  redis.call('HINCRBY', KEYS[2], 'settled:' .. kind, 1)
end
local holds = {}
for at = 8, #ARGV, 2 do holds[ARGV[at]] = ARGV[at + 1] end
local states = {}
local first = tonumber(ARGV[6])
for i = first, math.min(first + ARGV[7], n) - 1 do
  local at = i - first + 1
  local where = redis.call('HGET', KEYS[4], i) or ''
  local state, entry = string.sub(where, 1, 1), string.sub(where, 2)
  local done = 0
  if state == 'r' then entry = holds[tostring(i)] or entry end
  if state == 'p' and not pending(KEYS[5], 'workers', entry) then
    local found = redis.call('XRANGE', KEYS[5], entry, entry)[1]
    local ms, seq = numbers(entry)
    if not found then
      done = 1
    elseif ms < last_ms or ms == last_ms and seq <= last_seq then
      submit(i, found[2])
      redis.call('XDEL', KEYS[5], entry)
      states[at] = 1
    end
  elseif state == 'd' then
    local member = ARGV[2] .. ':' .. i
    if not redis.call('ZSCORE', KEYS[6], member) or redis.call('HEXISTS', KEYS[7], member) == 0 then
      done = 1
    end
  elseif state == 'r' and not pending(KEYS[8], 'trainer', entry)
      and #redis.call('XRANGE', KEYS[8], entry, entry) == 0 then
    done = 3
  end
  if done > 0 then
    if ARGV[3] ~= '' then submit(i) else close(i) done = done + 1 end
    if state == 'd' then
      redis.call('ZREM', KEYS[6], ARGV[2] .. ':' .. i)
      redis.call('HDEL', KEYS[7], ARGV[2] .. ':' .. i)
    end
  end
  states[at] = states[at] or done
end
table.insert(states, 1, n)
return states
