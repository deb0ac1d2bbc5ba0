"""Run a command for which SIGUSR2 and SIGTERM wait until it handles them, while it still imports:
see `imsvd_core.system.signals.handle_stop_signals`.

python -IS shield.py COMMAND ...
"""

import os
import signal
import sys

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGTERM})
    os.execv(sys.argv[1], sys.argv[1:])
