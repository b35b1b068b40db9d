-- Give leases back untouched: the same attempt goes on the stream anew, which wakes a blocked
-- reader at once (claiming with an idle time does not).
-- KEYS 1 prompts; per entry: group   ARGV 1 consumer, 2.. entries
-- Returns per entry: 1 given back, 0 gone (no lease of ours), -1 the entry is of another group than its
-- key says: nothing was done, the lease stays ours.
-- A stream or group that is gone (Redis was flushed) holds no leases.
local function holder(stream, entry)
  local held = redis.pcall('XPENDING', stream, 'workers', entry, entry, 1)
  if held.err and not string.find(held.err, 'NOGROUP', 1, true) then error(held.err) end
  return not held.err and held[1] and held[1][2]
end
local states = {}
for i = 2, #ARGV do
  local state = 0
  if holder(KEYS[1], ARGV[i]) == ARGV[1] then
    local found = redis.call('XRANGE', KEYS[1], ARGV[i], ARGV[i])
    local fields, f = found[1] and found[1][2] or {}, {}
    for j = 1, #fields, 2 do f[fields[j]] = fields[j + 1] end
    -- The record is named by the caller, who has read the entry, and checked here.
    local named = ':group:' .. (f.g or '')
    if #fields > 0 and (not f.g or string.sub(KEYS[i], -#named) ~= named) then
      state = -1
    else
      if #fields > 0 then
        local entry = redis.call('XADD', KEYS[1], '*', unpack(fields))
        if f.i and redis.call('EXISTS', KEYS[i]) == 1 then redis.call('HSET', KEYS[i], f.i, 'p' .. entry) end
        state = 1
      end
      redis.call('XACK', KEYS[1], 'workers', ARGV[i])
      redis.call('XDEL', KEYS[1], ARGV[i])
    end
  end
  states[i - 1] = state
end
return states
