-- Records promises and tells the gateways that wait for them.
-- ARGV: owner token, then per promise: id, serialised Promise
-- Returns {'stale'} or {'ok', recorded}.
if not owns(ARGV[1]) then
  return { 'stale' }
end
local recorded = 0
for i = 2, #ARGV, 2 do
  local id, promise = ARGV[i], ARGV[i + 1]
  local r = record(id, 'state', 'subs')
  if r.state and not TERMINAL[r.state] then
    redis.call('HSET', record_key(id), 'promise', promise)
    push_event(r.subs, id, 0, PROMISE, promise)
    recorded = recorded + 1
  end
end
flush_frames()
return { 'ok', recorded }
