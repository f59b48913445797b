"""The demonstration: a tiny model shipped with the project and the prompts it can answer."""
