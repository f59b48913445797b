"""The best static batch that a stress test of the step model finds.

Morphling (Wang et al., "Morphling: Fast, Near-Optimal Auto-Configuration for Cloud-Native Model
Serving") runs stress tests of configurations and keeps the best. Here the tests are computed.
"""

from dataclasses import dataclass

from uellm.core.cost import StepCost, chunk_pairs
from uellm.core.settings import Settings, setting
from uellm.policy.batching import Room


@dataclass(frozen=True)
class MorphlingSettings(Settings):
    """Settings of the stress test, and of what counts as best."""

    prompt_tokens: int = setting(128, "Prompt of a request of the stress test.", least=1)
    output_tokens: int = setting(512, "Answer of a request of the stress test.", least=1)
    most_requests: int = setting(256, "Most requests of a batch.", least=1)


def best_batch(room: Room, cost: StepCost, settings: MorphlingSettings) -> int:
    """The size of a batch, within the room, with the most tokens a second.

    Args:
        room: slots and KV room.
        cost: of a step.
        settings: of the requests that it is tried with.
    """
    longest = settings.prompt_tokens + settings.output_tokens
    most = min(max(room.slots, 1), settings.most_requests)
    if room.kv_tokens:
        most = min(most, int(room.kv_tokens // longest))
    return max(
        range(1, max(most, 1) + 1),
        key=lambda size: size / batch_seconds(size, cost, settings),
    )


def batch_seconds(size: int, cost: StepCost, settings: MorphlingSettings) -> float:
    """How long a batch of the stress test runs: one prefill, then a step for each token."""
    prompt, output = settings.prompt_tokens, settings.output_tokens
    prefill = cost.seconds(size * prompt, pairs=size * chunk_pairs(0, prompt))
    context = size * (prompt + output / 2)
    return prefill + (output - 1) * cost.seconds(size, context)
