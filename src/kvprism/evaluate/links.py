"""A link of a chosen speed between two workers: shaped by the kernel, or paced by the sender.

`tc`: each worker in a network namespace of its own, a cable between them, a token bucket at both
ends; nothing of it is in our processes. It needs root. `pacing`: the sender's kernel spaces its
packets out on loopback; nothing of the way back is slowed down. `none`: loopback as it is.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvprism.errors import Unsupported
from kvprism.integrations.worker import LOOPBACK

TC, PACING, NONE, AUTO = "tc", "pacing", "none", "auto"
SHAPINGS = (AUTO, TC, PACING, NONE)
_HOSTS = ("192.0.2.1", "192.0.2.2")  # of documentation: no route leads there
_PREFIX = "kvprism-"
# Jumbo frames: with 1,500 bytes a frame, headers would take 5 % of the link.
_MTU = 9000
_QUEUE_NBYTES = 4 * 2**20


class Link:
    """Where both workers run, and how fast it is between them.

    prefixes: commands that run the prefill and the decode worker; host: where the latter listens.
    """

    def __init__(self, shaping: str, namespaces: tuple[str, ...] = ()) -> None:
        self.shaping = shaping
        self.host = _HOSTS[1] if namespaces else LOOPBACK
        self.prefixes = tuple(("ip", "netns", "exec", name) for name in namespaces) or ((), ())
        self._namespaces = namespaces

    def shape(self, bits_per_s: int) -> None:
        """Let through so much in each direction; `pacing` is the sender's business."""
        # A token bucket holds 2 ms of the link, a jumbo frame at least.
        burst = min(max(bits_per_s // 8 // 500, 2 * _MTU), 2**19)
        bucket = ["tbf", "rate", f"{bits_per_s}bit", "burst", str(burst)]
        for name in self._namespaces:
            place = ["-n", name, "qdisc", "replace", "dev", _DEVICE, "root"]
            _run("tc", *place, *bucket, "limit", str(_QUEUE_NBYTES))


_DEVICE = "cable"


@contextmanager
def shaped_link(shaping: str = AUTO) -> Iterator[Link]:
    """A link that can be shaped; auto: `tc` where it works, else `pacing`.

    Raises:
        Unsupported: `tc` was asked for and does not work here; says why and the way out.
    """
    if shaping not in (AUTO, TC):
        yield Link(shaping)
        return
    names = (f"{_PREFIX}{os.getpid()}-p", f"{_PREFIX}{os.getpid()}-d")
    try:
        _lay_cable(names)
    except Unsupported:
        _remove(names)
        if shaping == TC:
            raise
        yield Link(PACING)
        return
    try:
        yield Link(TC, names)
    finally:
        _remove(names)


def _lay_cable(names: tuple[str, str]) -> None:
    _check_tools()
    _remove(_left_behind())
    for name in names:
        _run("ip", "netns", "add", name)
    ends = [part for name in names for part in (name, _DEVICE)]
    cable = ["link", "add", ends[1], "netns", ends[0], "type", "veth"]
    _run("ip", *cable, "peer", "name", ends[3], "netns", ends[2])
    for name, host in zip(names, _HOSTS, strict=True):
        _run("ip", "-n", name, "addr", "add", f"{host}/30", "dev", _DEVICE)
        _run("ip", "-n", name, "link", "set", _DEVICE, "mtu", str(_MTU), "up")
    Link(TC, names).shape(10**9)


def _check_tools() -> None:
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise Unsupported(
            f"shaping tc needs {' and '.join(missing)}: install iproute2, or use --shaping pacing"
        )
    if os.geteuid():
        raise Unsupported("shaping tc needs root; run as root, or use --shaping pacing")


def _left_behind() -> list[str]:
    """Namespaces of runs that were killed before they could remove them."""
    found = []
    for path in Path("/run/netns").glob(f"{_PREFIX}*"):
        pid = path.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            found.append(path.name)
    return found


def _remove(names: "list[str] | tuple[str, ...]") -> None:
    for name in names:
        with suppress(Unsupported):
            _run("ip", "netns", "del", name)


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        raise Unsupported(
            f"shaping tc does not work here: {' '.join(command)} said {said!r}; this kernel may "
            "lack network namespaces, veth or the tbf queue; use --shaping pacing"
        ) from error
