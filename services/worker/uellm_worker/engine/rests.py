"""How long what is timed rests in between, as what serves does."""

REST_SECONDS = 0.004
"""Between two steps a stage waits about as long for the other stages. One that does not rest has
all it needs in its caches, where a stage that does has not; and whoever waits for it is awake."""
