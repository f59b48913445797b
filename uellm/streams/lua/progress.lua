-- How far requests are.
-- ARGV: ids
-- Returns, per id, {tokens logged, when the first of them was, in ms}; 0: none was.
local found = {}
for i = 1, #ARGV do
  local r = redis.call('HMGET', record_key(ARGV[i]), 'tokens', 'first_token_ms')
  found[i] = { tonumber(r[1]) or 0, tonumber(r[2]) or 0 }
end
return found
