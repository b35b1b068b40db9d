#!lua flags=allow-oom
-- Write or forget the plan of a batch: THE commit point; partitions are rolled forward from it.
-- KEYS 1 board  2 batches   ARGV 1 token  2 batch number  3 plan ('' forgets it)
--      4 whether the batch is committed by it: 1 or 0
-- Returns 1, or 0 if the token is superseded.
local function number(raw, otherwise)
  if not raw then return otherwise end
  return #raw <= 16 and string.find(raw, '^%-?%d+$') and tonumber(raw) or nil
end
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return 0 end
local last = number(redis.call('HGET', KEYS[1], 'last_batch'), 0)
if not last then return redis.error_reply('BADSTATE last_batch of ' .. KEYS[1]) end
if tonumber(ARGV[2]) > last then redis.call('HSET', KEYS[1], 'last_batch', ARGV[2]) end
local committed = tonumber(redis.call('HGET', KEYS[1], 'last_committed') or '0')
if ARGV[4] == '1' and tonumber(ARGV[2]) > committed then redis.call('HSET', KEYS[1], 'last_committed', ARGV[2]) end
if ARGV[3] == '' then redis.call('HDEL', KEYS[2], ARGV[2]) else redis.call('HSET', KEYS[2], ARGV[2], ARGV[3]) end
return 1
