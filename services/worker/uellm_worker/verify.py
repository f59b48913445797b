"""Check that the engine answers as the whole model does: ``python -m uellm_worker.verify DIR``.

Prints one JSON object; `uellm verify` shows it. Exit status: 0 exact, 1 different, 2 unusable.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from uellm import demo
from uellm.core.errors import ConfigurationError, UellmError
from uellm.demo.prompts import demo_prompts
from uellm.models.profile import read_profile
from uellm.models.tokenizer import Tokenizer
from uellm_worker.engine.execution import EXECUTIONS
from uellm_worker.verification.splits import uneven_split

EXACT, DIFFERENT, UNUSABLE = range(3)
SLOTS = 4
PROMPTS = (
    "Why is the sky blue?",
    "The capital of France is",
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "def fibonacci(n):",
    "Translate into German: The weather is nice today, and we are going for a walk by the river.",
    "1, 2, 3, 5, 8,",
    "List five animals that live in the sea, and say one thing about each of them.",
    "Hello",
)


def read_prompts(directory: Path, file: Path | None) -> list[str]:
    """The prompts of a file, one a line; by default some that suit the model.

    Raises:
        ConfigurationError: if the file holds none, or cannot be read.
    """
    if file is None:
        if directory.resolve() == (Path(demo.__file__).parent / "model").resolve():
            return [task.prompt for task in demo_prompts()[::3]]
        return list(PROMPTS)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file} cannot be read: {error}", field="prompts") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ConfigurationError(f"{file} holds no prompt; write one a line", field="prompts")
    return prompts


def encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A prompt's tokens, as the gateway would make them."""
    if tokenizer.has_chat_template:
        text = tokenizer.render_chat([{"role": "user", "content": prompt}])
        return tokenizer.encode(text, special=False)
    return tokenizer.encode(prompt, special=True)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load, run and compare; what `uellm verify --json` prints.

    Raises:
        UellmError: if the model or the prompts cannot be used.
    """
    directory: Path = arguments.directory
    adapters = {name: Path(path) for name, _, path in (a.partition("=") for a in arguments.adapter)}
    tokenizer = Tokenizer(directory)
    prompts = [encode(tokenizer, text) for text in read_prompts(directory, arguments.prompts)]
    layers = len(read_profile(directory, arguments.dtype).layers)
    split = uneven_split(layers, arguments.shards or min(3, layers))
    # Loading takes seconds: what can be found wrong before it, is.
    import torch  # noqa: PLC0415

    from uellm_worker.engine.shard import DTYPES  # noqa: PLC0415
    from uellm_worker.verification.flips import count_flips  # noqa: PLC0415
    from uellm_worker.verification.pipeline import Pipeline  # noqa: PLC0415
    from uellm_worker.verification.reference import Reference  # noqa: PLC0415
    from uellm_worker.verification.report import verify  # noqa: PLC0415

    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    def pipeline(dtype: str) -> Pipeline:
        room = max(map(len, prompts)) + arguments.max_tokens
        return Pipeline(
            directory, split, slots=SLOTS, max_tokens=room, dtype=dtype, adapters=adapters
        )

    # The engine first: it says which tensor does not fit, and what to do.
    split_model = pipeline(arguments.dtype)
    reference = Reference.load(directory, DTYPES[arguments.dtype], adapters)
    result = verify(split_model, reference, prompts, arguments.max_tokens, arguments.execution)
    report = {"model": str(directory), "exact": result.exact, **asdict(result)}
    if arguments.flips:
        flips = count_flips(pipeline(arguments.flips), reference, prompts, arguments.max_tokens)
        report["flips"] = asdict(flips) | {"rate": flips.rate}
    return report


def main() -> int:
    """Read the arguments; returns the exit status."""
    parser = argparse.ArgumentParser(prog="uellm_worker.verify", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--adapter", action="append", default=[])
    parser.add_argument("--shards", type=int, default=0)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--execution", choices=EXECUTIONS, default=EXECUTIONS[0])
    parser.add_argument("--flips", default="")
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    try:
        result = run(arguments)
    except UellmError as error:
        sys.stdout.write(json.dumps({"error": error.message, "field": error.field}))
        return UNUSABLE
    sys.stdout.write(json.dumps(result))
    return EXACT if result["exact"] else DIFFERENT


if __name__ == "__main__":
    raise SystemExit(main())
