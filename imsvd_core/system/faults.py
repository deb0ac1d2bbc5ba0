"""What ends a command with one line in place of a trace."""


class Fault(RuntimeError):
    """What the user can mend; the message says how."""
