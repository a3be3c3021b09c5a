"""Routes: for every layer an eviction policy and a number of tokens, in a line that people read."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from kvprism.errors import BadInput

FULL = "full"
# A route serves the budgets around its own: up to this factor above, and down to it below.
REACH = 2**0.5
_RANGE = re.compile(r"(\d+)(?:-(\d+))?: ([a-z0-9-]+)(?:@(\d+))?")


@dataclass(frozen=True)
class LayerRoute:
    """What happens to one layer: an eviction policy and the tokens that it keeps, protected ones
    included; `full` keeps all there are, and has no number.

    Raises:
        BadInput: `full` with a number, a policy without one, or one that is not positive.
    """

    policy: str
    tokens: int | None = None

    def __post_init__(self) -> None:
        positive = self.tokens is None or self.tokens > 0
        if (self.policy == FULL) != (self.tokens is None) or not positive:
            raise BadInput(
                f"a layer is {FULL} without a number or a policy with one, such as snapkv@640; got "
                f"{self.policy!r} and {self.tokens}"
            )

    def __str__(self) -> str:
        return self.policy if self.tokens is None else f"{self.policy}@{self.tokens}"


@dataclass(frozen=True)
class Route:
    """Layers' policies and shares for one policy of the table, such as `polykv`, at one budget.

    tokens: per layer on average; layers: in order, and unless one of them is `full`, which costs as
    many tokens as a prompt has, they sum to exactly `tokens` a layer; note: what it was made from;
    decode: what layers keep while tokens are generated, where a decode phase follows this route,
    under the same budget; the same as of the prompt when there is none.

    Raises:
        BadInput: no layers, layers that do not sum to the budget, or decode layers of another
            number.

    Example:
        >>> str(Route("polykv", 100, parse_layers("0: tova@60, 1-2: snapkv@120")))
        '0: tova@60, 1-2: snapkv@120'
    """

    policy: str
    tokens: int
    layers: tuple[LayerRoute, ...]
    note: str = ""
    decode: tuple[LayerRoute, ...] = ()

    def __post_init__(self) -> None:
        if not self.layers or self.tokens < 1:
            raise BadInput(
                f"a route needs at least one layer and one token, got {len(self.layers)} layers of "
                f"{self.tokens} tokens"
            )
        if self.decode and len(self.decode) != len(self.layers):
            raise BadInput(
                f"route {self} of {self.policy!r}: its decode phase is for {len(self.decode)} "
                f"layers, expected {len(self.layers)}"
            )
        for phase in (self.layers, self.decode):
            self._check_sum(phase)

    def _check_sum(self, layers: Sequence[LayerRoute]) -> None:
        counts = [layer.tokens for layer in layers if layer.tokens is not None]
        given, expected = sum(counts), self.tokens * len(layers)
        if given != expected and len(counts) == len(layers):
            raise BadInput(
                f"route {line_of(layers)} of {self.policy!r}: {len(layers)} layers of "
                f"{self.tokens} tokens on average are {expected} tokens, these are {given}"
            )

    def __str__(self) -> str:
        return line_of(self.layers)


def line_of(layers: Sequence[LayerRoute]) -> str:
    """Layers as people read them: `0-1: full, 2: snapkv@640`."""
    return ranges_of([str(layer) for layer in layers])


def ranges_of(settings: Sequence[str]) -> str:
    """Settings of layers by ranges.

    Example:
        >>> ranges_of(["conditioned", "conditioned", "plain"])
        '0-1: conditioned, 2: plain'
    """
    parts = []
    for setting, group in groupby(enumerate(settings), key=lambda pair: pair[1]):
        layers = [layer for layer, _ in group]
        span = str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
        parts.append(f"{span}: {setting}")
    return ", ".join(parts)


def parse_layers(text: str) -> tuple[LayerRoute, ...]:
    """The layers of such a line; what policies there are is not known here.

    Raises:
        BadInput: another form, or ranges that leave out, repeat or reorder layers.

    Example:
        >>> [str(layer) for layer in parse_layers("0-1: full, 2: snapkv@640")]
        ['full', 'full', 'snapkv@640']
    """
    layers: list[LayerRoute] = []
    for part in text.split(", "):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise BadInput(f"route {text!r}: {part!r} is not of the form '4-10: snapkv@640'")
        first, last = int(match[1]), int(match[2] or match[1])
        if first != len(layers) or last < first:
            raise BadInput(f"route {text!r}: {part!r} where layer {len(layers)} was expected")
        tokens = None if match[4] is None else int(match[4])
        layers += [LayerRoute(match[3], tokens)] * (last - first + 1)
    return tuple(layers)


def nearest(routes: Sequence[Route], tokens: float) -> Route | None:
    """The route that serves a budget of so many tokens a layer, or None where none reaches."""
    by_distance = sorted(
        routes, key=lambda route: max(route.tokens / tokens, tokens / route.tokens)
    )
    for route in by_distance[:1]:
        if route.tokens / REACH <= tokens <= route.tokens * REACH:
            return route
    return None
