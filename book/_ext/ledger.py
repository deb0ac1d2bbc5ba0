"""The formula ledger as a command: `python book/_ext/ledger.py [LABEL ...]`.

The package `ledger` beside this file, which Python prefers to it, does the work.
"""

from ledger import main

if __name__ == "__main__":
    raise SystemExit(main())
