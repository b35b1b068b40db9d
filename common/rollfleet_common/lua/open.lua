#!lua flags=allow-oom
-- Open one partition for a trainer: from now on only its token may steer here.
-- KEYS 1 fence  2 rollouts  3 tombstones
-- ARGV 1 token  2 epoch  3 version  4 min_useful  5 dead letters to keep at most  6 ms to keep them
--      (0: no bound)
-- Returns {1, cursor: position of the last fed prompt (-1: none)}, or {0} if a younger epoch has
-- opened it already. An epoch or a cursor that is no number is an error: BADSTATE <field> of <key>.
local function number(raw, otherwise)
  if not raw then return otherwise end
  return #raw <= 16 and string.find(raw, '^%-?%d+$') and tonumber(raw) or nil
end
local held = number(redis.call('HGET', KEYS[1], 'epoch'), -1)
if not held then return redis.error_reply('BADSTATE epoch of ' .. KEYS[1]) end
if held > tonumber(ARGV[2]) then return {0} end
local cursor = number(redis.call('HGET', KEYS[1], 'cursor'), -1)
if not cursor then return redis.error_reply('BADSTATE cursor of ' .. KEYS[1]) end
redis.call('HSET', KEYS[1], 'token', ARGV[1], 'epoch', ARGV[2], 'version', ARGV[3], 'min_useful', ARGV[4],
  'dead_max', ARGV[5], 'dead_age_ms', ARGV[6])
for i = 2, 3 do
  local made = redis.pcall('XGROUP', 'CREATE', KEYS[i], 'trainer', '0', 'MKSTREAM')
  if type(made) == 'table' and made.err and not string.find(made.err, 'BUSYGROUP', 1, true) then
    return redis.error_reply(made.err)
  end
end
return {1, cursor}
