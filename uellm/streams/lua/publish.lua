-- Publishes a deployment.
-- KEYS[1]: the hash of deployments. ARGV: served name, Deployment
redis.call('HSET', P, ARGV[1], ARGV[2])
return 1
