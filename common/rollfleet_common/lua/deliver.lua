-- Publish rollouts and take their prompts off, each if and only if the lease is still ours.
-- Lua does not roll back, so the order is: check, XADD, PERSIST, and only then XACK and XDEL. The XADD
-- may be refused (out of memory, a stream of no more ids): then the prompt stays pending, and the
-- payload keeps its TTL. What comes after it may not fail, or every repeat would add once more.
-- KEYS 1 fence  2 ledger  3 rollouts  4 tombstones  5 tap  6 tapped; per item: prompts, group, payload
-- ARGV 1 consumer, then per item:
--      entry, index, kind, epoch, min_version, header, group, n, task, position
-- Returns per item: 1 delivered, 0 gone (no lease: delivered before, or cancelled), -1 stolen,
-- -2 the payload is not there (the prompt stays ours), -3 too stale to be useful (closed).
-- A stream or group that is gone (Redis was flushed) holds no leases.
local function number(raw, otherwise)
  if not raw then return otherwise end
  return #raw <= 16 and string.find(raw, '^%-?%d+$') and tonumber(raw) or nil
end
local function holder(stream, entry)
  local held = redis.pcall('XPENDING', stream, 'workers', entry, entry, 1)
  if held.err and not string.find(held.err, 'NOGROUP', 1, true) then error(held.err) end
  return not held.err and held[1] and held[1][2]
end
local fence = redis.call('HMGET', KEYS[1], 'epoch', 'min_useful')
-- A fence that cannot be read refuses nothing: the trainer judges everything again.
local epoch, min_useful = fence[1], number(fence[2], -1) or -1
local states = {}
local key, arg = 7, 2
while arg <= #ARGV do
  local entry, index, kind = ARGV[arg], ARGV[arg + 1], ARGV[arg + 2]
  local owner = holder(KEYS[key], entry)
  local state
  if not owner then
    state = 0
  elseif owner ~= ARGV[1] then
    state = -1
  elseif kind == 'train' and ARGV[arg + 3] == epoch and tonumber(ARGV[arg + 4]) < min_useful then
    redis.call('XADD', KEYS[4], '*', 'g', ARGV[arg + 6], 'i', index, 'n', ARGV[arg + 7], 'k', kind,
      't', ARGV[arg + 8], 'p', ARGV[arg + 9], 'r', 'stale',
      'e', 'oldest trained token of version ' .. ARGV[arg + 4] .. ', useful from ' .. min_useful)
    local tap = number(redis.call('GET', KEYS[5]))
    if tap and tap > 0 and tap <= 86400000 then -- somebody records: as in settle
      redis.pcall('XADD', KEYS[6], 'MAXLEN', '50000', '*', 'v', 'drop:stale', 'h', ARGV[arg + 5])
      redis.call('PEXPIRE', KEYS[6], tap)
      redis.call('PEXPIRE', KEYS[key + 2], tap)
    else
      redis.call('UNLINK', KEYS[key + 2])
    end
    redis.pcall('HINCRBY', KEYS[2], 'dropped:stale', 1)
    redis.pcall('HINCRBY', KEYS[2], 'settled:train', 1)
    if redis.call('EXISTS', KEYS[key + 1]) == 1 then redis.pcall('HSET', KEYS[key + 1], index, 'x') end
    state = -3
  elseif redis.call('EXISTS', KEYS[key + 2]) == 0 then
    state = -2
  else
    local header = redis.call('XADD', KEYS[3], '*', 'h', ARGV[arg + 5], 'g', ARGV[arg + 6],
      'i', index, 'n', ARGV[arg + 7], 'k', kind, 'p', string.match(KEYS[key + 2], ':payload:(.*)$'))
    redis.call('PERSIST', KEYS[key + 2])
    if redis.call('EXISTS', KEYS[key + 1]) == 1 then redis.pcall('HSET', KEYS[key + 1], index, 'r' .. header) end
    redis.pcall('HINCRBY', KEYS[2], 'delivered', 1)
    state = 1
  end
  if state == 1 or state == -3 then
    redis.call('XACK', KEYS[key], 'workers', entry)
    redis.call('XDEL', KEYS[key], entry)
  end
  states[#states + 1] = state
  key, arg = key + 3, arg + 10
end
return states
