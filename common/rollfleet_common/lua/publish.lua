#!lua flags=allow-oom
-- Announce a version, a pause, or both, on the board; wake those who follow it.
-- KEYS 1 board  2 news   ARGV 1 token  then pairs of field, value
-- Returns 1, or 0 if the token is superseded.
-- News that cannot be added only wakes nobody: followers look by themselves within a second.
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], unpack(ARGV, 2))
redis.pcall('XADD', KEYS[2], 'MAXLEN', '64', '*', unpack(ARGV, 2))
return 1
