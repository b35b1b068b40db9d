#!lua flags=allow-oom
-- The trainer's verdicts on rollouts. Every step is idempotent: an entry that is gone is skipped.
-- KEYS 1 fence  2 ledger  3 rollouts  4 tombstones  5 trained, then payloads and group records
-- ARGV 1 token  2 verb: train | commit | drop:<reason>  3 number of rollouts r  4 number of groups g
--      5 number of tombstones t, then r entries, r kinds, t tombstone entries
--      (KEYS 6 .. 5+r are the payloads, KEYS 6+r .. 5+r+g the group records that are now closed)
-- Returns how many rollouts changed state, or -2 if the token is superseded.
-- train:  trained on; the credit returns, the entry stays until commit.
-- commit: durable; entry, payload and group are freed.
-- drop:   freed, counted by reason; the credit returns if it had not.
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return -2 end
local verb, r, g, t = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local changed = 0
for i = 1, r do
  local entry, kind = ARGV[5 + i], ARGV[5 + r + i]
  if verb == 'train' then
    if #redis.call('XPENDING', KEYS[3], 'trainer', entry, entry, 1) == 1
        and redis.call('SADD', KEYS[5], entry) == 1 then
      redis.call('HINCRBY', KEYS[2], 'settled:' .. kind, 1)
      changed = changed + 1
    end
  elseif redis.call('XACK', KEYS[3], 'trainer', entry) == 1 then
    redis.call('XDEL', KEYS[3], entry)
    redis.call('UNLINK', KEYS[5 + i])
    if redis.call('SREM', KEYS[5], entry) == 0 then
      redis.call('HINCRBY', KEYS[2], 'settled:' .. kind, 1)
    end
    redis.call('HINCRBY', KEYS[2], verb == 'commit' and 'committed' or 'dropped:' .. string.sub(verb, 6), 1)
    changed = changed + 1
  end
end
for i = 6 + r, 5 + r + g do redis.call('UNLINK', KEYS[i]) end
for i = 6 + 2 * r, 5 + 2 * r + t do
  redis.call('XACK', KEYS[4], 'trainer', ARGV[i])
  redis.call('XDEL', KEYS[4], ARGV[i])
end
return changed
