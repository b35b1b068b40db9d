#!lua flags=allow-oom
-- Take the run for a trainer, or keep it: its lease is a key with a TTL.
-- KEYS 1 trainer  2 board  3 news
-- ARGV 1 token  2 lease in ms  3 who (for people)  4 take over: 1 or 0
--      5 version to resume at (-1: wherever the board is)  6 shape of the run (JSON)
--      7 an epoch that this one must be above  8 what the trainer speaks (JSON)
-- Returns {1, epoch, version} or {0, who holds it, ms left of its lease}. An epoch or a version that
-- is no number is an error: BADSTATE <field> of <key>.
-- News that cannot be added only wakes nobody: followers look by themselves within a second.
local function number(raw, otherwise)
  if not raw then return otherwise end
  return #raw <= 16 and string.find(raw, '^%-?%d+$') and tonumber(raw) or nil
end
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] and ARGV[4] ~= '1' then
  return {0, redis.call('HGET', KEYS[2], 'who') or '?', redis.call('PTTL', KEYS[1])}
end
local before = number(redis.call('HGET', KEYS[2], 'epoch'), 0)
if not before or math.abs(before) > 2^31 then return redis.error_reply('BADSTATE epoch of ' .. KEYS[2]) end
local at = number(redis.call('HGET', KEYS[2], 'version'), -1)
if not at or math.abs(at) > 2^31 then return redis.error_reply('BADSTATE version of ' .. KEYS[2]) end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
local now = redis.call('TIME')
local epoch = math.max(before, tonumber(ARGV[7])) + 1
redis.call('HSET', KEYS[2], 'epoch', epoch)
local version = tonumber(ARGV[5])
if version < 0 then version = math.max(at, 0) end
local rollbacks = redis.call('HGET', KEYS[2], 'rollbacks') or ''
rollbacks = rollbacks .. (rollbacks == '' and '' or ' ') .. epoch .. ':' .. version
redis.call('HSET', KEYS[2], 'token', ARGV[1], 'who', ARGV[3], 'version', version, 'shape', ARGV[6], 'rollbacks', rollbacks,
  -- A trainer of release 0.1.0 that comes later leaves this as it is, but raises the epoch.
  'schemas', ARGV[8], 'schemas_epoch', epoch, 'seen_ms', now[1] * 1000 + math.floor(now[2] / 1000))
redis.pcall('XADD', KEYS[3], 'MAXLEN', '64', '*', 'epoch', epoch, 'version', version)
return {1, epoch, version}
