#!lua flags=allow-oom
-- Renew the trainer's lease on the run.
-- KEYS 1 trainer  2 board   ARGV 1 token  2 lease in ms
-- Returns 1, or 0 if the token is superseded. A lease that merely ran out is taken again.
if redis.call('HGET', KEYS[2], 'token') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
local now = redis.call('TIME')
redis.call('HSET', KEYS[2], 'seen_ms', now[1] * 1000 + math.floor(now[2] / 1000))
return 1
