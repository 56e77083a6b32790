"""What the commands share: errors with an exit code, stages on stderr, quiet libraries, JSON on stdout."""

import io
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

INTERRUPTED = 130


class CommandError(Exception):
    """A command cannot go on; the message is one sentence for the user."""

    exit_code = 1


class InputError(CommandError):
    """What the user asked for is wrong."""

    exit_code = 2


def say(sentence: str) -> None:
    """One line on stderr."""
    print(f"kvquant: {' '.join(sentence.split())}", file=sys.stderr)


def print_json(data: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(data, indent=2))


def print_table(table: Any) -> None:
    """Title, lines and notes, as wide as the terminal; wider where columns would lose their numbers."""
    console = Console()
    console.print(f"{table.title}\n", highlight=False)
    gap = 1 if console.width >= 90 else 0  # between columns, beside the one that is always there
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap, 0, 0))
    for i, heading in enumerate(table.headings):
        shown.add_column(heading, justify="left" if i < table.words else "right", no_wrap=i > 0, overflow="fold")
    for line in table.lines:
        shown.add_row(*line)
    whole = Measurement.get(console, console.options.update(max_width=1000), shown).maximum
    Console(width=max(console.width, whole)).print(shown)
    console.print()
    for note in table.notes:
        console.print(f"- {note}", highlight=False, markup=False)


@contextmanager
def stage(text: str, *, hidden: bool = False) -> Iterator[None]:
    """Show what is being done: a spinner on a terminal, a line where stderr is a file or a pipe.

    Args:
        text: what is being done.
        hidden: show nothing unless stderr is a terminal.
    """
    console = Console(file=sys.stderr)  # the one of now: what runs inside may be made to write elsewhere
    if console.is_terminal:
        with console.status(text):
            yield
        return
    if not hidden:
        print(f"{text} ...", file=sys.stderr, flush=True)
    yield


@contextmanager
def progress(what: str, total: int, *, hidden: bool = False) -> Iterator[Callable[[str], None]]:
    """A bar on stderr, a line where that is no terminal.

    Args:
        what: what is being done.
        total: steps.
        hidden: show nothing unless stderr is a terminal.

    Yields:
        What is to be called after each step, with what is being done in it.
    """
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    if not console.is_terminal and not hidden:
        print(f"{what} ...", file=sys.stderr, flush=True)
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        refresh_per_second=2,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(what, total=total)
        yield lambda now: bar.update(task, advance=1, description=now)


@contextmanager
def advancing(hidden: bool) -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal; a line for each new thing where stderr is a file, unless ``hidden``."""
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    # Two frames a second: what draws must not cost what is timed.
    with Progress(
        *columns, console=console, transient=True, refresh_per_second=2, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("loading", total=1.0)

        def advance(what: str, share: float) -> None:
            progress.update(task, advance=share, description=what or None)
            if what and ": round " not in what and not console.is_terminal and not hidden:
                print(f"{what} ...", file=sys.stderr, flush=True)

        yield advance


@contextmanager
def hushed() -> Iterator[None]:
    """Drop what libraries warn of and draw on stderr while they load something; errors are exceptions."""
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextmanager
def downloading() -> Iterator[None]:
    """Bring the libraries' progress bars back: a download may be long."""
    from transformers.utils import logging as chatter

    chatter.enable_progress_bar()
    try:
        yield
    finally:
        chatter.disable_progress_bar()


@contextmanager
def quiet() -> Iterator[None]:
    """Errors only from transformers and the hub, no progress bars of theirs; our own warnings as one plain line."""
    from transformers.utils import logging as chatter

    from ..errors import KVQuantFallbackWarning

    hub = logging.getLogger("huggingface_hub")
    before = (chatter.get_verbosity(), hub.level, chatter.is_progress_bar_enabled())
    chatter.set_verbosity_error()
    hub.setLevel(logging.ERROR)
    chatter.disable_progress_bar()
    show = warnings.showwarning

    def showwarning(message: Any, category: Any, *args: Any, **kwargs: Any) -> None:
        if issubclass(category, KVQuantFallbackWarning):
            say(str(message))
        else:
            show(message, category, *args, **kwargs)

    with warnings.catch_warnings():
        warnings.showwarning = showwarning
        try:
            yield
        finally:
            chatter.set_verbosity(before[0])
            hub.setLevel(before[1])
            if before[2]:
                chatter.enable_progress_bar()
