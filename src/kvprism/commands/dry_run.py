"""`kvprism plan`: exact sizes from a model's shape, before any prompt exists."""

import re
from typing import Any

from kvprism.commands import console
from kvprism.core import Budget
from kvprism.errors import BadInput
from kvprism.integrations import hf
from kvprism.layout import row_nbytes
from kvprism.plans import Plan
from kvprism.policies import POLICIES, PlanOptions, plan_shape, smallest_nbytes

_BITS_PER_S = {"kbps": 1e3, "mbps": 1e6, "gbps": 1e9}


def link_bytes_per_s(text: str) -> float:
    """`10Gbps` -> 1.25e9; `BadInput` for anything else."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmg]bps)\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise BadInput(f"link {text!r} is not a speed such as 200Mbps or 10Gbps")
    return float(match[1]) * _BITS_PER_S[match[2].lower()] / 8


def dry_run(
    model: str, policy: str, budget: str | None, tokens: int, link: str, codec: str
) -> dict[str, Any]:
    """Plan `tokens` tokens of `model` without running it.

    The order of tokens is unknown here, so the tier map may differ by a few bytes from a real plan's.
    """
    rate = link_bytes_per_s(link)
    shape = hf.shape_of(hf.load_config(model), tokens)
    options = PlanOptions(codec=codec)
    planned = plan_shape(shape, policy, budget, options)
    smallest = smallest_nbytes(shape, policy, options)
    return {
        "model": model,
        "policy": policy,
        "budget": budget,
        "budget_bytes": None if budget is None else Budget.parse(budget, shape).nbytes,
        "tokens": tokens,
        "layers": len(shape.layers),
        "reference_bytes": shape.reference_nbytes,
        "native_bytes": shape.native_nbytes,
        "wire_bytes": planned.nbytes,
        "fraction": planned.fraction,
        "fraction_native": planned.fraction_native,
        "tiers": _tiers(planned),
        "overhead_bytes": planned.nbytes - sum(t["payload_bytes"] for t in _tiers(planned)),
        "smallest_bytes": smallest,
        "smallest_fraction": smallest / shape.reference_nbytes,
        "fixed_rate": not POLICIES[policy].budgeted,
        "link": link,
        "link_ms": 1000 * planned.nbytes / rate,
        "raw_link_ms": 1000 * shape.native_nbytes / rate,
    }


def _tiers(planned: Plan) -> list[dict[str, Any]]:
    first = planned.shape.layers[0]
    channels = first.components[0].channels
    return [
        {
            "tier": tier.name,
            "rows": rows,
            "payload_bytes": rows * row_nbytes(tier, channels, first.itemsize),
        }
        for tier, rows in zip(planned.menu, planned.histogram().values(), strict=True)
    ]


def show_dry_run(result: dict[str, Any]) -> None:
    """Print a dry run."""
    rows_per_token = sum(t["rows"] for t in result["tiers"]) / result["tokens"]
    rows = [
        [
            tier["tier"],
            f"{tier['rows'] / rows_per_token:.0f}",
            console.size(tier["payload_bytes"]),
            console.percent(tier["payload_bytes"] / result["reference_bytes"]),
        ]
        for tier in result["tiers"]
    ]
    overhead = result["overhead_bytes"]
    share = console.percent(overhead / result["reference_bytes"])
    rows.append(["maps, manifests, padding", "", console.size(overhead), share])
    total = [str(result["tokens"]), console.size(result["wire_bytes"])]
    rows.append(["all wire bytes", *total, console.percent(result["fraction"])])
    title = f"{result['policy']} on {result['model']}, {result['tokens']} tokens"
    console.table(title, ["tier", "tokens", "bytes", "of 16-bit"], rows)
    kind = "fixed size" if result["fixed_rate"] else "smallest feasible budget"
    smallest = console.percent(result["smallest_fraction"])
    console.out.print(f"{kind}: {result['smallest_bytes']} bytes ({smallest})")
    console.out.print(
        f"on {result['link']}: {result['link_ms']:.2f} ms, raw {result['raw_link_ms']:.2f} ms"
    )
