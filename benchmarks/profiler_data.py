"""Prompts with the lengths of many models' answers, from a directory of public data.

Known are Stanford Alpaca's instructions as JSON lines (``alpaca*.jsonl``, with ``instruction``,
``input``, ``out_tokens`` and lengths of Vicuna's answers), and tables of lengths beside files of
prompts (``alpaca_eval_lengths*.csv`` and ``alpaca_eval_prompts*.jsonl``, the same for ``flask``).
Files may be compressed by gzip.
"""

import csv
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

from uellm.learning.examples import Example
from uellm.prediction.interface import SAMPLED

DAVINCI, VICUNA = "davinci-003", "vicuna-7b"
_VICUNA_COLUMN, _VICUNA_CAP = "vicuna7b_tokens_t0.0", 512


@dataclass(frozen=True)
class Data:
    """Examples by what they are of.

    Attributes:
        alpaca: instructions, answered by one or two models.
        alpaca_eval: prompts by models that answered all of them.
        flask: likewise.
    """

    alpaca: list[Example]
    alpaca_eval: dict[str, list[Example]]
    flask: dict[str, list[Example]]

    def of(self, model: str) -> list[Example]:
        """Alpaca's instructions as one model answered them."""
        return [example for example in self.alpaca if example.model == model]

    def part(self, *, held: bool) -> "Data":
        """A fifth of all prompts, or the rest; which is which depends on the prompt alone."""

        def some(examples: list[Example]) -> list[Example]:
            return [each for each in examples if (crc32(each.prompt.encode()) % 5 == 0) == held]

        return replace(self, alpaca=some(self.alpaca))


def read_data(directory: Path) -> Data:
    """What a directory, or its subdirectory ``prompts``, holds.

    Raises:
        SystemExit: if that is nothing.
    """
    if (directory / "prompts").is_dir():
        directory = directory / "prompts"
    alpaca = [
        example
        for path in sorted(directory.glob("alpaca*.jsonl*"))
        if not path.name.startswith("alpaca_eval")
        for row in _lines(path)
        for example in _alpaca(row)
    ]
    tables = {name: _table(directory, name) for name in ("alpaca_eval", "flask")}
    if not alpaca and not any(tables.values()):
        raise SystemExit(f"--data {directory}: no alpaca*.jsonl, alpaca_eval_* or flask_*")
    return Data(alpaca, **tables)


def _open(path: Path) -> Any:
    return gzip.open(path, "rt") if path.suffix == ".gz" else path.open()


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with _open(path) as lines:
        for line in lines:
            yield json.loads(line)


def _alpaca(row: dict[str, Any]) -> Iterator[Example]:
    prompt = row["instruction"] + (f"\n{row['input']}" if row.get("input") else "")
    if row.get("out_tokens"):
        yield Example(prompt, row["out_tokens"], row["prompt_tokens"], DAVINCI, SAMPLED)
    length = row.get(_VICUNA_COLUMN)
    if length:
        cut = length >= _VICUNA_CAP
        yield Example(prompt, int(length), row["prompt_tokens"], VICUNA, censored=cut)


def _table(directory: Path, name: str) -> dict[str, list[Example]]:
    """Examples by model, from a table with a row, or a column, for each."""
    prompts = {
        int(row["id"]): (row.get("instruction") or row.get("text") or "", row["prompt_tokens"])
        for path in sorted(directory.glob(f"{name}_prompts*.jsonl*"))
        for row in _lines(path)
    }
    found: dict[str, list[Example]] = {}
    for path in sorted(directory.glob(f"{name}_lengths*.csv*")):
        with _open(path) as file:
            head, *rows = list(csv.reader(file))
        for model, prompt_id, cell in _cells(head, rows):
            if cell and float(cell) > 0 and prompt_id in prompts:
                text, tokens = prompts[prompt_id]
                example = Example(text, int(float(cell)), tokens, model)
                found.setdefault(model, []).append(example)
    return found


def _cells(head: list[str], rows: list[list[str]]) -> Iterator[tuple[str, int, str]]:
    for row in rows:
        for column, cell in zip(head[1:], row[1:], strict=True):
            if head[0] == "model":
                yield row[0], int(column.removeprefix("p")), cell
            else:
                yield column, int(row[0]), cell
