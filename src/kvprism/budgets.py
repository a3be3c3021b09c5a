"""A budget as it is given -> bytes: a number, a text, or what counts from a policy's floor."""

import re
from collections.abc import Callable

from kvprism.core import Budget, KVShape
from kvprism.errors import BadInput

Given = str | float | Budget

_FLOOR = re.compile(r"\s*floor\s*(?:\+(.+))?")


def required_budget(policy: str, budget: Given | None) -> Given:
    """Raises `BadInput` where there is none."""
    if budget is None:
        raise BadInput(f"policy {policy!r} needs a budget, such as 0.30, 30%, 512MiB or 512tok")
    return budget


def split_floor(budget: Given) -> tuple[bool, Given | None]:
    """Whether a budget counts from the policy's smallest plan, and what it says beyond that.

    Example:
        >>> split_floor("floor+0.04"), split_floor("floor"), split_floor(0.3)
        ((True, '0.04'), (True, None), (False, 0.3))
    """
    match = _FLOOR.fullmatch(budget) if isinstance(budget, str) else None
    return (False, budget) if match is None else (True, match[1])


def budget_limit(given: Given, shape: KVShape, smallest: Callable[[], int]) -> Budget:
    """The budget in bytes; smallest: of the policy's plans, where the budget counts from it."""
    from_floor, beyond = split_floor(given)
    more = 0 if beyond is None else Budget.parse(beyond, shape).nbytes
    return Budget(more + (smallest() if from_floor else 0))
