"""The one progress bar."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from imsvd_core.distributed import world
from imsvd_core.system.watchdog import moved


@contextmanager
def bar(
    description: str, total: int | None, progress: bool, done: int = 0
) -> Iterator[Callable[..., None]]:
    """A progress bar on rank 0, if `progress`; the function that it yields advances it by a count,
    and may give it another description.

    `total` is None where nobody knows how much there is to do.
    """
    display = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        disable=not (progress and world()[0] == 0),
    )
    with display:
        task = display.add_task(description, total=total, completed=done)

        def advance(count: int, text: str | None = None) -> None:
            moved()
            display.update(task, advance=count, description=text)

        yield advance
