"""Kills in the middle of transfers, one a round, and what became of every request meanwhile.

A round holds one cache half on its way, has two more queued behind it, a request without a transfer
beside them and, where prefill is killed, a prompt that is being computed there. Then the server is
killed with all its processes, started again, and used again.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from cluster import CHUNKS, Cluster
from servers import Failed, Server, transferred

Side = Literal["prefill", "decode"]

NEW = 24
QUEUED = 2
PROMPTS = 24
LENGTHS = (300, 900)
# Both sides of the built-in model hold float32: 2 components, layers x heads x channels of 4 bytes.
TOKEN_NBYTES = 4096
# A request that has neither tokens nor an error by then counts as lost.
LOST_S = 150.0
BAD = {"wrong", "failed", "lost"}
ASKED = {"do_remote_decode": True, "do_remote_prefill": False}


@dataclass
class Round:
    """One kill. held_at_nbytes: of the first cache's bytes, where the link stopped.

    send: how the prefill server sends; notice: whether the other side sees a broken connection at
    once (`reset`) or silence (`silent`). `outcomes` counts requests: `loaded` or `computed`
    finished with the single server's tokens, `error` ended with one because its own server was
    killed; there must be none with other tokens (`wrong`), with an error from a living server
    (`failed`), or without an end (`lost`). `failures` are the decode side's, by cause.
    """

    number: int
    side: Side
    send: str
    notice: str
    held_at_nbytes: int
    cache_nbytes: int
    outcomes: dict[str, int] = field(default_factory=dict)
    failures: dict[str, float] = field(default_factory=dict)
    alive: bool = False
    blocks_free: bool = False
    start_s: float = 0.0
    seconds: float = 0.0

    @property
    def held(self) -> bool:
        """Nothing wrong, failed or lost, servers alive, blocks free."""
        return self.alive and self.blocks_free and not BAD & set(self.outcomes)

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


class Faults:
    """Rounds on one cluster; each is a function of the seed and its number alone."""

    def __init__(self, cluster: Cluster, seed: int = 0) -> None:
        self._cluster, self._seed = cluster, seed
        rng = np.random.default_rng(seed)
        lengths = rng.integers(*LENGTHS, PROMPTS)
        self._prompts = [rng.integers(3, 2048, n).tolist() for n in lengths]
        self._alone = [
            cluster.decode.tokens(ids, NEW, cache_salt=f"alone {i}")
            for i, ids in enumerate(self._prompts)
        ]
        self._salt, self._send = 0, "request"

    def run(self, number: int, side: Side) -> Round:
        """One kill of that side.

        Raises:
            Failed: a server does not start again, or nothing was under way to be interrupted.
        """
        rng = np.random.default_rng([self._seed, number, side == "decode"])
        chosen = [int(i) for i in rng.choice(PROMPTS, QUEUED + 3, replace=False)]
        cache = TOKEN_NBYTES * (len(self._prompts[chosen[0]]) - 1)
        done = Round(
            number, side, self._send, ("reset", "silent")[number % 2],
            int(rng.uniform(0, 0.95) * cache), cache,
        )  # fmt: skip
        started = time.monotonic()
        outcomes: Counter[str] = Counter()
        (self._kill_prefill if side == "prefill" else self._kill_decode)(done, chosen, outcomes)
        self._again(done, chosen, outcomes)
        done.outcomes, done.seconds = dict(sorted(outcomes.items())), time.monotonic() - started
        return done

    def _kill_prefill(self, done: Round, chosen: list[int], outcomes: Counter[str]) -> None:
        """Decode computes what does not come; a client of the killed server asks decode instead."""
        cluster = self._cluster
        before = cluster.decode.counts()
        with self._interrupted(done, chosen) as (pool, waiting):
            last = self._prompts[chosen[-1]]
            asking = pool.submit(cluster.prefill.complete, last, 1, ASKED, **self._fresh())
            cluster.prefill.kill()
            if done.notice == "reset":
                cluster.link.release()
            for i, answer in waiting:
                outcomes[self._judged(i, answer)] += 1
            try:
                params = asking.result(LOST_S).get("kv_transfer_params")
            except (OSError, Failed):
                outcomes["error"] += 1
                params = None
            finished = pool.submit(cluster.decode.tokens, last, NEW, params, **self._fresh())
            outcomes[self._judged(chosen[-1], finished)] += 1
        self._start(done, "prefill")
        done.failures = _grown(before, cluster.decode.counts(), "failures:")

    def _kill_decode(self, done: Round, chosen: list[int], outcomes: Counter[str]) -> None:
        """Clients of the killed server see an error, none waits; what had its cache is computed."""
        cluster = self._cluster
        with self._interrupted(done, chosen) as (_, waiting):
            cluster.decode.kill()
            if done.notice == "reset":
                cluster.link.release()
            for i, answer in waiting:
                outcomes[self._judged(i, answer, killed=True)] += 1
            late = self._prefilled(chosen[-1], self._fresh())  # sent to nobody
        self._start(done, "decode")
        before = cluster.decode.counts()
        with ThreadPoolExecutor(1) as pool:
            finished = pool.submit(
                cluster.decode.tokens, self._prompts[chosen[-1]], NEW, late, **self._fresh()
            )
            outcomes[self._judged(chosen[-1], finished)] += 1
        done.failures = _grown(before, self._settled(), "failures:")

    def _again(self, done: Round, chosen: list[int], outcomes: Counter[str]) -> None:
        """Every prompt of the round once more, through both; a transfer works as before."""
        cluster, before = self._cluster, self._settled().get("loads", 0)
        with ThreadPoolExecutor(1) as pool:
            for i in chosen:
                outcomes[self._judged(i, pool.submit(self._across, i))] += 1
        loaded = int(self._settled().get("loads", 0) - before)
        outcomes["loaded"] += loaded
        outcomes["computed"] -= loaded
        done.alive = cluster.prefill.alive() and cluster.decode.alive() and loaded > 0
        done.blocks_free = all(idle(server) for server in (cluster.prefill, cluster.decode))

    def _across(self, i: int) -> list[int]:
        both = self._cluster.prefill, self._cluster.decode
        return transferred(*both, self._prompts[i], NEW, **self._fresh())[0]

    def _prefilled(self, i: int, salt: dict[str, str]) -> dict[str, Any]:
        """The parameters for decode, while the cache is on its way."""
        answer = self._cluster.prefill.complete(self._prompts[i], 1, ASKED, **salt)
        params: dict[str, Any] = answer["kv_transfer_params"]
        return params

    @contextmanager
    def _interrupted(
        self, done: Round, chosen: list[int]
    ) -> Iterator[tuple[ThreadPoolExecutor, list[tuple[int, "Future[list[int]]"]]]]:
        """Requests at the decode server, the first of whose caches stops on its way."""
        cluster = self._cluster
        cluster.link.hold(done.held_at_nbytes)
        salts = [self._fresh() for _ in chosen]
        params = [self._prefilled(i, salts[n]) for n, i in enumerate(chosen[: 1 + QUEUED])]
        with ThreadPoolExecutor(len(chosen) + 1) as pool:
            waiting = [
                (i, pool.submit(cluster.decode.tokens, self._prompts[i], NEW, its, **salt))
                for i, its, salt in zip(chosen, [*params, None], salts, strict=False)
            ]
            if not cluster.link.held.wait(LOST_S):
                raise Failed(f"round {done.number}: nothing was held on the link")
            try:
                yield pool, waiting
            finally:
                cluster.link.release()

    def _judged(self, i: int, answer: "Future[list[int]]", *, killed: bool = False) -> str:
        try:
            return "computed" if answer.result(LOST_S) == self._alone[i] else "wrong"
        except TimeoutError:
            return "lost"
        except (OSError, Failed):
            return "error" if killed else "failed"

    def _start(self, done: Round, side: Side) -> None:
        cluster, started = self._cluster, time.monotonic()
        if side == "prefill":
            self._send = ("request", "chunk")[done.number % 4 // 2]
            chunks = CHUNKS if self._send == "chunk" else None
            cluster.prefill = cluster.start_prefill(chunks, send=self._send).wait()
        else:
            cluster.decode = cluster.start_decode().wait()
        done.start_s = time.monotonic() - started

    def _settled(self) -> dict[str, float]:
        """Decode's counts; those of a step appear with the next one."""
        self._cluster.decode.tokens([5, 6], 1)
        return self._cluster.decode.counts()

    def _fresh(self) -> dict[str, str]:
        """A salt of its own for every request: no prefix cache has a part in this."""
        self._salt += 1
        return {"cache_salt": f"fault {self._salt}"}


def _grown(before: dict[str, float], after: dict[str, float], prefix: str) -> dict[str, float]:
    return {
        name.removeprefix(prefix): value - before.get(name, 0)
        for name, value in sorted(after.items())
        if name.startswith(prefix) and value > before.get(name, 0)
    }


def idle(server: Server, patience_s: float = 30.0) -> bool:
    """Whether soon no request runs or waits and no block is taken, by the server's own gauges."""
    return until(lambda: set(server.gauges().values()) == {0.0}, patience_s)


def until(done: Callable[[], bool], patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True
