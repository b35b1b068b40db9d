-- Move an entry that nobody can read off a stream, keeping its bytes among the dead letters.
-- Such an entry came from no script of ours, so it is counted apart from the conservation law; of
-- its fields the first 1,000 are kept (unpack has a limit).
-- KEYS 1 stream  2 dead  3 ledger  4 fence   ARGV 1 consumer group  2 entry  3 why
-- Returns 1, or 0 if it is gone.
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
local found = redis.call('XRANGE', KEYS[1], ARGV[2], ARGV[2])
if #found == 1 then
  redis.call('XADD', KEYS[2], '*', 'why', 'garbage', 'e', ARGV[3], 'from', KEYS[1], unpack(found[1][2], 1, math.min(#found[1][2], 2000)))
  redis.pcall('HINCRBY', KEYS[3], 'garbage', 1)
  cut(KEYS[4], KEYS[2], KEYS[3])
end
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
redis.call('XDEL', KEYS[1], ARGV[2])
return #found
