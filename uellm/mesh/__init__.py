"""A whole mesh in one process tree: what `uellm up` and `uellm demo` run."""
