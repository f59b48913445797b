"""How a model is cut for a check: unevenly, since even cuts hide faults."""

from itertools import accumulate, pairwise

from uellm.core.errors import ConfigurationError


def uneven_split(layers: int, stages: int) -> tuple[int, ...]:
    """Layers of each stage: more with every stage, as far as there are enough.

    Raises:
        ConfigurationError: if there are more stages than layers.
    """
    if not 1 <= stages <= layers:
        raise ConfigurationError(
            f"{stages} shards of a model of {layers} layers; choose 1 to {layers}", field="shards"
        )
    weights = range(1, stages + 1)
    spare = layers - stages
    ends = [spare * total // sum(weights) for total in accumulate(weights)]
    return tuple(1 + end - start for start, end in pairwise([0, *ends]))
