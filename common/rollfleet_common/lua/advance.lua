#!lua flags=allow-oom
-- Tell one partition the trainer's version and the oldest version that is still useful.
-- It may lag behind the board: here it only saves work, the sweep at hand-over guarantees.
-- KEYS 1 fence   ARGV 1 token  2 version  3 min_useful
-- Returns 1, or 0 if the token is superseded.
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'version', ARGV[2], 'min_useful', ARGV[3])
return 1
