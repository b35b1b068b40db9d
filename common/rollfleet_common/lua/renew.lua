#!lua flags=allow-oom
-- Renew the leases of one worker, and tell it which are no longer its own (stolen or cancelled).
-- KEYS 1 prompts stream   ARGV 1 consumer, 2.. entries (at most 1,000: unpack has a limit)
-- Returns the entries that are lost.
local lost = {}
for i = 2, #ARGV do
  local held = redis.call('XPENDING', KEYS[1], 'workers', ARGV[i], ARGV[i], 1)
  if #held == 1 and held[1][2] == ARGV[1] then
    redis.call('XCLAIM', KEYS[1], 'workers', ARGV[1], 0, ARGV[i], 'JUSTID')
  else
    lost[#lost + 1] = ARGV[i]
  end
end
return lost
