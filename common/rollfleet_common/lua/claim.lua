#!lua flags=allow-oom
-- Take the trainer's lease on a run and shut its last trainer out, before anything else is decided:
-- epoch, version and shape stay as they are until `seize`.
-- KEYS 1 trainer  2 board
-- ARGV 1 token  2 lease in ms  3 who (for people)  4 take over: 1 or 0
-- Returns {1, number of the last committed batch} or {0, who holds it, ms left of its lease}.
-- Repeating it renews the lease.
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] and ARGV[4] ~= '1' then
  return {0, redis.call('HGET', KEYS[2], 'who') or '?', redis.call('PTTL', KEYS[1])}
end
redis.call('HSET', KEYS[2], 'token', ARGV[1], 'who', ARGV[3])
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return {1, tonumber(redis.call('HGET', KEYS[2], 'last_committed') or '0')}
