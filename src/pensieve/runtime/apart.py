"""An engine in a process of its own, and its service in this one, which never imports torch. Knows how both are started and ended; never clients."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pensieve.engine.wire import EngineInfo
from pensieve.runtime.loading import load_text, read_chat_template
from pensieve.runtime.options import GB, Options
from pensieve.worker.rank import Rank

if TYPE_CHECKING:
    from pensieve.engine.process import EngineProcess, State
    from pensieve.engine.vitals import Patience
    from pensieve.service import ConversationService
    from pensieve.store import ConversationStore
    from pensieve.text import ChatText
    from pensieve.text.workers import TextWorkers


@dataclass(slots=True)
class ApartRuntime:
    """An engine in a process of its own, and its service here."""

    process: EngineProcess
    service: ConversationService
    info: EngineInfo  # of the first start
    text: ChatText | None  # None: the model does not talk
    workers: TextWorkers | None  # that render and tokenize; None: the service does it itself

    def close(self, timeout_s: float = 30.0) -> None:
        """Stop the engine after the step under way, then the service and who makes its prompts."""
        self.process.close(timeout_s)
        if self.workers is not None:
            self.workers.close()
        self.service.close()


def start_apart(
    options: Options,
    *,
    store: ConversationStore | None,
    ephemeral: ConversationStore | None = None,
    drafts: str | None = None,
    must_talk: bool = True,
    retain: bool = True,
    on_state: Callable[[State], None] | None = None,
    patience: Patience | None = None,
    prompt_timeout_s: float | None = None,
) -> ApartRuntime:
    """Start an engine in a process of its own and wait until it is ready; tokenizer and service are here.

    With `prompt_timeout_s`, processor time a prompt, prompts are made in processes of their own (`text.workers`); None: by the service itself.
    `store`, `ephemeral` and `drafts` are the service's, see `ConversationService`; `on_state` and `patience` are of `EngineProcess`.

    Raises:
        ModelUnavailable, ModelRefused, ConfigError: as `load_model` and `size_tiers`, from the engine's process.
    """
    from pensieve.engine.process import EngineProcess
    from pensieve.engine.vitals import Patience
    from pensieve.runtime import engine_main, text_main
    from pensieve.service import ConversationService
    from pensieve.text.nursery import LOAD_BYTES, new_nursery
    from pensieve.text.worker_process import memory_limited
    from pensieve.text.workers import TextWorkers, memory_for

    template = read_chat_template(options)  # before an engine is started
    nursery = (
        None if prompt_timeout_s is None else new_nursery(text_main.prepare)
    )  # (imports while the engine loads)
    workers: TextWorkers | None = None
    late: list[
        ConversationService
    ] = []  # the engine speaks only when spoken to, and by then its service is there
    process = EngineProcess(
        engine_main.run,
        (options, must_talk, retain),
        emit=lambda events: late[0].handle(events),
        on_state=on_state,
        restart=Rank.from_environment() is None,  # the other ranks of one that died cannot be joined again
        patience=patience or Patience(),
    )
    try:
        import_tokenizers()  # while the engine loads
        info = process.ready()
        process.restart_with(as_started(options, info, retain), must_talk, retain)
        folder = None if info.tokenizer_dir is None or info.weights == "random" else Path(info.tokenizer_dir)
        if nursery is not None and folder is not None:
            nursery.load(
                text_main.Loading(folder, template, info.max_context)
            )  # first: what hangs or fails there is not tried here
        with memory_limited(LOAD_BYTES) if nursery is not None else nullcontext():
            text = load_text(folder, info.weights, template)
            if text is not None:
                text.settle()
        if nursery is not None and text is not None and folder is not None:
            assert prompt_timeout_s is not None
            loading = text_main.Loading(folder, template, info.max_context)
            memory_bytes = memory_for(
                text.most_chars(2 * info.max_context)
            )  # (/tokenize counts two contexts)
            workers = TextWorkers(
                text_main.Nurseries(loading, nursery), job_s=prompt_timeout_s, memory_bytes=memory_bytes
            )
        elif nursery is not None:
            nursery.close()
    except BaseException:
        process.close(0.0)
        if nursery is not None:
            nursery.close()
        raise
    service = ConversationService(
        text, store, max_context=info.max_context, overflow=options.overflow, ephemeral=ephemeral, drafts=drafts, limit=info.limit,
        runner=workers,
    )  # fmt: skip
    late.append(service)
    service.connect(process.post)
    return ApartRuntime(process, service, info, text, workers)


def as_started(options: Options, info: EngineInfo, retain: bool) -> Options:
    """Options with which an engine comes out as the one of `info`: what it measured, of this CPU and of memory, might come out otherwise later."""
    options = replace(options, dtype=info.dtype)
    if options.gpu_cache_gb is None:
        most = (info.tiers[0].num_slots + 1) * info.chunk_bytes - 1  # the most bytes that are so many chunks
        if not retain and not options.is_on_gpu:  # the one tier has the second's bytes, too
            most -= int(options.second_tier_gb * GB)
            options = replace(options, max_context=info.max_context)
        options = replace(options, gpu_cache_gb=most / GB)
    return options


def do_without_torch() -> None:
    """Make this process one that never imports torch, once and for all: transformers then loads tokenizers without it.

    For the process in front of an engine that has its own: torch would take 2 s of its start and 260 MB. Does nothing where torch is already.
    """
    if "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]  # Python's own way to say that there is no such module
        before = os.environ.get("TRANSFORMERS_NO_ADVISORY_WARNINGS")
        os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # it would advise that models are not available
        try:
            import transformers  # noqa: F401
        finally:
            del os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"]
            if before is not None:
                os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = before


def import_tokenizers() -> None:
    """Import what loading a tokenizer takes: about a second that can pass while an engine loads."""
    import transformers

    _ = transformers.AutoTokenizer
