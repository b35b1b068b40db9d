-- A lease ended without a rollout: park the prompt for its next attempt, bury it, or give it up.
-- What may be refused comes first; a counter that cannot be raised stops nothing, or every repeat would
-- bury the prompt once more.
-- KEYS 1 prompts  2 delayed  3 parked  4 dead  5 tombstones  6 ledger  7 group  8 fence
-- ARGV 1 consumer  2 entry  3 delay in ms (-1: no attempts left; -2: too stale)  4 record of this failure (one
--      line of JSON)  5 task  6 position  7 failure kind
-- Returns 1 parked, 2 ended, 0 gone, -1 stolen.
-- A stream or group that is gone (Redis was flushed) holds no leases.
local function holder(stream, entry)
  local held = redis.pcall('XPENDING', stream, 'workers', entry, entry, 1)
  if held.err and not string.find(held.err, 'NOGROUP', 1, true) then error(held.err) end
  return not held.err and held[1] and held[1][2]
end
-- Cut what is over the bounds that the trainer set, old letters first, and count it. Whole nodes of the
-- stream go, so that somewhat more than the cap may stay. Rights that lack XTRIM cut nothing.
local function cut(fence, dead, ledger)
  local bounds = redis.call('HMGET', fence, 'dead_max', 'dead_age_ms')
  local gone = 0
  local function trim(how, bound)
    local done = redis.pcall('XTRIM', dead, how, '~', bound)
    if type(done) == 'number' then gone = gone + done end
  end
  if (tonumber(bounds[1] or '0') or 0) > 0 then trim('MAXLEN', bounds[1]) end
  if (tonumber(bounds[2] or '0') or 0) > 0 then
    local now = redis.call('TIME')
    trim('MINID', string.format('%.0f', math.max(now[1] * 1000 + math.floor(now[2] / 1000) - bounds[2], 0)))
  end
  if gone > 0 then redis.pcall('HINCRBY', ledger, 'letters:cut', gone) end
end
local owner = holder(KEYS[1], ARGV[2])
if not owner then return 0 end
if owner ~= ARGV[1] then return -1 end
local found = redis.call('XRANGE', KEYS[1], ARGV[2], ARGV[2])
if #found == 0 then
  redis.call('XACK', KEYS[1], 'workers', ARGV[2])
  return 0
end
local f = {}
local fields = found[1][2]
for i = 1, #fields, 2 do f[fields[i]] = fields[i + 1] end
local history = (f.e and f.e .. '\n' or '') .. ARGV[4]
local where
if tonumber(ARGV[3]) >= 0 then
  local now = redis.call('TIME')
  local due = now[1] * 1000 + math.floor(now[2] / 1000) + ARGV[3]
  local member = f.g .. ':' .. f.i
  local packed = ''
  for _, v in ipairs({f.g, f.i, tostring(f.a + 1), f.k, f.n, f.d, history}) do packed = packed .. #v .. ':' .. v end
  redis.call('HSET', KEYS[3], member, packed)
  redis.call('ZADD', KEYS[2], due, member)
  redis.pcall('HINCRBY', KEYS[6], 'retried:' .. ARGV[7], 1)
  where = 'd'
else
  local why = ARGV[3] == '-2' and 'stale' or 'dead'
  if why == 'dead' then
    redis.call('XADD', KEYS[4], '*', 'g', f.g, 'i', f.i, 'a', f.a, 'k', f.k, 'n', f.n, 'd', f.d, 'e', history, 'why', ARGV[7])
    cut(KEYS[8], KEYS[4], KEYS[6])
  end
  redis.call('XADD', KEYS[5], '*', 'g', f.g, 'i', f.i, 'n', f.n, 'k', f.k, 't', ARGV[5], 'p', ARGV[6],
    'r', why, 'e', ARGV[4])
  if why == 'dead' then
    redis.pcall('HINCRBY', KEYS[6], 'dead', 1)
    redis.pcall('HINCRBY', KEYS[6], 'dead:' .. ARGV[7], 1)
  else
    redis.pcall('HINCRBY', KEYS[6], 'dropped:stale', 1)
  end
  redis.pcall('HINCRBY', KEYS[6], 'settled:' .. f.k, 1)
  where = 'x'
end
if redis.call('EXISTS', KEYS[7]) == 1 then redis.pcall('HSET', KEYS[7], f.i, where) end
redis.call('XACK', KEYS[1], 'workers', ARGV[2])
redis.call('XDEL', KEYS[1], ARGV[2])
return where == 'd' and 1 or 2
