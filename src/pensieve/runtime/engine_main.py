"""The main function of an engine's own process. Knows models and engines; never tokenizers or stores."""

from __future__ import annotations

import gc
import os
import time
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from pensieve.engine.child import Emit, Say, ServedEngine, serve_engine
from pensieve.engine.wire import EngineInfo
from pensieve.runtime.loading import load_model
from pensieve.runtime.local import start_engine
from pensieve.runtime.options import Options

if TYPE_CHECKING:
    from pensieve.worker.group import Group

# in a row. One request whose forward always fails is given up after two (see `Scheduler`)
MAX_FAILED_STEPS = 8


def run(connection: Connection, options: Options, must_talk: bool = True, retain: bool = True) -> None:
    """Load a model and serve it on `connection` until it is closed: the `main` of an `EngineProcess`.

    Args:
        connection: the pipe to the parent.
        options: what a user chose.
        must_talk: random weights will not do.
        retain: False is the stateless baseline.
    """
    started_s = time.monotonic()
    groups: list[Group] = []

    def build(emit: Emit, say: Say) -> tuple[ServedEngine, EngineInfo]:
        loaded = load_model(options, must_talk=must_talk, say=say, with_text=False)
        groups.extend([] if loaded.group is None else [loaded.group])
        say("allocating the cache")
        started = start_engine(options, loaded, emit=emit, retain=retain, max_failed_steps=MAX_FAILED_STEPS)
        gc.collect()
        gc.freeze()  # libraries and model stay: the collector need not look at them again and again
        resolved = loaded.resolved
        return started.engine, EngineInfo(
            pid=os.getpid(),
            model=resolved.label,
            weights=resolved.weights,
            num_parameters=resolved.num_parameters,
            dtype=loaded.dtype,
            device=options.device if loaded.group is None else f"{loaded.group.size} x {options.device}",
            vocab_size=loaded.shape.vocab_size,
            max_context=started.sizes.max_context,
            chunk_tokens=options.chunk_tokens,
            chunk_bytes=started.sizes.chunk_bytes,
            tiers=started.sizes.tiers,
            cost_source=started.cost_source,
            attention=started.attention,
            forward=started.forward,
            load_s=time.monotonic() - started_s,
            tokenizer_dir=None if resolved.tokenizer_dir is None else str(resolved.tokenizer_dir),
            note=resolved.note,
            limit=started.sizes.limit,
            instructions=loaded.instructions,
            remarks=loaded.remarks,
        )

    try:
        serve_engine(connection, build)
    finally:
        for group in groups:  # (this process ends without its exit handlers)
            group.dismiss()
