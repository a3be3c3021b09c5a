"""Controls of a profile's routes: the same policies, or whole layers, in other places; inverse
routing; one policy everywhere. On generated tasks that neither calibration nor evaluation has.

python -m bench.controls MODEL --text FILE --profile PROFILE --json OUT: resumes from OUT.records.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvprism.allocate import placements, route
from kvprism.evaluate.layers import TEXT, CalibrationSet, Document, LayerLosses, Ledger, key_of
from kvprism.evaluate.measure import LoadedModel
from kvprism.evaluate.route_search import OURS, PAPER, PAPERS, RouteSearch, Variant
from kvprism.profiles import Profile
from kvprism.routes import Route

# Calibration has 0: its tasks are drawn from another seed.
SEED = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    for name in ("--text", "--profile", "--json"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--task", required=True, help="kinds, with commas between them")
    parser.add_argument("--tokens", type=int, help="the routes for this budget alone")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--calibrated", type=int, default=2048, help="calibration's context")
    parser.add_argument("--trials", type=int, default=4, help="tasks of each kind")
    parser.add_argument("--count", type=int, default=100, help="placements")
    given = parser.parse_args()
    subject, kinds = LoadedModel.load(given.model), given.task.split(",")
    profile = Profile.load(given.profile)
    profile.check(bytes.fromhex(subject.fingerprint))
    routes = [
        found
        for found in profile.routes
        if found.policy in (PAPERS, OURS) and given.tokens in (None, found.tokens)
    ]
    held_out = _losses(given, CalibrationSet(
        subject, given.text, given.context, 64, 2, given.trials, kinds, SEED), "")  # fmt: skip
    made = _losses(given, CalibrationSet(
        subject, given.text, given.calibrated, 64, 2, 2, kinds[:1]), ".signals")  # fmt: skip
    inverse = list(_inverse(made, routes))
    rows = [
        row
        for found in routes
        for row in _rows(held_out, found, [each for each in inverse if _same(each, found)], given)
    ]
    given.json.write_text(json.dumps(rows, indent=1) + "\n")


def _same(a: Route, b: Route) -> bool:
    return (a.policy, a.tokens) == (b.policy, b.tokens)


def _losses(given: Any, calibration: CalibrationSet, suffix: str) -> LayerLosses:
    records = given.json.with_suffix(f"{suffix}.records.jsonl")
    policies = dict.fromkeys(PAPER)
    policies |= dict.fromkeys(
        layer.policy for found in Profile.load(given.profile).routes for layer in found.layers
    )
    return LayerLosses(calibration, Ledger(calibration.header, records), list(policies))


def _inverse(losses: LayerLosses, routes: Sequence[Route]) -> Iterator[Route]:
    """Algorithm 1 with its ranking turned round, as its own text documents give it."""
    tokens = [found.tokens for found in routes if found.policy == "polykv"]
    search = RouteSearch(losses, tokens)
    search.measure_signals()
    for each in tokens:
        yield search.polykv(each, Variant(), inverse=True)


def _rows(
    losses: LayerLosses, found: Route, inverse: Sequence[Route], given: Any
) -> Iterator[dict[str, Any]]:
    arms = {
        "route": [found],
        "inverse": inverse,
        "policies in other layers": placements(found, given.count),
        "layers in other places": _shuffled(found, given.count),
        "one policy": [_everywhere(found, policy) for policy in _policies(found)],
    }
    documents = [d for d in losses.calibration.documents if d.group != TEXT]
    losses.measure(documents, [each.layers for routes in arms.values() for each in routes])
    for kind, routes in arms.items():
        for each in routes:
            yield _row(losses, documents, kind, each)


def _row(
    losses: LayerLosses, documents: Sequence[Document], kind: str, found: Route
) -> dict[str, Any]:
    outcomes = [losses.ledger.of(document)[key_of(found.layers)] for document in documents]
    header = losses.calibration.header
    return {
        "model": header.model,
        "policy": found.policy,
        "tokens": found.tokens,
        "kind": kind,
        "prefill": str(found),
        "context": losses.calibration.context,
        "n": len(outcomes),
        "exact_match": sum(o.right == o.answers for o in outcomes) / len(outcomes),
        "answer_nll": sum(o.nll for o in outcomes) / sum(o.targets for o in outcomes),
        "commit": header.provenance.commit,
        "versions": header.provenance.versions,
    }


def _shuffled(found: Route, count: int) -> list[Route]:
    """The same layers, policy and tokens together, in other places."""
    rng, layers = np.random.default_rng(0), found.layers
    tried = (tuple(layers[i] for i in rng.permutation(len(layers))) for _ in range(10 * count))
    seen = dict.fromkeys([layers, *tried])
    return [Route(found.policy, found.tokens, each) for each in list(seen)[1 : count + 1]]


def _policies(found: Route) -> list[str]:
    return list(dict.fromkeys(layer.policy for layer in found.layers))


def _everywhere(found: Route, policy: str) -> Route:
    n = len(found.layers)
    return route(found.policy, [policy] * n, [found.tokens] * n)


if __name__ == "__main__":
    main()
