"""The profiler: predicts what requests will need, and learns from those that finished."""
