-- Put whole groups on the prompts stream: all samples of a group or none, each submission id once.
-- Fed prompts (position >= 0) come in order, so the fence's cursor knows all of them; others are
-- known by the marks, of which the youngest 100,000 are kept.
-- KEYS 1 fence  2 ledger  3 marks  4 routes; per group: prompts, group
-- ARGV 1 token  2 limit on outstanding training samples (-1: none), then per group:
--      submission id, position, group, n, kind, route, body, deadline_ms
-- Returns {state of each group: 1 submitted, 0 known already, -1 full; ..., outstanding}, or {-2}
-- if the token is superseded.
local function number(raw, otherwise)
  if not raw then return otherwise end
  return #raw <= 16 and string.find(raw, '^%-?%d+$') and tonumber(raw) or nil
end
local fence = redis.call('HMGET', KEYS[1], 'token', 'epoch', 'version')
if fence[1] ~= ARGV[1] then return {-2} end
-- What the policy is at now: a worker that has not heard of it yet learns it from the prompt.
local since = (fence[2] or '') .. ':' .. (fence[3] or '')
local limit = tonumber(ARGV[2])
local now = redis.call('TIME')[1]
local counts = redis.call('HMGET', KEYS[2], 'submitted:train', 'settled:train')
local submitted, settled = number(counts[1], 0), number(counts[2], 0)
local cursor = number(redis.call('HGET', KEYS[1], 'cursor'), -1)
if not submitted then return redis.error_reply('BADSTATE submitted:train of ' .. KEYS[2]) end
if not settled then return redis.error_reply('BADSTATE settled:train of ' .. KEYS[2]) end
if not cursor then return redis.error_reply('BADSTATE cursor of ' .. KEYS[1]) end
local outstanding = submitted - settled
-- Once one group does not fit, none after it may: a small group must not overtake a large one, and
-- a fed one that overtook it would move the cursor past it.
local full = false
local states = {}
local key, arg = 5, 3
while arg <= #ARGV do
  local id, group, n, kind, route = ARGV[arg], ARGV[arg + 2], tonumber(ARGV[arg + 3]), ARGV[arg + 4], ARGV[arg + 5]
  local position = tonumber(ARGV[arg + 1])
  local state = 1
  if position >= 0 and position <= cursor
      or position < 0 and redis.call('ZSCORE', KEYS[3], id) then
    state = 0
  elseif full or kind == 'train' and limit >= 0 and outstanding + n > limit then
    full = true
    state = -1
  else
    local record = {'HSET', KEYS[key + 1], 'n', n, 'kind', kind, 'route', route, 'deadline', ARGV[arg + 7]}
    for i = 0, n - 1 do
      local entry = redis.call('XADD', KEYS[key], '*', 'g', group, 'i', i, 'a', 1, 'k', kind, 'n', n, 'v', since,
        'd', ARGV[arg + 6])
      record[#record + 1] = i
      record[#record + 1] = 'p' .. entry
      if #record > 2000 then  -- unpack has a limit
        redis.call(unpack(record))
        record = {'HSET', KEYS[key + 1], 'n', n}
      end
    end
    redis.call(unpack(record))
    if position >= 0 then
      redis.call('HSET', KEYS[1], 'cursor', position)
      cursor = position
    else
      redis.call('ZADD', KEYS[3], now, id)
      redis.call('ZREMRANGEBYRANK', KEYS[3], 0, -100001)
    end
    redis.call('SADD', KEYS[4], route)
    redis.call('HINCRBY', KEYS[2], 'submitted:' .. kind, n)
    if kind == 'train' then outstanding = outstanding + n end
  end
  states[#states + 1] = state
  key, arg = key + 2, arg + 8
end
states[#states + 1] = outstanding
return states
