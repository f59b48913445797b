-- Ends a request at its caller's wish, whoever holds it; its holder finds itself fenced.
-- ARGV: id, tenant, Finished, CompletionEvent, retention in s
-- Returns {state after the call} or {'unknown'}.
local id = ARGV[1]
local r = read_standing(id)
if not r or r.tenant ~= ARGV[2] then
  return { 'unknown' }
end
if TERMINAL[r.state] then
  return { r.state }
end
finish(id, r, 'CANCELLED', ARGV[3], ARGV[4], ARGV[5])
if HELD[r.state] and routed(r.replica, r.epoch) then
  -- Its leader would notice at its next append; this frees the slot at once.
  redis.call('XADD', P .. 'batches:' .. r.replica, '*', 'type', 'cancel', 'id', id,
    'epoch', r.epoch, 'generation', r.generation)
end
flush_frames()
return { 'CANCELLED' }
