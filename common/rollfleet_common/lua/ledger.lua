#!lua flags=allow-oom
-- Read the books of one partition at one instant. Nothing here is derived from a sibling term:
-- places are counted in the structures that hold the prompts, totals in the counters of scripts.
-- KEYS 1 ledger  2 rollouts  3 tombstones  4 trained  5 dead  6 fence; per route: prompts, delayed
-- Returns {counters (flat), XLEN rollouts, XPENDING rollouts, XLEN tombstones, SCARD trained,
--          XLEN dead, fence (flat), XLEN prompts and XPENDING prompts and ZCARD delayed per route}.
local function pending(key, group)
  local summary = redis.pcall('XPENDING', key, group)
  if type(summary) ~= 'table' or summary.err then return 0 end
  return summary[1]
end
local out = {
  redis.call('HGETALL', KEYS[1]),
  redis.call('XLEN', KEYS[2]), pending(KEYS[2], 'trainer'),
  redis.call('XLEN', KEYS[3]), redis.call('SCARD', KEYS[4]), redis.call('XLEN', KEYS[5]),
  redis.call('HGETALL', KEYS[6]),
}
for i = 7, #KEYS, 2 do
  out[#out + 1] = redis.call('XLEN', KEYS[i])
  out[#out + 1] = pending(KEYS[i], 'workers')
  out[#out + 1] = redis.call('ZCARD', KEYS[i + 1])
end
return out
