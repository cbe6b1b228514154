"""An engine in a process of its own, and its service in this one, which never imports torch.

Knows how both are started and ended; never clients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pensieve.engine.wire import EngineInfo
from pensieve.runtime.loading import load_text, read_chat_template
from pensieve.runtime.options import GB, Options
from pensieve.runtime.torchless import import_tokenizers
from pensieve.worker.rank import Rank

if TYPE_CHECKING:
    from pensieve.engine.messages import Event
    from pensieve.engine.process import EngineProcess, State
    from pensieve.engine.vitals import Patience
    from pensieve.service import ConversationService
    from pensieve.store import ConversationStore
    from pensieve.text import ChatText
    from pensieve.text.nursery import Nursery
    from pensieve.text.workers import TextWorkers


@dataclass(slots=True)
class ApartRuntime:
    """An engine in a process of its own, and its service here."""

    process: EngineProcess
    service: ConversationService
    info: EngineInfo  # of the first start
    text: ChatText | None  # None if the model has no tokenizer, or random weights
    workers: TextWorkers | None  # processes that make prompts; None if the service makes them

    def close(self, timeout_s: float = 30.0) -> None:
        """Stop the engine after the step under way, then the prompt processes and the service."""
        self.process.close(timeout_s)
        if self.workers is not None:
            self.workers.close()
        self.service.close()


class _Relay:
    """Passes an engine's events to its service, which is made once the engine is ready.

    An engine emits nothing before the first command, and only the service sends commands.
    """

    def __init__(self) -> None:
        self.service: ConversationService | None = None

    def __call__(self, events: list[Event]) -> None:
        assert self.service is not None, "an engine spoke before it was asked"
        self.service.handle(events)


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

    Args:
        options: the model and how it is computed.
        store, ephemeral, drafts: of `ConversationService`.
        must_talk: a model with random weights is refused.
        retain: False for the stateless baseline.
        on_state, patience: of `EngineProcess`.
        prompt_timeout_s: seconds of processor time that a prompt may take in a process for prompts
            (`text.workers`). None if the service makes prompts itself, without a limit.

    Raises:
        ModelUnavailable, ModelRefused, ConfigError: as `load_model` and `size_tiers`.
    """
    from pensieve.engine.process import EngineProcess
    from pensieve.engine.vitals import Patience
    from pensieve.runtime import engine_main, text_main
    from pensieve.service import ConversationService
    from pensieve.text.nursery import new_nursery

    template = read_chat_template(options)  # before an engine is started
    # it imports what tokenizers need while the engine loads
    nursery = None if prompt_timeout_s is None else new_nursery(text_main.prepare)
    relay = _Relay()
    process = EngineProcess(
        engine_main.run,
        (options, must_talk, retain),
        emit=relay,
        on_state=on_state,
        restart=Rank.from_environment() is None,  # the other ranks of one that died cannot be joined again
        patience=patience or Patience(),
    )
    try:
        import_tokenizers()
        info = process.ready()
        process.restart_with(as_started(options, info, retain), must_talk, retain)
        text, workers = _load_text(info, template, nursery, prompt_timeout_s)
    except BaseException:
        process.close(0.0)
        if nursery is not None:
            nursery.close()
        raise
    relay.service = service = ConversationService(
        text,
        store,
        max_context=info.max_context,
        overflow=options.overflow,
        ephemeral=ephemeral,
        drafts=drafts,
        limit=info.limit,
        runner=workers,
    )
    service.connect(process.post)
    return ApartRuntime(process, service, info, text, workers)


def _load_text(
    info: EngineInfo, template: str | None, nursery: Nursery | None, prompt_timeout_s: float | None
) -> tuple[ChatText | None, TextWorkers | None]:
    """The model's tokenizer and template, here and in the processes that make prompts; None where absent.

    The nursery loads first: files that make loading hang or fail do so there, and are not tried here.
    """
    from pensieve.runtime import text_main
    from pensieve.text.nursery import LOAD_BYTES
    from pensieve.text.worker_process import memory_limited
    from pensieve.text.workers import TextWorkers, memory_for

    folder = None if info.tokenizer_dir is None or info.weights == "random" else Path(info.tokenizer_dir)
    if nursery is None or folder is None:
        if nursery is not None:
            nursery.close()
        text = load_text(folder, info.weights, template)
        if text is not None:
            text.settle()
        return text, None
    assert prompt_timeout_s is not None
    loading = text_main.Loading(folder, template, info.max_context)
    nursery.load(loading)
    with memory_limited(LOAD_BYTES):
        text = load_text(folder, info.weights, template)
        assert text is not None
        text.settle()
    memory_bytes = memory_for(text.most_chars(2 * info.max_context))  # (/tokenize counts two contexts)
    nurseries = text_main.Nurseries(loading, nursery)
    return text, TextWorkers(nurseries, job_s=prompt_timeout_s, memory_bytes=memory_bytes)


def as_started(options: Options, info: EngineInfo, retain: bool) -> Options:
    """Options that start the same engine again, with what the first start measured written out.

    Number type and cache size follow from measurements of the CPU and of free memory, which may differ later.
    """
    options = replace(options, dtype=info.dtype)
    if options.gpu_cache_gb is None:
        most = (info.tiers[0].num_slots + 1) * info.chunk_bytes - 1  # the most bytes that are so many chunks
        if not retain and not options.is_on_gpu:  # the one tier has the second's bytes, too
            most -= int(options.second_tier_gb * GB)
            options = replace(options, max_context=info.max_context)
        options = replace(options, gpu_cache_gb=most / GB)
    return options
