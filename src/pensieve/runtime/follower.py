"""What a process above rank 0 does instead of its command: it loads its share of the model and follows. Chooses, wires; says nothing.

Rank 0 reports whatever there is to report, failures of other ranks too. A follower speaks only when rank 0 is gone without a word.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn

from pensieve.errors import PensieveError, WorkerLost
from pensieve.runtime.loading import load_model
from pensieve.runtime.options import Options
from pensieve.worker.rank import Rank


def follow_unless_first(options: Options) -> Rank | None:
    """Asked by every command that loads a model, before it does anything else: a rank above 0 follows rank 0, and this does not return.

    Returns:
        Rank 0 of several processes; None for a process that is alone.
    """
    rank = Rank.from_environment()
    if rank is not None and rank.index > 0:
        _follow(options, rank)
    return rank


def _follow(options: Options, rank: Rank) -> NoReturn:
    """Compute what rank 0 says until it ends, then exit: 0, or 1 where it ended without a word."""
    from pensieve.worker.parallel import follow

    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # they reach rank 0 as well: whether to drain, and for how long, is its decision
        signal.signal(number, signal.SIG_IGN)
    code = 0
    try:
        loaded = load_model(options, must_talk=False, say=lambda message: None, with_text=False)
        assert loaded.group is not None
        follow(loaded.group, loaded.model)
    except WorkerLost as error:
        print(f"pensieve: rank {rank.index} of {rank.size} ends: {error.message}", file=sys.stderr)
        code = 1
    except PensieveError:
        pass  # rank 0 says it, and its exit status is the one that counts
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(
        code
    )  # nothing is left to close, and libraries that take themselves apart would only keep rank 0's starter waiting
