"""What the demo shows: answers as they stream, the table, the comparison, what to try next."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from uellm.cli.demo.burst import MODEL, Row
from uellm.cli.demo.calibration import Calibration

PROMPT_WIDTH = 27
REAL_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
POLICY_NAMES = {"cslo-odbs": "continuous SLO-ODBS", "fcfs": "first come, first served"}


class Streams:
    """Answers as they come: all of them on a terminal, else a line for each that ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rows: list[Row] = []
        self._live: Live | None = None

    def started(self, rows: list[Row]) -> None:
        """The burst was submitted."""
        self._rows = rows
        if self._console.is_terminal:
            self._live = Live(
                console=self._console,
                get_renderable=self._render,
                refresh_per_second=12,
                transient=True,
            )
            self._live.start()

    def changed(self, row: Row) -> None:
        """Something happened to a row."""
        if row.finished is not None and self._live is None:
            mark = "in time" if row.met else "LATE"
            seconds = row.finish_seconds or 0.0
            answer = _tail(row.text, 60)
            self._console.print(
                Text(f"{seconds:6.2f} s  {mark:8} {_short(row.prompt.prompt):28} {answer}"),
                soft_wrap=True,
            )

    def stop(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()

    def _render(self) -> Table:
        table = Table(box=None, pad_edge=False, show_header=False)
        width = max(self._console.width - PROMPT_WIDTH - 32, 10)
        for row in self._rows[: max(self._console.height - 2, 1)]:
            table.add_row(_short(row.prompt.prompt), _standing(row), Text(_tail(row.text, width)))
        return table


def _standing(row: Row) -> Text:
    if row.finish_seconds is not None:
        return Text(
            f"{'✓' if row.met else '✗'} {row.finish_seconds:.2f} s",
            style="green" if row.met else "red",
        )
    promised = row.promised("finish_p90")
    if promised is None:
        return Text("asking", style="dim")
    return Text(f"by {promised:.2f} s, needed {row.deadline_seconds:.2f}", style="yellow")


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= PROMPT_WIDTH else f"{prompt[: PROMPT_WIDTH - 1]}…"


def _tail(text: str, width: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else f"…{line[-width + 1 :]}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def explain_calibration(calibration: Calibration, slots: int) -> str:
    """What the deadlines on screen were made from."""
    return (
        f"measured {1 / calibration.seconds_per_token:.0f} tokens/s for each of {slots} answers at "
        f"once; the prompts' deadlines are scaled by {calibration.scale:.2f} to this machine: "
        "deadline order can keep them all"
    )


def results(rows: Sequence[Row], where: Mapping[str, str]) -> Table:
    """The table that closes the run. Times are seconds from acceptance."""
    table = Table(
        title="Predicted and actual; seconds from acceptance",
        title_justify="left",
        pad_edge=False,
        box=None,
        header_style="bold",
    )
    table.add_column("prompt", no_wrap=True, width=PROMPT_WIDTH)
    for name in ("tokens\np50", "\nactual", "\ndeadline", "finish\np50", "\np90", "\nactual"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("\nSLO", "\nbatch", "\nlayers"):
        table.add_column(name, no_wrap=True)
    for row in rows:
        promise, finished = row.first_promise, row.finished
        table.add_row(
            _short(row.prompt.prompt),
            str(promise.output_tokens_p50) if promise else "-",
            str(row.tokens),
            f"{row.deadline_seconds:.2f}",
            _seconds(row.promised("finish_p50")),
            _seconds(row.promised("finish_p90")),
            _seconds(row.finish_seconds),
            Text("met", style="green") if row.met else Text("missed", style="red"),
            finished.batch.rpartition("-")[2] if finished else "-",
            where.get(finished.replica, "-") if finished else "-",
        )
    return table


def summary(rows: Sequence[Row], *, promises: bool) -> str:
    """A burst in one line; with ``promises`` it says how many were kept."""
    checkable = [row for row in rows if row.prompt.checkable]
    right = sum(row.right for row in checkable)
    met = sum(row.met for row in rows)
    line = f"{right} of {len(checkable)} answers right, {met} of {len(rows)} deadlines met"
    if promises:
        kept = sum(row.promise_kept for row in rows)
        line += f", {kept} of {len(rows)} ready by the p90 promised at admission"
    return line


def measures(rows: Sequence[Row]) -> dict[str, float]:
    """What one policy made of the burst."""
    late = [row.late_seconds for row in rows]
    return {
        "slos_met": sum(row.met for row in rows),
        "requests": len(rows),
        "promises_kept": sum(row.promise_kept for row in rows),
        "mean_lateness_seconds": round(sum(late) / len(late), 3),
        "max_lateness_seconds": round(max(late), 3),
        "last_finish_seconds": round(max(row.finish_seconds or 0.0 for row in rows), 3),
    }


def comparison(policies: Mapping[str, Mapping[str, float]]) -> Table:
    """The same burst under each policy, as measured."""
    table = Table(
        title="The same burst under two policies, each really run",
        title_justify="left",
        pad_edge=False,
        box=None,
        header_style="bold",
    )
    table.add_column("")
    for policy in policies:
        table.add_column(POLICY_NAMES.get(policy, policy), justify="right")
    shown = policies.values()
    table.add_row("deadlines met", *(f"{m['slos_met']:.0f} of {m['requests']:.0f}" for m in shown))
    table.add_row("mean lateness", *(f"{m['mean_lateness_seconds']:.2f} s" for m in shown))
    table.add_row("greatest lateness", *(f"{m['max_lateness_seconds']:.2f} s" for m in shown))
    table.add_row("last answer after", *(f"{m['last_finish_seconds']:.2f} s" for m in shown))
    return table


def next_steps(uellm: str, worker: str, pid: int) -> str:
    """What to try while the mesh goes on serving; each line can be pasted.

    Args:
        uellm: how this program is called.
        worker: a worker's id.
        pid: its process.
    """
    long = f"{uellm} generate 'Repeat the word captain 60 times.' --model {MODEL}"
    return (
        "The mesh goes on serving until Ctrl-C. In another terminal:\n\n"
        "# a prompt with a deadline\n"
        f"{uellm} generate 'Count from 5 to 30.' --model {MODEL} --deadline 3s\n\n"
        f"# the loss of {worker} while an answer streams\n"
        f"{long} & sleep 1.5; kill -9 {pid}; wait\n\n"
        "# who is there, and where the layers are\n"
        f"{uellm} health\n\n"
        "# a real model (downloads 270 MB)\n"
        f"{uellm} up --model {REAL_MODEL} --allow-download --workers 2"
    )
