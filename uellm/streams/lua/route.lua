-- Points the route of a replica to an epoch. Older epochs are refused, so that a deployer that
-- lost touch cannot undo a newer one's work.
-- ARGV: replica, epoch, state, ReplicaReport to start from or ''
-- Returns 1, or 0 if a newer epoch is routed.
local key, batches = P .. 'replica:' .. ARGV[1], P .. 'batches:' .. ARGV[1]
local current = tonumber(redis.call('HGET', key, 'epoch') or 0)
local epoch = tonumber(ARGV[2])
if epoch < current then
  return 0
end
if epoch > current then
  -- Whoever was told to drop something is gone, read or unread; `reap` sees to the requests.
  for _, entry in ipairs(redis.call('XRANGE', batches, '-', '+')) do
    if entry[2][2] == 'cancel' then
      redis.call('XACK', batches, 'leader', entry[1])
      redis.call('XDEL', batches, entry[1])
    end
  end
  -- Every epoch's leader reads under a name of its own.
  for _, consumer in ipairs(consumers_of(batches, 'leader')) do
    if consumer.pending == 0 and consumer.name ~= ARGV[2] then
      redis.call('XGROUP', 'DELCONSUMER', batches, 'leader', consumer.name)
    end
  end
end
redis.call('HSET', key, 'epoch', ARGV[2], 'state', ARGV[3])
if ARGV[4] ~= '' then
  redis.call('HSET', key, 'report', ARGV[4], 'reported_ms', now_ms())
end
-- Wakes the scheduler, which reads this stream for finished work.
redis.call('XADD', P .. 'completions', 'MAXLEN', '~', '20000', '*', 'route', ARGV[1])
return 1
