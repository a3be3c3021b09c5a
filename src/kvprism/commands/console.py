"""What the command line prints: tables, progress, errors. Results to stdout, the rest to stderr."""

import json
import os
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

from kvprism.errors import BadInput, KVPrismError, TransportError, WireError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

LOG_COLUMNS = 160
LOG_EVERY_S = 15.0
EXIT_OTHER, EXIT_BAD_INPUT, EXIT_TRANSFER, EXIT_INTERRUPTED = 1, 2, 3, 130
LOADER = "kvprism-loader"
EXTRAS = {"transformers": "hf", "huggingface_hub": "hf", "matplotlib": "report", "jinja2": "report"}


def say(text: str) -> None:
    """A line of the result."""
    print(text, flush=True)


def note(text: str) -> None:
    """A line that is not part of the result."""
    print(text, file=sys.stderr, flush=True)


def _console(stream: TextIO) -> "Console":
    from rich.console import Console  # here and below: not for --help

    # Without a terminal rich assumes 80 columns and would cut figures in a log.
    width = None if stream.isatty() or "COLUMNS" in os.environ else LOG_COLUMNS
    return Console(file=stream, markup=False, highlight=False, emoji=False, width=width)


@contextmanager
def one_line_errors(*outputs: Path | None) -> Iterator[None]:
    """Run a command whose `outputs` can be written, and say what goes wrong in one clear line.

    Exit 2: bad input, 3: the transfer or the stream failed, 130: interrupted, 1: anything else.
    """
    try:
        for path in outputs:
            if path is not None:
                check_writable(path)
        yield
    except KVPrismError as error:
        raise _failure(f"{type(error).__name__}: {error}", _exit_code(error)) from error
    except ModuleNotFoundError as error:
        name = str(error.name).partition(".")[0]
        if name not in EXTRAS:
            raise
        way_out = f"this command needs {name}: pip install 'kvprism[{EXTRAS[name]}]'"
        raise _failure(way_out, EXIT_OTHER) from error
    except KeyboardInterrupt as error:
        raise _failure("interrupted", EXIT_INTERRUPTED) from error


def load(*modules: str) -> None:
    """Import what takes seconds, beside the main thread, which a Ctrl-C can interrupt meanwhile.

    In the middle of an import its exception would be lost in C++, or abort the process.
    """
    done: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            for module in modules:
                import_module(module)
        except Exception as error:  # raised again where it was asked for
            done.put(error)
        else:
            done.put(None)

    threading.Thread(target=work, name=LOADER, daemon=True).start()
    if error := done.get():
        raise error


def end_at_once_if_loading(code: str | int | None) -> None:
    """The interpreter cannot tear down what another thread is still importing."""
    if any(thread.name == LOADER for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else EXIT_OTHER)


def _failure(message: str, code: int) -> typer.Exit:
    note("error: " + " ".join(message.split()))
    return typer.Exit(code)


def _exit_code(error: KVPrismError) -> int:
    if isinstance(error, WireError | TransportError):
        return EXIT_TRANSFER
    return EXIT_BAD_INPUT if isinstance(error, BadInput) else EXIT_OTHER


def check_writable(path: Path) -> None:
    """Before minutes of work rather than after: `BadInput` for a place that cannot be written."""
    try:
        if path.exists() and not path.is_file():
            raise BadInput(f"cannot write {path}: it is not a regular file")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}") from error


def write_json(path: Path | None, result: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write `result` beside `path` and move it in place, so that no reader sees half of it.

    Raises:
        BadInput: the file cannot be written.
    """
    if path is not None:
        from kvprism.evaluate.rows import replace_file

        replace_file(path, json.dumps(result, indent=1).encode() + b"\n")


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with the time left; call it with (done, total). In a log, a line at times."""
    console = _console(sys.stderr)
    if not console.is_terminal:
        yield _logged_progress(label)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        # Documents differ in length: half a minute of them says little about the rest.
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=True, speed_estimate_period=300) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _logged_progress(label: str) -> Callable[[int, int], None]:
    started = said = time.monotonic()
    first: int | None = None

    def advance(done: int, total: int) -> None:
        nonlocal said, first
        now = time.monotonic()
        first = done - 1 if first is None else first  # what an earlier run did took no time now
        if now - said >= LOG_EVERY_S and done < total:
            said = now
            left = (now - started) / (done - first) * (total - done)
            note(f"{label}: {done} of {total}, about {left:.0f} s left")

    return advance


@contextmanager
def status(label: str) -> Iterator[Callable[[str], None]]:
    """Say what is going on: a spinner in a terminal, lines in a log."""
    console = _console(sys.stderr)
    if not console.is_terminal:
        note(label)
        yield note
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn

    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        console=console,
        transient=True,
        refresh_per_second=4,
        redirect_stdout=sys.stdout.isatty(),  # what goes into a pipe must stay there
    ) as spinner:
        task = spinner.add_task(label, total=None)
        yield lambda text: spinner.update(task, description=text)


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, words: bool = False
) -> None:
    """Print a table; words: every column is left-aligned, else only the first.

    A cell's second line is dimmed.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    grid = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for i, column in enumerate(columns):
        grid.add_column(column, justify="left" if words or i == 0 else "right", no_wrap=i == 0)
    for row in rows:
        grid.add_row(*map(_cell, row))
    console = _console(sys.stdout)
    console.print(title, style="bold", soft_wrap=True)  # as part of the table it would be folded
    console.print(grid)


def _cell(text: str) -> "Text":
    from rich.text import Text

    first, *more = text.split("\n", 1)
    return Text.assemble(first, *(("\n" + line, "dim") for line in more))


def size(nbytes: float) -> str:
    """`1234567` -> `1.18 MiB`."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"


def percent(fraction: float) -> str:
    """`0.2996` -> `29.96 %`."""
    return f"{100 * fraction:.2f} %"


def timing_columns(names: Iterable[str]) -> list[str]:
    """Headings of timings; what lies within others and is not added to them is in brackets."""
    special = {"decode": "(decode)", "first_token": "first token", "ttft": "TTFT"}
    return [special.get(name, name) for name in names]


def timings(names: Iterable[str], result: Mapping[str, Any]) -> list[str]:
    """The cells of those columns: milliseconds, one decimal where it says something."""
    values = [float(result[f"{name}_ms"]) for name in names]
    return [f"{value:.1f}" if value < 1000 else f"{value:.0f}" for value in values]
