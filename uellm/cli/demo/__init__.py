"""`uellm demo`: the whole mesh on the shipped model, and what became of every promise."""

from uellm.cli.demo.show import show

__all__ = ["show"]
