"""uellm: an LLM serving mesh with deadlines in, promises out."""

__version__ = "0.1.0"
