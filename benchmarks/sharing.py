"""How well several models share a cluster as their load shifts, how fast, and what moves.

    python -m benchmarks.sharing [--json] [--seeds N] [--cluster mixed12]

Three models begin with a copy each. Their loads are drawn so that together they need about what the
cluster does, then drawn again. ``share_out`` follows, from what serves; beside it a fresh plan by
priority (``solve_shared``), and the copies of the first load left as they are. All are modelled, by
the costs that plans are made with: the share of its load that each model is served (the least and
the mean of them), layers that have to be loaded after the shift, and the time to decide.
"""

import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from benchmarks.arguments import count, one_of, parser_of
from benchmarks.clusters import model
from uellm import clusters
from uellm.placement.sharing import Copy, Step, Tenant, capacity, share_out
from uellm.placement.solver import solve, solve_shared
from uellm.placement.views import Plan, PlannedStage, PlanRequest, Workload

MODELS = ("llama-2-7b", "llama-3-8b", "llama-2-13b")
LOAD = Workload(slots=8, max_tokens=2048, prompt_tokens=512, output_tokens=128)
_QUICK_SECONDS = 1.0


@dataclass(frozen=True)
class Row:
    """One way to follow a shift of load; means over seeds.

    Attributes:
        cluster: its name.
        way: what decides.
        least: share of its load that the least served model is served.
        mean: of all models.
        loaded_layers: by devices that did not hold them.
        seconds: of computing to decide, median.
    """

    cluster: str
    way: str
    least: float
    mean: float
    loaded_layers: float
    seconds: float


def main() -> None:
    """Measure what is asked for."""
    parser = parser_of("sharing", __doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seeds", type=count, default=5)
    parser.add_argument(
        "--cluster",
        type=one_of(clusters.names()),
        action="append",
        help="by default mixed12, mixed24, dc64",
    )
    options = parser.parse_args()
    rows = []
    for name in options.cluster or ("mixed12", "mixed24", "dc64"):
        rows += _cluster(name, options.seeds)
        if not options.json:
            for row in rows[-3:]:
                print(
                    f"{row.cluster:8} {row.way:12} least {row.least:4.0%} mean {row.mean:4.0%}; "
                    f"{row.loaded_layers:5.0f} layers loaded; {row.seconds:.2f} s",
                    flush=True,
                )
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))


def _cluster(name: str, seeds: int) -> list[Row]:
    measured: dict[str, list[tuple[float, float, int, float]]] = {}
    for seed in range(seeds):
        rng = random.Random(seed)
        tenants = _follow(_loaded(_first_copies(name), rng))
        shifted = _loaded(tenants, rng)
        began = time.process_time()
        followed = _follow(shifted)
        seconds = time.process_time() - began
        measured.setdefault("share_out", []).append((*_served(followed, shifted), seconds))
        began = time.process_time()
        fresh = _fresh(shifted)
        seconds = time.process_time() - began
        measured.setdefault("by priority", []).append((*_served(fresh, shifted), seconds))
        measured.setdefault("as they are", []).append((*_served(shifted, shifted), 0.0))
    return [
        Row(
            cluster=name,
            way=way,
            least=statistics.fmean(found[0] for found in each),
            mean=statistics.fmean(found[1] for found in each),
            loaded_layers=statistics.fmean(found[2] for found in each),
            seconds=statistics.median(found[3] for found in each),
        )
        for way, each in measured.items()
    ]


def _first_copies(name: str) -> list[Tenant]:
    """A copy of each model, on devices that no other one uses."""
    topology = clusters.cluster(name)
    asked = [
        PlanRequest(topology, model(each), LOAD, "goodput", budget_seconds=_QUICK_SECONDS)
        for each in MODELS
    ]
    one = [replace(each, workload=replace(LOAD, requests_per_second=1e-6)) for each in asked]
    return [
        Tenant(name, request, (Copy(f"{name}-0", _alone(plan)),), needed=0.0)
        for name, request, plan in zip(MODELS, asked, solve_shared(one), strict=True)
    ]


def _alone(plan: Plan) -> Plan:
    return replace(plan, replicas=plan.replicas[:1])


def _loaded(tenants: Sequence[Tenant], rng: random.Random) -> list[Tenant]:
    """With loads that are together about what the cluster does."""
    shares = [rng.uniform(0.05, 1.0) for _ in tenants]
    loaded = []
    for tenant, share in zip(tenants, shares, strict=True):
        whole = solve(tenant.request)
        does = sum(r.prediction.tokens_per_second for r in whole.replicas if r.prediction)
        needed = share / sum(shares) * does / LOAD.output_tokens
        loaded.append(replace(tenant, needed=needed, lately=needed))
    return loaded


def _follow(tenants: Sequence[Tenant]) -> list[Tenant]:
    """After all that ``share_out`` changes."""
    steps = share_out(tenants)
    return [replace(each, copies=_copies(each, steps)) for each in tenants]


def _copies(tenant: Tenant, steps: Sequence[Step]) -> tuple[Copy, ...]:
    copies = list(tenant.copies)
    for step in (step for step in steps if step.tenant == tenant.name):
        if step.adds:
            copies.append(replace(step.copy, id=f"{tenant.name}-{len(copies)}"))
        else:
            copies = [copy for copy in copies if copy.placed is not step.copy.placed]
    return tuple(copies)


def _fresh(tenants: Sequence[Tenant]) -> list[Tenant]:
    """A new plan of the whole cluster, the model with the most load first."""
    order = sorted(tenants, key=lambda each: -each.needed)
    plans = solve_shared(
        [
            replace(each.request, workload=replace(LOAD, requests_per_second=each.needed))
            for each in order
        ]
    )
    found = {}
    for tenant, plan in zip(order, plans, strict=True):
        copies = tuple(
            Copy(f"{tenant.name}-{i}", replace(plan, replicas=(replica,)))
            for i, replica in enumerate(plan.replicas)
        )
        found[tenant.name] = replace(tenant, copies=copies)
    return [found[tenant.name] for tenant in tenants]


def _served(after: Sequence[Tenant], before: Sequence[Tenant]) -> tuple[float, float, int]:
    does = capacity(after)
    shares = [min(1.0, does[t.name] / t.needed) if t.needed else 1.0 for t in after]
    held = {
        (tenant.name, stage.device_id, layer)
        for tenant in before
        for stage in _stages(tenant)
        for layer in range(stage.first_layer, stage.last_layer + 1)
    }
    loaded = sum(
        (tenant.name, stage.device_id, layer) not in held
        for tenant in after
        for stage in _stages(tenant)
        for layer in range(stage.first_layer, stage.last_layer + 1)
    )
    return min(shares), statistics.fmean(shares), loaded


def _stages(tenant: Tenant) -> list[PlannedStage]:
    return [stage for copy in tenant.copies for stage in copy.placed.stages]


if __name__ == "__main__":
    main()
