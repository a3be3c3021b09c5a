"""Time to first token between two processes over a link of a given speed, split into its phases.

An arm's repeats take turns with the other arms' on the same link, and with prefills alone, from
which the bound is computed: what else the machine does meanwhile falls on all. Every time is on the
clock that processes of a machine share: TTFT is from before the prefill in one process to the first
token in the other, with no message of the parent in between.
"""

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any, NamedTuple

from kvprism.chunkwise import leaves_in_chunks
from kvprism.errors import BadInput
from kvprism.evaluate.arms import RAW, arms_of
from kvprism.evaluate.links import PACING, TC, Link
from kvprism.integrations.worker import Pair, Place
from kvprism.layerwise import leaves_early

WARM_UP = 2
PREFILLS = 5
PATIENCE_S = 600.0
PHASES = ("prefill_s", "plan_s", "encode_s", "transfer_s", "decode_s")
DEFINITIONS = {
    "prefill_s": "the prompt without its last token, until the last layer's keys and values exist; "
    "while layers leave where they leave early",
    "raw_equals_prefill": "this link is the one on which raw transfer takes as long as a prefill "
    "alone",
    "chunk": "tokens of a chunk, where the prompt is prefilled in chunks that leave early, and "
    "upgrades follow",
    "plan_s": "scores and solver; within prefill_s where layers leave early (overlap); with chunks "
    "that of the upgrades comes after it",
    "plan_share": "processor time of planning over that of the prefill alone",
    "encode_s": "encoding, on the prefill side; as plan_s",
    "transfer_s": "from the offer to the acknowledgement, less encode_s; with overlap it contains "
    "the wait for layers that are not computed yet",
    "decode_s": "decoding, on the decode side, while other layers are still on their way",
    "exposed_s": "from the end of the prefill to the whole cache on the decode side",
    "ttft_p50_s": "from before the prefill to the first token of the decode side; p95 as well",
    "second_token_s": "one more token: a decode step alone",
    "bound_s": "what no system could beat on this link, from prefills alone that took turns with "
    "the arms: t = 0; for each layer t = max(t, when its keys and values exist) + its bytes / "
    "link; plus one layer's encode and decode and one decode step; without overlap prefill + bytes "
    "/ link in place of t; with chunks for each layer of each chunk, from prefills in chunks, and "
    "for all upgrades after the last",
    "break_even_bits_per_s": "the link on which encode and decode take what the saved bytes do; "
    "above it compression loses, unless it overlaps",
    "gain": "1 - TTFT / TTFT of raw on the same link; negative: compression loses",
}

Row = dict[str, Any]
Advance = Callable[[int, int], None]


class Way(NamedTuple):
    """What one request is sent as; chunk: None for a prompt prefilled in one go."""

    policy: str
    budget: str | None
    chunk: int | None


@dataclass(frozen=True)
class Case:
    """What is measured: policies at budgets, over links, so many times.

    links: bits per second; None: the link on which raw transfer takes as long as a prefill alone;
    chunk: policies that look at the whole prompt are also measured in chunks of so many tokens,
    where they can be.

    Raises:
        UnknownName: no such policy.
        BadInput: no budget where one is needed, fewer than two tokens, no repeat, or a chunk that
            is not shorter than the prompt.
    """

    context: int
    policies: tuple[str, ...]
    budgets: tuple[str, ...]
    links: tuple[int | None, ...]
    repeats: int
    seed: int = 0
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.context < 2 or self.repeats < 2:
            raise BadInput(
                f"a context of at least 2 tokens and at least 2 repeats, got {self.context} and "
                f"{self.repeats}"
            )
        if not self.links or any(link is not None and link < 1 for link in self.links):
            raise BadInput(f"links must be faster than nothing, got {self.links}")
        if self.chunk is not None and not 1 <= self.chunk < self.context - 1:
            raise BadInput(
                f"a chunk of 1 to {self.context - 2} tokens of a prompt of {self.context}, got "
                f"{self.chunk}"
            )
        _ = self.arms  # says now what is wrong with a policy or a budget

    @property
    def arms(self) -> list[Way]:
        """`raw` first, whether it was named or not."""
        named = (
            (arm.policy, None if arm.budget is None else str(arm.budget))
            for arm in arms_of(self.policies, self.budgets)
        )
        return [Way(*each, chunk) for each in named for chunk in self._chunks(each[0])]

    def _chunks(self, policy: str) -> tuple[int | None, ...]:
        both = leaves_in_chunks(policy) and not leaves_early(policy)
        return (None,) if self.chunk is None or not both else (None, self.chunk)

    @property
    def prefills(self) -> tuple[int | None, ...]:
        """In how long chunks the prompt is prefilled."""
        return tuple(dict.fromkeys(way.chunk for way in self.arms))


