#!lua flags=allow-oom
-- Register an inference server, change its row, or forget it, if the row is what the caller saw; wake
-- those who follow the board. Also when Redis is full: it steers.
-- KEYS 1 servers  2 news   ARGV 1 url  2 row that the caller saw ('': none)  3 new row ('': forget it)
-- Returns 1, or 0 if the row has changed meanwhile.
if (redis.call('HGET', KEYS[1], ARGV[1]) or '') ~= ARGV[2] then return 0 end
if ARGV[3] == '' then
  redis.call('HDEL', KEYS[1], ARGV[1])
else
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
end
redis.pcall('XADD', KEYS[2], 'MAXLEN', '64', '*', 'servers', 1)
return 1
