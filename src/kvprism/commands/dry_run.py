"""`kvprism plan`: exact sizes from a model's shape, before any prompt exists."""

import math
import re
from pathlib import Path
from typing import Any

from kvprism.chunkwise import ChunkPlanner
from kvprism.commands import console
from kvprism.core import Budget, KVShape
from kvprism.errors import BadInput, BudgetTooSmall
from kvprism.integrations import hf
from kvprism.layout import row_nbytes
from kvprism.planning import PlanOptions, plan_shape, smallest_nbytes
from kvprism.plans import Plan
from kvprism.policies import POLICIES
from kvprism.profiles import Profile
from kvprism.staged import StagedPlan

_BITS_PER_S = {"kbps": 1e3, "mbps": 1e6, "gbps": 1e9}


def link_bytes_per_s(text: str) -> float:
    """A link's speed.

    Example:
        >>> link_bytes_per_s("10Gbps")
        1250000000.0

    Raises:
        BadInput: anything else than a positive number with its unit.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmg]bps)\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise BadInput(f"link {text!r} is not a speed such as 200Mbps or 10Gbps")
    return float(match[1]) * _BITS_PER_S[match[2].lower()] / 8


def plan_without_prompt(
    shape: KVShape,
    policy: str,
    budget: str | None,
    options: PlanOptions,
    profile: Profile | None = None,
) -> Plan:
    """The sizes of a plan, and every error that needs no prompt, before minutes of work.

    Raises:
        UnknownName: no such policy.
        BadInput: a malformed budget, or none where one is needed.
        BudgetTooSmall: nothing legal fits.
        ProfileMismatch: the policy needs a profile that is not given, or lacks what it needs.
    """
    planned = plan_shape(shape, policy, budget, options, profile)
    given = math.inf if budget is None else Budget.parse(budget, shape).nbytes
    if planned.nbytes > given:  # a fixed rate
        raise BudgetTooSmall(policy, planned.nbytes, int(given), shape.reference_nbytes)
    return planned


def plan_in_chunks(
    shape: KVShape,
    policy: str,
    budget: str | None,
    options: PlanOptions,
    profile: Profile | None,
    chunk: int,
) -> StagedPlan:
    """The same for a prompt that leaves in chunks of so many tokens; errors as `ChunkPlanner`."""
    planner = ChunkPlanner(shape, policy, budget, chunk=chunk, options=options, profile=profile)
    return planner.dry(chunk)


def dry_run(
    model: str,
    policy: str,
    budget: str | None,
    tokens: int,
    links: str,
    codec: str,
    profile: Path | None = None,
    chunk: int | None = None,
) -> dict[str, Any]:
    """Plan `tokens` tokens of `model` without running it; chunk: prefilled so many at a time.

    The order of tokens is unknown here, so that a real plan's tier map may take a few bytes more.
    """
    rates = {link.strip(): link_bytes_per_s(link) for link in links.split(",")}
    shape = hf.shape_of(hf.load_config(model), tokens)
    options = PlanOptions(codec=codec)
    shared = None if profile is None else Profile.load(profile)
    if chunk is None:
        planned = plan_without_prompt(shape, policy, budget, options, shared)
        smallest = smallest_nbytes(shape, policy, options, shared)
    else:
        planned = plan_in_chunks(shape, policy, budget, options, shared, chunk)
        smallest = plan_in_chunks(shape, policy, "floor", options, shared, chunk).nbytes
    tiers = _tiers(planned)
    return {
        "kind": "plan",
        "model": model,
        "policy": policy,
        "budget": budget,
        "budget_bytes": None if budget is None else Budget.parse(budget, shape).nbytes,
        "codec": codec,
        "chunk": chunk,
        "tokens": tokens,
        "layers": len(shape.layers),
        "reference_bytes": shape.reference_nbytes,
        "native_bytes": shape.native_nbytes,
        "wire_bytes": planned.nbytes,
        "fraction": planned.fraction,
        "fraction_native": planned.fraction_native,
        "tiers": tiers,
        "base_bytes": planned.base_nbytes if isinstance(planned, StagedPlan) else None,
        "overhead_bytes": planned.nbytes - sum(tier["payload_bytes"] for tier in tiers),
        "smallest_bytes": smallest,
        "smallest_fraction": smallest / shape.reference_nbytes,
        "fixed_rate": not POLICIES[policy].budgeted,
        "links": [
            {
                "link": link,
                "ms": 1000 * planned.nbytes / rate,
                "raw_ms": 1000 * shape.native_nbytes / rate,
            }
            for link, rate in rates.items()
        ],
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
    rows_per_token = sum(tier["rows"] for tier in result["tiers"]) / result["tokens"]

    def line(name: str, tokens: str, nbytes: int) -> list[str]:
        share = console.percent(nbytes / result["reference_bytes"])
        return [name, tokens, f"{nbytes:,}", console.size(nbytes), share]

    rows = [
        line(tier["tier"], f"{tier['rows'] / rows_per_token:.0f}", tier["payload_bytes"])
        for tier in result["tiers"]
    ]
    chunk = result["chunk"]
    twice = "" if chunk is None else ", rows sent twice"
    rows.append(line(f"maps, manifests, padding{twice}", "", result["overhead_bytes"]))
    if chunk is not None:
        rows.append(line(f"sent in chunks of {chunk}, before upgrades", "", result["base_bytes"]))
    rows.append(line("all wire bytes", str(result["tokens"]), result["wire_bytes"]))
    title = f"{result['policy']} on {result['model']}, {result['tokens']} tokens"
    console.table(title, ["tier", "tokens", "bytes", "", "of 16-bit"], rows)
    if not result["fixed_rate"]:
        _, _, *smallest = line("", "", result["smallest_bytes"])
        console.say(f"smallest feasible budget: {' = '.join(smallest)}\n")
    links = [
        [link["link"], f"{link['ms']:.2f}", f"{link['raw_ms']:.2f}"] for link in result["links"]
    ]
    columns = ["link", f"{result['policy']} ms", "uncompressed ms"]
    console.table("time on the link alone", columns, links)
