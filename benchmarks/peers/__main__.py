"""`python benchmarks/peers`: see `cli`."""

import signal
import sys
from pathlib import Path

if (
    not __package__
):  # Python puts this very folder on its path, whose modules are meant to be found in their package only
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from peers.cli import main

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no server is left behind
    sys.exit(main())
