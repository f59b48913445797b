"""What an engine can hold and how fast it is."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from uellm.core.cost import StepCost
from uellm.core.errors import InvalidArgumentError


@dataclass(frozen=True, slots=True)
class Platform:
    """One replica's engine.

    Attributes:
        name: what it is called.
        cost: what its steps take.
        kv_tokens: room of the KV cache, in whole blocks.
        slots: most sequences that run at once.
        chunk_tokens: most tokens that one step computes.
        block_tokens: room is given in blocks of so many tokens.
    """

    name: str
    cost: StepCost
    kv_tokens: int
    slots: int
    chunk_tokens: int
    block_tokens: int = 1

    def whole_blocks(self, tokens: int) -> int:
        """Tokens rounded up to whole blocks."""
        return -(-tokens // self.block_tokens) * self.block_tokens

    @property
    def seconds_per_prompt_token(self) -> float:
        """Pace of prefill in the largest chunks."""
        return self.cost.seconds(self.chunk_tokens) / self.chunk_tokens


# Attention of prefill: 4 operations per layer, hidden element and pair, at the rate of the tokens.
PLATFORMS: Mapping[str, Platform] = {
    platform.name: platform
    for platform in (
        # A100 with 40 GB, Llama 3 8B.
        Platform("a100", StepCost(0.0015, 0.010, 0.093e-3, 0.082e-6, 3e-9), 130_000, 256, 2048),
        # RTX 3090, Llama 2 7B: multi-head attention, short of KV room.
        Platform("r3090", StepCost(0.002, 0.018, 0.4e-3, 0.7e-6, 15e-9), 12_000, 64, 1024),
        # Four cores, a model of 0.5B.
        Platform("cpu", StepCost(0.002, 0.040, 5e-3, 0.5e-6, 0.4e-6), 8_000, 32, 128),
    )
}
_SECONDS = ("overhead", "weights", "per_token", "per_context", "per_pair")
_COUNTS = ("kv_tokens", "slots", "chunk_tokens", "block_tokens")


def find_platform(name: str) -> Platform:
    """A platform by name, or from a TOML file.

    The file gives seconds ``overhead``, ``weights``, ``per_token`` and, if known, ``per_context``
    and ``per_pair``, and counts ``kv_tokens``, ``slots``, ``chunk_tokens`` and, if it is not 1,
    ``block_tokens``.

    Raises:
        InvalidArgumentError: if there is none, or it makes no sense.
    """
    if name in PLATFORMS:
        return PLATFORMS[name]
    path = Path(name)
    if not path.is_file():
        raise InvalidArgumentError(
            f"platform: {name!r} is neither one of {', '.join(PLATFORMS)} nor a file",
            field="platform",
        )
    try:
        facts = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"platform: {name}: {error}", field="platform") from error
    return platform_from(path.stem, facts)


def platform_from(name: str, facts: Mapping[str, object]) -> Platform:
    """A platform from the facts of a file.

    Raises:
        InvalidArgumentError: if one is missing, unknown or out of range.
    """
    unknown = facts.keys() - {*_SECONDS, *_COUNTS}
    if unknown:
        raise _wrong(name, min(unknown), f"not known; known: {', '.join((*_SECONDS, *_COUNTS))}")
    seconds = {key: _number(name, key, facts) for key in _SECONDS if key in facts}
    for key in _SECONDS[:3]:
        if key not in seconds:
            raise _wrong(name, key, "missing: seconds, 0 or more")
    counts = {}
    for key in _COUNTS:
        value = facts.get(key, 1 if key == "block_tokens" else None)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise _wrong(name, key, f"{value!r}: a whole number, at least 1")
        counts[key] = value
    cost = StepCost(**seconds)
    if cost.unloaded <= 0:
        raise _wrong(name, "overhead", "a step of one token takes no time")
    if counts["slots"] > counts["chunk_tokens"]:
        raise _wrong(name, "chunk_tokens", "less than slots: every sequence computes a token")
    if counts["kv_tokens"] % counts["block_tokens"]:
        raise _wrong(name, "kv_tokens", f"not whole blocks of {counts['block_tokens']} tokens")
    return Platform(name, cost, **counts)


def _number(name: str, key: str, facts: Mapping[str, object]) -> float:
    value = facts[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(name, key, f"{value!r}: seconds, 0 or more")
    if not (isfinite(value) and value >= 0):
        raise _wrong(name, key, f"{value!r}: seconds, 0 or more")
    return float(value)


def _wrong(name: str, key: str, problem: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"platform {name}: {key}: {problem}", field=key)
