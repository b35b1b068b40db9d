-- Put delayed prompts whose time has come back on the stream. What was parked and cannot be read goes
-- there too, as it is: the worker that claims it sees to it like to any prompt that it cannot read.
-- KEYS 1 prompts  2 delayed  3 parked; per member: group   ARGV 1.. members, as `due` named them
-- Returns {members taken off, ms until the next is due (-1: none waits)}. Each is looked at again: one
-- that a peer promoted, or that was delayed anew, is left alone; so is one whose key is not its group's.
local now = redis.call('TIME')
local ms = now[1] * 1000 + math.floor(now[2] / 1000)
local taken = 0
for i = 1, #ARGV do
  local member, group = ARGV[i], KEYS[3 + i]
  local name, index = string.match(member, '^(.*):(%d+)$')
  name, index = name or '', index or ''
  local named = ':group:' .. name
  local score = redis.call('ZSCORE', KEYS[2], member)
  if score and tonumber(score) <= ms and string.sub(group, -#named) == named then
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
      if #f < 7 or at <= #packed or f[1] ~= name then
        f = {name, index, '1', redis.call('HGET', group, 'kind') or '', redis.call('HGET', group, 'n') or '', packed, 'what was parked cannot be read'}
      end
      local entry = redis.call('XADD', KEYS[1], '*', 'g', f[1], 'i', f[2], 'a', f[3], 'k', f[4], 'n', f[5], 'd', f[6], 'e', f[7])
      if redis.call('EXISTS', group) == 1 then redis.call('HSET', group, f[2], 'p' .. entry) end
    end
    redis.call('ZREM', KEYS[2], member)
    redis.call('HDEL', KEYS[3], member)
    taken = taken + 1
  end
end
local next_due = redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')
if #next_due == 0 then return {taken, -1} end
return {taken, math.max(0, math.floor(math.min((tonumber(next_due[2]) or ms) - ms, 86400000)))}
