#!lua flags=allow-oom
-- Renew the leases of one worker, and tell it which are no longer its own (stolen or cancelled).
-- KEYS 1 prompts   ARGV 1 consumer, 2.. entries (at most 1,000: unpack has a limit)
-- Returns the entries that are lost.
-- A stream or group that is gone (Redis was flushed) holds no leases.
local function holder(stream, entry)
  local held = redis.pcall('XPENDING', stream, 'workers', entry, entry, 1)
  if held.err and not string.find(held.err, 'NOGROUP', 1, true) then error(held.err) end
  return not held.err and held[1] and held[1][2]
end
local lost = {}
for i = 2, #ARGV do
  if holder(KEYS[1], ARGV[i]) == ARGV[1] then
    redis.call('XCLAIM', KEYS[1], 'workers', ARGV[1], 0, ARGV[i], 'JUSTID')
  else
    lost[#lost + 1] = ARGV[i]
  end
end
return lost
