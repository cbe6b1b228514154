"""Processes above rank 0 load their share of a model and compute what rank 0 plans.

Knows ranks; never commands.

Rank 0 reports all failures, those of other ranks too. A follower prints only that rank 0 has disappeared.
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
    """Follow rank 0 and exit, if this is a rank above 0. Every command calls it before it loads a model.

    Returns:
        Rank 0 of several processes; None if the process is alone.
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
        # nothing is left to close, and libraries that take themselves apart would only keep rank 0's starter
        # waiting
    )
