#!lua flags=no-writes,allow-oom
-- Look at one route of a partition at one instant; also when Redis is full.
-- KEYS 1 prompts  2 delayed
-- Returns {XLEN, pending, oldest pending entry, oldest unread entry, ZCARD delayed, first due time,
--          {consumer, pending, ...}}; '' where there is none. No group: nobody ever read the route.
local length, pending, oldest, read, holders = redis.call('XLEN', KEYS[1]), 0, '', '0-0', {}
local groups = redis.pcall('XINFO', 'GROUPS', KEYS[1])
for _, row in ipairs(groups.err and {} or groups) do
  local g = {}
  for i = 1, #row, 2 do g[row[i]] = row[i + 1] end
  if g.name == 'workers' then
    read = g['last-delivered-id']
    local summary = redis.call('XPENDING', KEYS[1], 'workers')
    pending, oldest = summary[1], summary[2] or ''
    for _, holder in ipairs(summary[4] or {}) do
      holders[#holders + 1] = holder[1]
      holders[#holders + 1] = holder[2]
    end
  end
end
-- After the highest id that there is comes nothing, and Redis refuses to look.
local unread = redis.pcall('XRANGE', KEYS[1], '(' .. read, '+', 'COUNT', 1)
local first = not unread.err and unread[1] and unread[1][1] or ''
local due = redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')
return {length, pending, oldest, first, redis.call('ZCARD', KEYS[2]), due[2] or '', holders}
