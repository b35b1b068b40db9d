#!lua flags=allow-oom
-- Open one partition for a trainer: from now on only its token may steer here.
-- KEYS 1 fence  2 rollouts  3 tombstones
-- ARGV 1 token  2 epoch  3 version  4 min_useful  5 dead letters to keep at most  6 ms to keep them
--      (0: no bound)
-- Returns {1, cursor: position of the last fed prompt (-1: none)}, or {0} if a younger epoch has
-- opened it already.
local held = tonumber(redis.call('HGET', KEYS[1], 'epoch') or '-1')
if held > tonumber(ARGV[2]) then return {0} end
redis.call('HSET', KEYS[1], 'token', ARGV[1], 'epoch', ARGV[2], 'version', ARGV[3], 'min_useful', ARGV[4],
  'dead_max', ARGV[5], 'dead_age_ms', ARGV[6])
for i = 2, 3 do
  local made = redis.pcall('XGROUP', 'CREATE', KEYS[i], 'trainer', '0', 'MKSTREAM')
  if type(made) == 'table' and made.err and not string.find(made.err, 'BUSYGROUP', 1, true) then
    return redis.error_reply(made.err)
  end
end
return {1, tonumber(redis.call('HGET', KEYS[1], 'cursor') or '-1')}
