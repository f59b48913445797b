"""The deployer: who is there, which layers go where, and making it so."""
