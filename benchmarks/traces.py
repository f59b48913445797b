"""Policies on arrivals and lengths of real services, in simulated time.

    python -m benchmarks.traces --data DIR [--platform a100] [--load 0.5,0.7,0.9] [--json]
    python -m benchmarks.traces --trace FILE.csv

Traces say nothing of objectives: requests are given, by chance, those of the three classes of the
simulator's workload ``tier``. A load is a share of what no policy exceeds at 99 % in time. Requests
that the platform's KV room cannot hold are left out. ``--convert FILE`` writes a trace so prepared
for ``uellm simulate --workload FILE``.
"""

import csv
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks.arguments import count, directory, known_to, parser_of, positive, several
from uellm.policy.views import DispatchSettings
from uellm.simulator.experiments import Cell, Setup, simulate
from uellm.simulator.mesh import MeshSettings
from uellm.simulator.platforms import Platform, find_platform
from uellm.simulator.predictors import PREDICTORS
from uellm.simulator.workloads import WORKLOADS

TRACES = {
    "azure-conv": "azure2023_conv_dev.csv",
    "azure-code": "azure2023_code_dev.csv",
    "mooncake": "mooncake_synthetic_trace.csv",
}
"""Files under ``traces/``."""
POLICIES = ("fcfs:knee_factor=2", "cslo-odbs")
COLUMNS = (
    "arrival_s",
    "prompt_tokens",
    "output_tokens",
    "deadline_s",
    "ttft_s",
    "tpot_s",
    "class",
)


def is_trace(name: str) -> bool:
    """Whether a workload is one of ``TRACES`` or a file."""
    return name in TRACES or name.endswith(".csv")


def source_of(name: str, data: Path | None) -> Path:
    """The file of a trace; ``data`` is needed for one of ``TRACES``."""
    if name not in TRACES:
        return Path(name)
    assert data is not None  # noqa: S101 - commands see to it
    return data / "traces" / TRACES[name]


def convert(source: Path, target: Path, platform: Platform, most: int, seed: int) -> None:
    """Write the first requests of a trace with objectives, as the simulator reads it.

    Args:
        source: with columns ``arrival_s``, ``prompt_tokens`` (or ``input_tokens``) and
            ``output_tokens``.
        target: to be written.
        platform: requests that its KV room cannot hold are left out.
        most: so many requests.
        seed: of the objectives.
    """
    kinds = WORKLOADS["tier"]
    rng = np.random.default_rng([seed, 3])
    shares = [kind.share for kind in kinds]
    with source.open(newline="") as old, target.open("w", newline="") as new:
        writer = csv.writer(new)
        writer.writerow(COLUMNS)
        written = 0
        for row in csv.DictReader(old):
            prompt, output = (
                int(row.get("prompt_tokens") or row["input_tokens"]),
                int(row["output_tokens"]),
            )
            kind = kinds[rng.choice(len(kinds), p=shares)]
            if written == most or not (prompt and output) or prompt + output > platform.kv_tokens:
                continue
            wanted = kind.objective(platform, prompt, output)
            times = (wanted.deadline, wanted.ttft, wanted.tpot)
            given = ("" if each is None else f"{each:.6f}" for each in times)
            writer.writerow([row["arrival_s"], prompt, output, *given, kind.name])
            written += 1


def compared(
    trace: Path, platform: Platform, loads: Sequence[float], predictor: str, most: int
) -> Iterator[dict[str, object]]:
    """What each policy makes of a trace at each load."""
    for policy in POLICIES:
        # Nothing keeps first come, first served's only engine short of requests.
        fcfs = policy.startswith("fcfs")
        dispatch = DispatchSettings(kv_headroom=100.0) if fcfs else DispatchSettings()
        mesh = MeshSettings(promises=False)
        setup = Setup(platform, str(trace), predictor, most, 1.0, mesh, dispatch)
        bound = setup.highest_load(0.99)
        for load in loads:
            metrics = simulate(setup, Cell(policy, load * bound, 0)).metrics
            yield {
                "load": load,
                "policy": policy.partition(":")[0],
                "in_time": metrics.attainment,
                **{f"{kind} p99 s": each.latency_p99 for kind, each in metrics.kinds.items()},
                **{f"{kind} ttft s": each.ttft_p99 for kind, each in metrics.kinds.items()},
                "max wait s": metrics.max_wait,
                "wasted": metrics.wasted,
                "met tokens/s": metrics.met_tokens_per_second,
            }


def main() -> None:
    """Compare, and print a table for each trace."""
    parser = parser_of("traces", __doc__)
    parser.add_argument(
        "--data", type=directory, help="directory with traces/, for those with a name"
    )
    parser.add_argument(
        "--trace", action="append", help=f"{', '.join(TRACES)} or a CSV; may be repeated; all"
    )
    parser.add_argument(
        "--platform",
        type=known_to(find_platform),
        default="a100",
        help="a100, r3090, cpu, or a TOML file",
    )
    parser.add_argument("--predictor", choices=PREDICTORS, default="b80", help="of lengths")
    parser.add_argument(
        "--load", type=several(positive), default="0.5,0.7,0.9", help="of what no policy exceeds"
    )
    parser.add_argument("--requests", type=count, default=3000, help="first of a trace")
    parser.add_argument("--seed", type=int, default=0, help="of the objectives")
    parser.add_argument("--convert", type=Path, help="write the only --trace to this CSV, and end")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    platform = find_platform(options.platform)
    names, most, seed = options.trace or list(TRACES), options.requests, options.seed
    for name in names:
        if not is_trace(name):
            parser.error(f"--trace: {name}: neither one of {', '.join(TRACES)} nor a .csv file")
        if name in TRACES and options.data is None:
            parser.error(f"--trace {name} needs --data")
    if options.convert and len(names) != 1:
        parser.error("--convert: name one --trace")
    found: dict[str, list[dict[str, object]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            target = options.convert or Path(folder) / f"{len(found)}.csv"
            convert(source_of(name, options.data), target, platform, most, seed)
            if options.convert:
                return
            found[name] = list(compared(target, platform, options.load, options.predictor, most))
    if options.json:
        print(json.dumps({"platform": asdict(platform), "traces": found}, indent=2))
        return
    for name, rows in found.items():
        print(f"\n{name}\n{'  '.join(f'{key:>17}' for key in rows[0])}")
        for row in rows:
            cells = (
                v if isinstance(v, str) else "-" if v is None else f"{v:.3g}" for v in row.values()
            )
            print("  ".join(f"{cell:>17}" for cell in cells))


if __name__ == "__main__":
    main()
