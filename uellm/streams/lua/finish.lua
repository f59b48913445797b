-- Ends requests that no replica holds: refused, expired or given up by their scheduler.
-- ARGV: owner token, retention in s, the same of those that were refused and whose client is being
--   told by a gateway, then per request: id, generation, state, Finished, CompletionEvent
--   or '' of one that is refused, Promise of one that is refused or '', reason for the dead-letter stream or ''
-- Returns {'stale'} or {'ok', 1 or 0 (it had moved on) per request}.
if not owns(ARGV[1]) then
  return { 'stale' }
end
local ended = {}
for i = 4, #ARGV, 7 do
  local id, generation, state, promise, reason = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 5],
    ARGV[i + 6]
  local r = read_standing(id)
  if ended_as(r, generation, state) then
    -- The same call again, after its reply was lost.
    ended[#ended + 1] = 1
  elseif not r or r.generation ~= generation or TERMINAL[r.state] then
    ended[#ended + 1] = 0
  else
    local retention = ARGV[2]
    if promise ~= '' then
      redis.call('HSET', record_key(id), 'promise', promise)
      push_event(r.subs, id, 0, PROMISE, promise)
      if r.subs and r.subs ~= '' then
        retention = ARGV[3]
      end
    end
    finish(id, r, state, ARGV[i + 3], ARGV[i + 4], retention)
    if reason ~= '' then
      redis.call('XADD', P .. 'dead', 'MAXLEN', '~', '10000', '*', 'id', id, 'tenant', r.tenant,
        'reason', reason)
    end
    ended[#ended + 1] = 1
  end
end
flush_frames()
return { 'ok', ended }
