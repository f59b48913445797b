-- Returns requests that a replica holds to the scheduler, with what they have so far.
-- ARGV: replica, epoch, then per request: id, generation
-- Returns {'stale'} or {'ok', 1 or 0 per request}.
if not routed(ARGV[1], ARGV[2]) then
  return { 'stale' }
end
local returned = {}
for i = 3, #ARGV, 2 do
  local r = read_standing(ARGV[i])
  if r and r.generation == ARGV[i + 1] and (r.state == 'LEASED' or r.state == 'RUNNING') then
    requeue(ARGV[i], r)
    returned[#returned + 1] = 1
  else
    returned[#returned + 1] = 0
  end
end
return { 'ok', returned }
