-- Ends a request that no replica holds: refused, expired or given up by its scheduler.
-- ARGV: owner token, id, generation, state, Finished, CompletionEvent, retention in s, reason for
--   the dead-letter stream or ''
-- Returns {'stale'}, {'lost'} or {'ok'}.
if not owns(ARGV[1]) then
  return { 'stale' }
end
local id = ARGV[2]
local r = read_standing(id)
if ended_as(r, ARGV[3], ARGV[4]) then
  -- The same call again, after its reply was lost.
  return { 'ok' }
end
if not r or r.generation ~= ARGV[3] or TERMINAL[r.state] then
  return { 'lost' }
end
finish(id, r, ARGV[4], ARGV[5], ARGV[6], ARGV[7])
if ARGV[8] ~= '' then
  redis.call('XADD', P .. 'dead', 'MAXLEN', '~', '10000', '*', 'id', id, 'tenant', r.tenant,
    'reason', ARGV[8])
end
flush_frames()
return { 'ok' }
