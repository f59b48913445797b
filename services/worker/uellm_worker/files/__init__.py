"""The model files of a worker's host: found there, fetched from other workers, given to them."""