def places(link: Link, pin: bool) -> tuple[tuple[Place, Place], str]:
    """Where both workers run, one torch thread each, and that in words.

    pin: a core of its own for each, of those that this process may use.
    """
    cores = sorted(os.sched_getaffinity(0))
    own = (cores[0], cores[-1]) if pin else (None, None)
    said = "not pinned"
    if pin:
        said = "a core each" if len(cores) > 1 else "one core for both: they take turns"
    hosts = ("", link.host)
    both = [
        Place(prefix, host or link.host, core, 1)
        for prefix, host, core in zip(link.prefixes, hosts, own, strict=True)
    ]
    return (both[0], both[1]), f"{said}; {len(cores)} of {os.cpu_count()} cores allowed"


def run_ttft(
    pair: Pair, link: Link, vocabulary: int, case: Case, advance: Advance = lambda done, total: None
) -> list[Row]:
    """A row for every link and arm; advance: called with (requests done, all).

    Raises:
        BudgetTooSmall: nothing legal fits a budget.
        PeerLost, PeerSilent: a worker died, or stands still.
    """
    drawn = random.Random(case.seed)
    ids = [drawn.randrange(vocabulary) for _ in range(case.context)]
    pair.ready()
    total = len(case.arms) * WARM_UP + PREFILLS
    total += len(case.links) * case.repeats * (len(case.arms) + len(case.prefills))
    done = 0

    def counted(found: Row) -> Row:
        nonlocal done
        advance(done := done + 1, total)
        return found

    bench = _Bench(pair, link, ids)
    warm = [counted(bench.sample(arm)) for _ in range(WARM_UP) for arm in case.arms]
    prefill_s = median(counted(bench.prefill(None))["prefill_s"] for _ in range(PREFILLS))
    equal = round(8 * warm[0]["wire_bytes"] / prefill_s, -5)  # of raw, the first arm
    rows = []
    for wanted in case.links:
        bits_per_s = int(equal) if wanted is None else wanted
        bench.set_link(bits_per_s)
        alone: dict[int | None, list[Row]] = {chunk: [] for chunk in case.prefills}
        samples = [list[Row]() for _ in case.arms]
        for _ in range(case.repeats):
            for chunk, prefills in alone.items():
                prefills.append(counted(bench.prefill(chunk)))
            for own, arm in zip(samples, case.arms, strict=True):
                own.append(counted(bench.sample(arm)))
        medians = {chunk: _medians(prefills) for chunk, prefills in alone.items()}
        raw_s = _ttft_p50(samples[0])
        said = {"context": case.context, "shaping": link.shaping}
        said["raw_equals_prefill"] = wanted is None
        for arm, own in zip(case.arms, samples, strict=True):
            rows.append({**said, **_row(arm, own, bits_per_s, medians[arm.chunk], raw_s)})
    return rows


