-- Sends a batch to a replica: entries written, requests acknowledged, records moved, at once.
-- ARGV: owner token, replica, epoch, lease in ms, batch id, then per request: id, the generation
--   it is expected to have, serialised BatchEntry (which carries that generation plus one)
-- Returns {'stale'}, {'unrouted'} or {'ok', 1 or 0 per request}.
if not owns(ARGV[1]) then
  return { 'stale' }
end
local replica, epoch, lease, batch = ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]
local routing = redis.call('HMGET', P .. 'replica:' .. replica, 'epoch', 'state')
if routing[1] ~= epoch or routing[2] ~= 'READY' then
  return { 'unrouted' }
end
local now = now_ms()
local moved = {}
for i = 6, #ARGV, 3 do
  local id, generation = ARGV[i], ARGV[i + 1]
  local r = record(id, 'state', 'generation', 'queue_entry', 'tokens', 'cost', 'replica', 'epoch')
  local after = tonumber(generation) + 1
  if r.state == 'QUEUED' and r.generation == generation then
    local entry_id = redis.call('XADD', P .. 'batches:' .. replica, '*', 'type', 'batch',
      'id', id, 'epoch', epoch, 'payload', ARGV[i + 2])
    leave_queue(r)
    local key = record_key(id)
    redis.call('HSET', key, 'state', 'LEASED', 'generation', after, 'replica', replica,
      'epoch', epoch, 'queue_entry', '', 'batch_entry', entry_id, 'progress', r.tokens,
      'dispatched_ms', now)
    redis.call('HSETNX', key, 'batch', batch)
    redis.call('HINCRBY', key, 'attempts', 1)
    redis.call('HINCRBY', P .. 'load', 'queued_tokens', -tonumber(r.cost))
    redis.call('ZADD', P .. 'leases', now + lease, id)
    moved[#moved + 1] = 1
  elseif HELD[r.state] and tonumber(r.generation) == after and r.replica == replica
    and r.epoch == epoch then
    -- The same call again, after its reply was lost.
    moved[#moved + 1] = 1
  else
    moved[#moved + 1] = 0
  end
end
return { 'ok', moved }
