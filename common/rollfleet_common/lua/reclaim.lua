-- Take over leases that were not renewed: their worker is dead, frozen, or lost a reply.
-- XPENDING IDLE scans the whole list, unlike XAUTOCLAIM, which gives up after 10 x COUNT entries
-- and so never reaches the dead ones of a busy fleet.
-- A prompt whose last delivery but one is behind it is a suspect: it may be what kills workers, or
-- it was just beside that. Suspects are taken few at a time, so that the next death tells them apart.
-- KEYS 1 prompts   ARGV 1 consumer  2 lease in ms  3 at most
--      4 deliveries that make a suspect  5 deliveries that end it  6 suspects to take, at most
-- Returns {suspects passed over, {entry, deliveries, fields, owner before} of each}.
local taken, passed = {}, 0
local most, suspects = tonumber(ARGV[3]), tonumber(ARGV[6])
local from, page, looked = '-', most + 500, 0
-- Page by page, so that suspects which are passed over do not hide those behind them; within a bound,
-- so that one call stays short.
while #taken < most and looked < 10000 do
  local idle = redis.call('XPENDING', KEYS[1], 'workers', 'IDLE', ARGV[2], from, '+', page)
  for _, row in ipairs(idle) do
    if #taken >= most then break end
    local suspect = row[4] >= tonumber(ARGV[4]) and row[4] < tonumber(ARGV[5])
    if suspect and suspects <= 0 then
      passed = passed + 1
    else
      local claimed = redis.call('XCLAIM', KEYS[1], 'workers', ARGV[1], ARGV[2], row[1])
      if #claimed == 1 and claimed[1] and claimed[1][2] then
        taken[#taken + 1] = {row[1], row[4] + 1, claimed[1][2], row[2]}
        if suspect then suspects = suspects - 1 end
      end
    end
  end
  if #idle < page then break end
  from, looked = '(' .. idle[#idle][1], looked + #idle
end
table.insert(taken, 1, passed)  -- not unpack, which has a limit
return taken
