-- Takes requests back from holders that are gone: their lease ran out, or their replica was
-- re-formed under a newer epoch.
-- ARGV: owner token, lease in ms, most ms between two calls, most strikes, most requests
-- Returns {'stale'}, {'grace'} or {'ok', requeued ids, {id, generation} of those given up}.
--
-- A strike is a start that ended without one new token: three of them, and the request itself is
-- suspected. Waiting in a replica that dies is no strike.
if not owns(ARGV[1]) then
  return { 'stale' }
end
local lease, most_gap, most_strikes, most = tonumber(ARGV[2]), tonumber(ARGV[3]),
  tonumber(ARGV[4]), tonumber(ARGV[5])
local now = now_ms()
local leases = P .. 'leases'
local last = tonumber(redis.call('HGET', P .. 'load', 'reaped_ms') or 0)
redis.call('HSET', P .. 'load', 'reaped_ms', now)
if now - last > most_gap or now < last then
  -- Nobody asked for a while, or the clock jumped: Redis was down, or no scheduler was there.
  -- Holders could not renew either; give every one of them a full lease.
  for _, id in ipairs(redis.call('ZRANGE', leases, 0, -1)) do
    redis.call('ZADD', leases, now + lease, id)
  end
  return { 'grace' }
end
local requeued, dead = {}, {}
local epochs = {}
for _, id in ipairs(redis.call('ZRANGE', leases, 0, -1)) do
  if #requeued + #dead >= most then
    break
  end
  local r = record(id, 'state', 'replica', 'epoch')
  if not r.state or TERMINAL[r.state] or r.state == 'QUEUED' then
    redis.call('ZREM', leases, id)
  else
    if epochs[r.replica] == nil then
      epochs[r.replica] = redis.call('HGET', P .. 'replica:' .. r.replica, 'epoch') or ''
    end
    if epochs[r.replica] ~= r.epoch or tonumber(redis.call('ZSCORE', leases, id)) <= now then
      r = read_standing(id)
      local progressed = tonumber(r.tokens) > tonumber(r.progress)
      if r.state == 'RUNNING' and not progressed then
        r.strikes = tonumber(r.strikes) + 1
      end
      if not progressed and tonumber(r.strikes) >= most_strikes then
        dead[#dead + 1] = { id, tonumber(r.generation) }
      else
        requeue(id, r)
        requeued[#requeued + 1] = id
      end
    end
  end
end
return { 'ok', requeued, dead }
