-- Build a stream anew that takes no more entries, because one was given the highest id there is.
-- Redis cannot lower a stream's last id below one that it ever held, so the others are copied, with
-- their ids, groups, consumers and leases. For an operator: it needs rights that no role has.
-- KEYS 1 stream  2 copy   ARGV 1 the highest id
-- Returns how many entries were kept, or -1 if the stream needs no mending.
local function pairs_of(row)
  local f = {}
  for i = 1, #row, 2 do f[row[i]] = row[i + 1] end
  return f
end
if redis.call('EXISTS', KEYS[1]) == 0 then return -1 end
if pairs_of(redis.call('XINFO', 'STREAM', KEYS[1]))['last-generated-id'] ~= ARGV[1] then return -1 end
redis.call('DEL', KEYS[2])
local kept, last, from = 0, '0-0', '-'
while true do
  local rows = redis.call('XRANGE', KEYS[1], from, '+', 'COUNT', 1000)
  for _, row in ipairs(rows) do
    if row[1] ~= ARGV[1] then
      redis.call('XADD', KEYS[2], row[1], unpack(row[2]))
      kept, last = kept + 1, row[1]
    end
  end
  if #rows < 1000 or rows[#rows][1] == ARGV[1] then break end
  from = '(' .. rows[#rows][1]
end
for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local g = pairs_of(group)
  local read = g['last-delivered-id']
  redis.call('XGROUP', 'CREATE', KEYS[2], g.name, read == ARGV[1] and last or read, 'MKSTREAM')
  for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], g.name)) do
    redis.call('XGROUP', 'CREATECONSUMER', KEYS[2], g.name, pairs_of(consumer).name)
  end
  from = '-'
  while true do
    local rows = redis.call('XPENDING', KEYS[1], g.name, from, '+', 1000)
    for _, row in ipairs(rows) do
      if row[1] ~= ARGV[1] then
        redis.call('XCLAIM', KEYS[2], g.name, row[2], 0, row[1], 'IDLE', row[3], 'RETRYCOUNT', row[4], 'FORCE', 'JUSTID')
      end
    end
    if #rows < 1000 or rows[#rows][1] == ARGV[1] then break end
    from = '(' .. rows[#rows][1]
  end
end
if redis.call('EXISTS', KEYS[2]) == 1 then redis.call('RENAME', KEYS[2], KEYS[1]) else redis.call('DEL', KEYS[1]) end
return kept
