#!lua flags=allow-oom
-- Write down which weights inference servers hold; wake those who follow the board.
-- KEYS 1 board  2 weights  3 news   ARGV 1 token  then pairs of url, row; an empty row forgets one
-- Returns 1, or 0 if the token is superseded.
-- News that cannot be added only wakes nobody: followers look by themselves within a second.
if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return 0 end
for i = 2, #ARGV, 2 do
  if ARGV[i + 1] == '' then
    redis.call('HDEL', KEYS[2], ARGV[i])
  else
    redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1])
  end
end
redis.pcall('XADD', KEYS[3], 'MAXLEN', '64', '*', 'servers', (#ARGV - 1) / 2)
return 1
