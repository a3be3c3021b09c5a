"""What the command line prints: tables, progress, errors. Results go to stdout, the rest to stderr."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from kvprism.errors import BadInput, KVPrismError, TransportError, WireError

# Without a terminal rich assumes 80 columns and would cut figures in a log.
out = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
notes = Console(stderr=True, highlight=False)

EXIT_BAD_INPUT, EXIT_TRANSFER, EXIT_OTHER = 2, 3, 1


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a typed error into one clear line and a non-zero exit: 2 bad input, 3 transfer, 1 other."""
    try:
        yield
    except KVPrismError as error:
        notes.print(f"[bold red]error:[/] {type(error).__name__}: ", end="")
        notes.print(str(error), markup=False, soft_wrap=True)
        is_transfer = isinstance(error, WireError | TransportError)
        is_input = isinstance(error, BadInput)
        code = EXIT_BAD_INPUT if is_input else EXIT_TRANSFER if is_transfer else EXIT_OTHER
        raise typer.Exit(code) from error


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with the time left; call it with (done, total)."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=notes, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def status(label: str) -> Iterator[Callable[[str], None]]:
    """A spinner with a line that says what is going on."""
    with notes.status(label) as spinner:
        yield spinner.update


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, words: bool = False
) -> None:
    """Print a table; the first column is left-aligned, the others too if they are words."""
    grid = Table(title=title, title_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        grid.add_column(column, justify="left" if words or i == 0 else "right", no_wrap=i == 0)
    for row in rows:
        grid.add_row(*row)
    out.print(grid)


def write_json(path: Path | None, result: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write `result` beside `path` and move it in place, so that no reader sees half of it.

    Raises:
        BadInput: the file cannot be written.
    """
    if path is None:
        return
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}") from error


def size(nbytes: float) -> str:
    """`1234567` -> `1.18 MiB`."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"


def percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def ms(value: float) -> str:
    return f"{value:.1f}"
