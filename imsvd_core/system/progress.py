"""The one progress bar."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from imsvd_core.distributed import world


@contextmanager
def bar(what: str, total: int, progress: bool, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A progress bar on rank 0, named `what`: what the block is given moves it on."""
    shown = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        disable=not (progress and world()[0] == 0),
    )
    with shown:
        task = shown.add_task(what, total=total, completed=done)
        yield lambda count: shown.advance(task, count)
