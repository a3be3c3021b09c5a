"""A link as fast as it was told to be, and what it leaves behind: nothing."""

import os
import subprocess
import time
from pathlib import Path

import pytest
from peers import in_thread

from kvprism.errors import Unsupported
from kvprism.evaluate import links
from kvprism.evaluate.links import AUTO, NONE, PACING, TC, Link, shaped_link
from kvprism.transport import tcp

NBYTES = 1_000_000
BITS_PER_S = 20_000_000
IDEAL_S = 8 * NBYTES / BITS_PER_S


def seconds(connection: tcp.Connection, other: tcp.Connection) -> float:
    """From the first byte sent to the last received."""
    started = time.perf_counter()
    with in_thread(lambda: connection.send([bytes(NBYTES)])):
        buffer, left = memoryview(bytearray(65536)), NBYTES
        while left:
            left -= other.recv_into(buffer[: min(left, len(buffer))])
    return time.perf_counter() - started


def test_a_paced_connection_takes_as_long_as_its_speed_says() -> None:
    with (
        tcp.listen() as listener,
        tcp.dial(*listener.address) as one,
        listener.accept(1.0) as other,
    ):
        fast = seconds(one, other)
        one.pace(BITS_PER_S // 8)
        # The first packets of a connection that was idle leave unpaced.
        assert seconds(one, other) > max(0.6 * IDEAL_S, fast)
        one.pace(None)
        assert seconds(one, other) < 0.6 * IDEAL_S + fast


def namespaces() -> list[str]:
    return [path.name for path in Path("/run/netns").glob(f"kvprism-{os.getpid()}-*")]


def tc_works() -> bool:
    with shaped_link() as link:
        return link.shaping == TC


@pytest.mark.skipif(not tc_works(), reason="tc in network namespaces needs root and iproute2")
def test_the_kernel_shapes_a_link_between_namespaces() -> None:
    with shaped_link(TC) as link:
        link.shape(BITS_PER_S)
        assert len(namespaces()) == 2 and link.host != "127.0.0.1"
        for prefix in link.prefixes:
            shown = subprocess.run(
                [*prefix, "tc", "qdisc", "show", "dev", "cable"], capture_output=True, text=True
            )
            assert "tbf" in shown.stdout and "rate 20Mbit" in shown.stdout
    assert namespaces() == []


def test_without_the_tools_auto_paces_and_tc_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(links.shutil, "which", lambda tool: None)
    with shaped_link(AUTO) as link:
        assert (link.shaping, link.prefixes, link.host) == (PACING, ((), ()), "127.0.0.1")
    with pytest.raises(Unsupported, match="install iproute2"), shaped_link(TC):
        pass
    assert namespaces() == []


def test_a_link_that_is_not_shaped_runs_nothing() -> None:
    with shaped_link(NONE) as link:
        assert isinstance(link, Link) and link.prefixes == ((), ())
        link.shape(1)
