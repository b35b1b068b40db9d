-- Give leases back untouched: the same attempt goes on the stream anew, which wakes a blocked
-- reader at once (claiming with an idle time does not).
-- KEYS 1 prompts stream   ARGV 1 consumer  2 prefix of group records, 3.. entries
-- Returns how many were given back.
-- A stream or group that is gone (Redis was flushed) holds no leases.
local function holder(stream, entry)
  local held = redis.pcall('XPENDING', stream, 'workers', entry, entry, 1)
  if held.err and not string.find(held.err, 'NOGROUP', 1, true) then error(held.err) end
  return not held.err and held[1] and held[1][2]
end
local back = 0
for i = 3, #ARGV do
  if holder(KEYS[1], ARGV[i]) == ARGV[1] then
    local found = redis.call('XRANGE', KEYS[1], ARGV[i], ARGV[i])
    if #found == 1 then
      local fields = found[1][2]
      local entry = redis.call('XADD', KEYS[1], '*', unpack(fields))
      local f = {}
      for j = 1, #fields, 2 do f[fields[j]] = fields[j + 1] end
      if f.g and f.i and redis.call('EXISTS', ARGV[2] .. f.g) == 1 then
        redis.call('HSET', ARGV[2] .. f.g, f.i, 'p' .. entry)
      end
      back = back + 1
    end
    redis.call('XACK', KEYS[1], 'workers', ARGV[i])
    redis.call('XDEL', KEYS[1], ARGV[i])
  end
end
return back
