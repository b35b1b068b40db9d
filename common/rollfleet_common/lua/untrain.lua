#!lua flags=allow-oom
-- A trainer resumed from before these rollouts were trained: they are owed to it again.
-- KEYS 1 fence  2 ledger  3 trained   ARGV 1 token, then pairs of entry, kind
-- Returns how many changed, or -2 if the token is superseded.
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return -2 end
local changed = 0
for i = 2, #ARGV, 2 do
  if redis.call('SREM', KEYS[3], ARGV[i]) == 1 then
    redis.call('HINCRBY', KEYS[2], 'settled:' .. ARGV[i + 1], -1)
    changed = changed + 1
  end
end
return changed
