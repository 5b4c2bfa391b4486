"""A progress bar on a terminal, silence anywhere else."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(total: int, title: str) -> Iterator[Callable[[str], None]]:
    """Yields `advance(what)`, called as each of `total` steps begins."""
    if not sys.stderr.isatty():
        yield lambda what: None
        return
    try:
        from rich import console  # noqa: PLC0415  (the bench extra's)
        from rich import progress as bars  # noqa: PLC0415
    except ImportError:
        yield lambda what: print(f"{title}: {what}", file=sys.stderr)
        return
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
    )
    with bars.Progress(*columns, console=console.Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        started = 0

        def advance(what: str) -> None:
            nonlocal started
            bar.update(task, completed=started, description=f"{title}: {what}")
            started += 1

        yield advance
