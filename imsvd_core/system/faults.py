"""What ends a command with one line in place of a trace."""

import errno

MAKE_ROOM = "make room there, then run the same command again"
_ELSEWHERE = "give a folder that you may write to"
#: What to do about errors of the system that a user can mend.
REMEDIES = {
    errno.ENOSPC: MAKE_ROOM,
    errno.EDQUOT: MAKE_ROOM,
    errno.EFBIG: MAKE_ROOM,
    errno.EACCES: _ELSEWHERE,
    errno.EROFS: _ELSEWHERE,
}


class Fault(RuntimeError):
    """What the user can mend; the message says how."""


class DiskFull(Fault):
    """A file that did not fit; what was there before it stands."""
