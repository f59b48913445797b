"""Whether the engine's answers are those of the whole model: for users, and for the tests."""
