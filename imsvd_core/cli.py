"""The command line, `imsvd`: which command there is, and how its end is told.

The commands are in `imsvd_core.commands`; each is imported when it is called, and no other.
"""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from imsvd_core.commands.words import COMMANDS, look_over
from imsvd_core.system import signals
from imsvd_core.system.faults import REMEDIES, Fault


def run(argv: Sequence[str]) -> None:
    """Do one command. Exits with 2 and one line for anything that the user can mend; raises
    `signals.Stopped` where a notice ended it before its end, with all that it had done saved."""
    with _told_in_one_line(argv):
        module = import_module(f"imsvd_core.commands.{COMMANDS[argv[0]]}")
        getattr(module, argv[0])(argv[1:])


@contextmanager
def _told_in_one_line(argv: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, Fault) as error:
        words = str(error)
        if isinstance(error, OSError):
            remedy = REMEDIES.get(error.errno or 0)
            if not (remedy or isinstance(error, FileNotFoundError | FileExistsError)):
                raise
            words = f"{words}: {remedy}" if remedy else words
        if _first_to_say(words):
            command = argv[0] if argv and argv[0] in COMMANDS else ""
            print(f"imsvd {command}".strip() + f": {words}", file=sys.stderr)
        raise SystemExit(2) from None


def _first_to_say(message: str) -> bool:
    if "torch" not in sys.modules:  # and so no ranks have met
        return (os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0") == "0"
    from imsvd_core.system.ranks import first_to_say

    return first_to_say(message)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: `run`, and exit with 143 where a signal stopped it."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with _told_in_one_line(argv):
        look_over(argv)
    try:
        run(argv)
    except signals.Stopped as stopped:
        from imsvd_core.distributed import world

        # The launcher, which keeps the count of who has said what, may be gone.
        if world()[0] == 0:
            print(f"imsvd {argv[0]}: {stopped}", file=sys.stderr)
        raise SystemExit(signals.STOPPED) from None


if __name__ == "__main__":
    main()
