-- Keeps what a model's owner says for others to read: its load, its door, what it learnt.
-- ARGV: owner token, name of the key behind the prefix, value, for how many ms (0: for ever)
-- Returns {'stale'} or {'ok'}.
if not owns(ARGV[1]) then
  return { 'stale' }
end
if tonumber(ARGV[4]) > 0 then
  redis.call('SET', P .. ARGV[2], ARGV[3], 'PX', ARGV[4])
else
  redis.call('SET', P .. ARGV[2], ARGV[3])
end
return { 'ok' }