class _Bench:
    """One connection between both workers, kept for all requests."""

    def __init__(self, pair: Pair, link: Link, ids: list[int]) -> None:
        self._pair, self._link, self._ids = pair, link, ids
        self._address = pair.call(pair.decode, "address")

    def set_link(self, bits_per_s: int) -> None:
        if self._link.shaping == TC:
            self._link.shape(bits_per_s)
        elif self._link.shaping == PACING:
            self._pair.call(self._pair.prefill, "pace", bytes_per_s=bits_per_s // 8)

    def prefill(self, chunk: int | None) -> Row:
        """A prefill and nothing else: when each layer exists, and the whole."""
        return {**self._pair.call(self._pair.prefill, "time_layers", ids=self._ids, chunk=chunk)}

    def sample(self, arm: Way) -> Row:
        sent, restored = self._pair.exchange(
            ("serve", {"ids": self._ids, "address": self._address, **arm._asdict()}),
            ("go_on", {"ids": self._ids, "timeout_s": PATIENCE_S}),
        )
        started = sent["started_at"]
        return {
            **restored,
            **sent,
            "ttft_s": restored["first_token_at"] - started,
            "exposed_s": restored["received_at"] - started - sent["prefill_s"],
        }


def _medians(alone: Sequence[Row]) -> Row:
    """Of prefills alone: of each layer's time, and of the whole."""
    ready = zip(*(one["layer_ready_s"] for one in alone), strict=True)
    return {
        "layer_ready_s": [median(each) for each in ready],
        "prefill_s": median(one["prefill_s"] for one in alone),
        "prefill_cpu_s": median(one["prefill_cpu_s"] for one in alone),
    }


def _ttft_p50(samples: Sequence[Row]) -> float:
    return float(median(one["ttft_s"] for one in samples))


def _row(arm: Way, samples: Sequence[Row], bits_per_s: int, alone: Row, raw_s: float) -> Row:
    medians = {
        name: median(one[name] for one in samples)
        for name in (*PHASES, "plan_cpu_s", "exposed_s", "first_token_s", "second_token_s")
    }
    times = [one["ttft_s"] for one in samples]
    low, middle, high = quantiles(times, n=4, method="inclusive")
    one = samples[0]
    saved = one["native_bytes"] - one["wire_bytes"]
    codec_s = medians["encode_s"] + medians["decode_s"]
    ready_s, nbytes = alone["layer_ready_s"], one["piece_nbytes"]
    after_s = codec_s / len(nbytes) + medians["second_token_s"]
    if arm.chunk is not None:
        ready_s = [*ready_s, alone["prefill_s"]]  # upgrades
    if not one["overlap"]:
        ready_s, nbytes = [alone["prefill_s"]], [one["wire_bytes"]]
    bound = bound_s(ready_s, nbytes, bits_per_s, after_s)
    return {
        **arm._asdict(),
        "link_bits_per_s": bits_per_s,
        "overlap": one["overlap"],
        **medians,
        "ttft_p50_s": middle,
        "ttft_p95_s": quantiles(times, n=20, method="inclusive")[-1],
        "ttft_iqr_s": high - low,
        "n": len(times),
        "wire_bytes": one["wire_bytes"],
        "reference_bytes": one["reference_bytes"],
        "native_bytes": one["native_bytes"],
        "bound_s": bound,
        "over_bound": middle / bound - 1,
        "prefill_alone_s": alone["prefill_s"],
        "prefill_cpu_s": alone["prefill_cpu_s"],
        "plan_share": medians["plan_cpu_s"] / alone["prefill_cpu_s"],
        "break_even_bits_per_s": 8 * saved / codec_s if saved > 0 else None,
        "break_even_with_plan_bits_per_s": (
            8 * saved / (codec_s + medians["plan_s"]) if saved > 0 else None
        ),
        "gain": 1 - middle / raw_s,
    }


def bound_s(
    ready_s: Sequence[float], nbytes: Sequence[int], bits_per_s: float, after_s: float
) -> float:
    """The earliest first token on a link: pieces exist at `ready_s`, and one goes after another.

    after_s: what nothing can hide: one layer's encode and decode, and a decode step.

    Example:
        >>> bound_s([1.0, 2.0], [100, 100], 8 * 50, 0.5)
        5.5
    """
    t = 0.0
    for ready, size in zip(ready_s, nbytes, strict=True):
        t = max(t, ready) + 8 * size / bits_per_s
    return t + after_s


def raw_equals_prefill_bits_per_s(rows: Sequence[Row]) -> float:
    """The link on which raw transfer takes as long as the prefill alone."""
    raw = next(row for row in rows if row["policy"] == RAW)
    return float(8 * raw["wire_bytes"] / raw["prefill_alone_s"])
