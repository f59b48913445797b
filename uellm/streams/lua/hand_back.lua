-- Returns requests that a replica holds to the scheduler, with what they have so far.
-- ARGV: replica, epoch, then per request: id, generation
-- Returns {'stale'} or {'ok', 1 or 0 per request}.
if not routed(ARGV[1], ARGV[2]) then
  return { 'stale' }
end
local returned = {}
for i = 3, #ARGV, 2 do
  local id, generation = ARGV[i], ARGV[i + 1]
  local r = read_standing(id)
  local back = 0
  if r and r.generation == generation and HELD[r.state] then
    requeue(id, r)
    back = 1
  elseif r and r.state == 'QUEUED' and tonumber(r.generation) == tonumber(generation) + 1 then
    -- The same call again, after its reply was lost.
    back = 1
  end
  returned[#returned + 1] = back
end
return { 'ok', returned }
