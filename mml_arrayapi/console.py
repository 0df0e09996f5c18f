"""What commands print when something fails."""

from __future__ import annotations

import os
import sys


def complain(message: str) -> None:
    """Print a message for the user, if it can be; the exit code tells that something failed."""
    try:
        print(message, file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (Python would try again at its end)
