"""`kvprism bench plan`: what a plan costs as the prompt grows, on scores that are drawn."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from kvprism.commands import console
from kvprism.commands.bench import with_provenance
from kvprism.core import HOLDS, MENU, Budget, KVShape
from kvprism.errors import BadInput, Unsupported
from kvprism.evict import EvictionProblem, grants, solve_eviction
from kvprism.evictions import EVICTIONS, layer_problem
from kvprism.layout import split_of
from kvprism.plans import Plan
from kvprism.policies import POLICIES
from kvprism.solve import TokenProblem, solve_layers, solve_prompt

# Layers, KV heads, channels.
SHAPES = {"tiny": (4, 2, 64), "Llama-3.1-8B": (32, 8, 128)}

Row = dict[str, Any]
Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class Case:
    """One row of the result: a policy's solver at a budget for a cache of some shape."""

    policy: str
    budget: str
    model: str
    tokens: int
    seed: int = 0

    @property
    def shape(self) -> KVShape:
        layers, heads, channels = SHAPES[self.model]
        return KVShape.dense(layers=layers, heads=heads, channels=channels, tokens=self.tokens)

    def solve(self) -> Plan:
        """Rank drawn scores and solve; what planning costs once the scores are there."""
        drawn = np.random.default_rng(self.seed)
        row, shape = POLICIES[self.policy], self.shape
        budget = Budget.parse(self.budget, shape)
        if row.eviction is not None:
            return self._evicted(drawn, shape, budget)
        split = split_of(shape)

        def problem() -> TokenProblem:
            order = np.argsort(-drawn.random(self.tokens), kind="stable")
            kept, native = order[order >= row.sinks], np.arange(row.sinks)
            return TokenProblem(self.policy, row.family, kept, native, MENU, {}, split)

        if row.tempo == "whole_prompt":
            return solve_prompt([problem()], shape, budget)
        shares = [float(layer.reference_nbytes) for layer in shape.layers]
        return solve_layers([problem() for _ in shape.layers], shape, budget, shares)

    def _evicted(self, drawn: np.random.Generator, shape: KVShape, budget: Budget) -> Plan:
        row = EVICTIONS[self.policy]
        layers = [
            layer_problem(row, layer, HOLDS, None, torch.from_numpy(drawn.random(of)))
            for layer in shape.layers
            for of in [(layer.components[0].heads, layer.n_tokens)]
        ]
        granted = grants(layers, [1.0] * len(layers))
        problem = EvictionProblem(self.policy, layers, granted, MENU, split_of(shape))
        return solve_eviction(problem, budget)


def bench_plan(
    tokens: list[int],
    policies: str,
    budget: str,
    repeats: int,
    advance: Advance = lambda done, total: None,
) -> Row:
    """Time every case, processor time of one thread.

    Raises:
        UnknownName: no such policy; Unsupported: a fixed-rate one, or one whose order is no score.
        BadInput: no token; BudgetTooSmall: nothing legal fits.
    """
    if min(tokens) < 1:
        raise BadInput(f"a prompt has at least one token, got {tokens}")
    cases = list(_cases(tokens, policies.split(","), budget))
    rows: list[Row] = []
    for done, case in enumerate(cases):
        advance(done, len(cases))
        times, plan = [], None
        for _ in range(repeats):
            started = time.process_time()
            plan = case.solve()
            times.append(time.process_time() - started)
        assert plan is not None and plan.nbytes <= Budget.parse(budget, case.shape).nbytes
        rows.append(
            {
                "policy": case.policy,
                "budget": budget,
                "shape": case.model,
                "tokens": case.tokens,
                "solve_cpu_s": median(times),
                "wire_bytes": plan.nbytes,
                "exponent": _exponent(rows, case, median(times)),
                "repeats": repeats,
            }
        )
    return with_provenance(rows)


def _cases(tokens: list[int], policies: list[str], budget: str) -> Iterator[Case]:
    for policy in policies:
        row = POLICIES[policy]
        if not row.budgeted or row.order not in ("importance", "scores"):
            raise Unsupported(
                f"policy {policy!r} ranks no scores; choose some that do, such as spectrum"
            )
        for model in SHAPES:
            for n in sorted(tokens):
                yield Case(policy, budget, model, n)


def _exponent(rows: list[Row], case: Case, seconds: float) -> float | None:
    """p where time grew as tokens^p since the shorter prompt before this one."""
    if not rows or (rows[-1]["policy"], rows[-1]["shape"]) != (case.policy, case.model):
        return None
    before = rows[-1]
    grown = np.log(seconds / before["solve_cpu_s"]) / np.log(case.tokens / before["tokens"])
    return float(grown)


def show_plan(rows: list[Row]) -> None:
    """Print a table a shape; the exponent is 1 where time grows with the tokens, 2 with pairs."""
    for shape in dict.fromkeys(row["shape"] for row in rows):
        own = [row for row in rows if row["shape"] == shape]
        columns = ["", "tokens", "solve ms", "grows as tokens^"]
        title = f"ranking and solving for {shape} at {own[0]['budget']}, processor time"
        console.table(title, columns, map(_cells, own))


def _cells(row: Row) -> list[str]:
    exponent = "" if row["exponent"] is None else f"{row['exponent']:.2f}"
    return [row["policy"], str(row["tokens"]), f"{1e3 * row['solve_cpu_s']:.1f}", exponent]
