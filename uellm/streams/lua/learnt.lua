-- Keeps what the profilers' learner made, if it still is the learner.
-- KEYS[1]: the profilers' prefix. ARGV: token, then per field: hash behind the prefix, field, value;
-- an empty value removes the field
-- Returns {'stale'} or {'ok'}.
if not owns(ARGV[1]) then
  return { 'stale' }
end
for i = 2, #ARGV, 3 do
  if ARGV[i + 2] == '' then
    redis.call('HDEL', P .. ARGV[i], ARGV[i + 1])
  else
    redis.call('HSET', P .. ARGV[i], ARGV[i + 1], ARGV[i + 2])
  end
end
return { 'ok' }
