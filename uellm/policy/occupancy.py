"""What the sequences of an engine take of its KV room, and who gives way when it runs out."""

from collections.abc import Callable, Iterable

from uellm.policy.views import EngineView, SequenceView


def held_tokens(sequence: SequenceView, block_tokens: int = 1) -> int:
    """KV room of all that is known of a sequence and the token that comes next, in whole blocks.

    A sequence that is still prefilling is counted with all of its prompt.
    """
    known = max(sequence.prompt_tokens, sequence.computed_tokens) + 1
    return -(-known // block_tokens) * block_tokens


def held_by(sequences: Iterable[SequenceView], block_tokens: int = 1) -> int:
    """The same of several sequences."""
    return sum(held_tokens(sequence, block_tokens) for sequence in sequences)


def free_tokens(engine: EngineView) -> int:
    """KV room that is neither reserved nor spoken for by prompts under way."""
    return min(
        engine.kv_tokens_free,
        engine.kv_tokens_total - held_by(engine.running, engine.block_tokens),
    )


def victims(
    engine: EngineView, first: Callable[[SequenceView], tuple[float, ...]]
) -> tuple[str, ...]:
    """Whom to preempt so that everyone else has room for the next token.

    Args:
        engine: as it is.
        first: the least of it goes first.

    Returns:
        Nobody if there is room; never everybody.
    """
    missing = held_by(engine.running, engine.block_tokens) - engine.kv_tokens_total
    if missing <= 0:
        return ()
    chosen = []
    for sequence in sorted(engine.running, key=first)[: len(engine.running) - 1]:
        chosen.append(sequence.request_id)
        missing -= held_tokens(sequence, engine.block_tokens)
        if missing <= 0:
            break
    return tuple(chosen)
