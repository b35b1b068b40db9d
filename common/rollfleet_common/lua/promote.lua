-- Put delayed prompts whose time has come back on the stream. What was parked and cannot be read goes
-- there too, as it is: the worker that claims it sees to it like to any prompt that it cannot read.
-- KEYS 1 prompts stream  2 delayed  3 parked   ARGV 1 at most  2 prefix of group records
-- Returns {promoted, ms until the next is due (-1: none waits)}.
local now = redis.call('TIME')
local ms = now[1] * 1000 + math.floor(now[2] / 1000)
local due = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', ms, 'LIMIT', 0, ARGV[1])
for _, member in ipairs(due) do
  local packed = redis.call('HGET', KEYS[3], member)
  if packed then
    local f, at = {}, 1
    while at <= #packed and #f < 7 do
      local colon = string.find(packed, ':', at, true)
      local digits = colon and string.match(string.sub(packed, at, colon - 1), '^%d+$')
      local size = digits and #digits < 10 and tonumber(digits)
      if not size or colon + size > #packed then break end
      f[#f + 1] = string.sub(packed, colon + 1, colon + size)
      at = colon + size + 1
    end
    if #f < 7 or at <= #packed then
      local name, index = string.match(member, '^(.*):(%d+)$')
      name, index = name or '', index or ''
      local group = ARGV[2] .. name
      f = {name, index, '1', redis.call('HGET', group, 'kind') or '', redis.call('HGET', group, 'n') or '', packed, 'what was parked cannot be read'}
    end
    local entry = redis.call('XADD', KEYS[1], '*', 'g', f[1], 'i', f[2], 'a', f[3], 'k', f[4], 'n', f[5], 'd', f[6], 'e', f[7])
    local group = ARGV[2] .. f[1]
    if redis.call('EXISTS', group) == 1 then redis.call('HSET', group, f[2], 'p' .. entry) end
  end
  redis.call('ZREM', KEYS[2], member)
  redis.call('HDEL', KEYS[3], member)
end
local next_due = redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')
if #next_due == 0 then return {#due, -1} end
return {#due, math.max(0, math.floor(math.min((tonumber(next_due[2]) or ms) - ms, 86400000)))}
