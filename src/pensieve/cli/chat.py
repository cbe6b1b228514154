"""`pensieve chat`: a streaming chat in the terminal, with a receipt after every turn.

Knows a terminal and a service; never tokens.
"""

from __future__ import annotations

import contextlib
import sys
from concurrent.futures import TimeoutError as NotYet
from typing import Any

import click

from pensieve.cli.options import cache_options, model_options, pick, template_options
from pensieve.core.request import SamplingParams
from pensieve.engine.messages import Stats
from pensieve.errors import ConversationNotFound, PensieveError
from pensieve.message import Message
from pensieve.runtime.follower import follow_unless_first
from pensieve.runtime.loading import load_model, notes_of
from pensieve.runtime.local import Runtime, start
from pensieve.runtime.options import GB
from pensieve.service import DEFAULT_NAMESPACE
from pensieve.store import ConversationStore, default_path, open_store, path_messages, sqlite_path

HELP = "Commands: /cache (what is where), /history, /new, /quit. Ctrl-C ends an answer, Ctrl-D the chat."


@click.command()
@click.option(
    "--conversation",
    "conversation_id",
    default=None,
    help="Go on with (or begin) the conversation of this id; it is kept on disk.",
)
@click.option("--system", default=None, help="System prompt of a new conversation.")
@click.option(
    "--store",
    "store_url",
    envvar="PENSIEVE_STORE",
    default=None,
    help="Where conversations are kept, as for `serve`: a file's path, sqlite:///FILE or postgresql://… "
    "(default: a file in your data directory; :memory: keeps none).",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True)
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--seed", type=int, default=None)
@click.option("--stateless", is_flag=True, help="Keep nothing between turns: the baseline.")
@template_options
@model_options
@cache_options
def chat(
    conversation_id: str | None,
    system: str | None,
    store_url: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    stateless: bool,
    **shared: Any,
) -> None:
    """Chat in the terminal. Every turn ends with where its tokens came from and what it cost."""
    sampling = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    run_chat(shared, conversation_id, system, store_url, sampling, retain=not stateless)


def run_chat(
    shared: dict[str, Any],
    conversation_id: str | None,
    system: str | None,
    store_url: str | None,
    sampling: SamplingParams,
    *,
    retain: bool,
) -> None:
    """The chat behind `pensieve chat` and `main.py --interactive`.

    Raises:
        ModelUnavailable: the model's weights cannot be had from here: a chat needs real ones.
        ConfigError, StoreError: the store's URL is none, or it cannot be opened.
    """
    options = pick(shared)
    follow_unless_first(options)
    url = str(default_path()) if store_url is None else store_url
    sqlite_path(url)  # a wrong one should not cost the loading of a model
    loaded = load_model(options, must_talk=True, say=_say)
    store = open_store(url)
    runtime = start(options, loaded, store=store, retain=retain)
    try:
        tiers = ", ".join(f"{tier.name} {tier.num_slots} chunks" for tier in runtime.sizes.tiers)
        mode = "stateful" if retain else "stateless (Pensieve's engine, nothing kept between turns)"
        computing = f" ({loaded.instructions})" if loaded.instructions else ""
        click.secho(
            f"{loaded.resolved.label}, {loaded.dtype} on {options.device}{computing}; {mode}; {tiers}; "
            f"context {runtime.sizes.max_context} tokens",
            fg="cyan",
        )
        for note in notes_of(loaded.resolved.note, loaded.text.note if loaded.text is not None else None):
            click.secho(f"note: {note}", fg="yellow", err=True)
        click.secho(HELP, dim=True)
        _Chat(runtime, store, sampling, system).talk(conversation_id)
    finally:
        runtime.close()
        store.close()


class _Chat:
    """One terminal."""

    def __init__(
        self, runtime: Runtime, store: ConversationStore, sampling: SamplingParams, system: str | None
    ) -> None:
        self.runtime, self.store, self.sampling, self.system = runtime, store, sampling, system

    def talk(self, conversation_id: str | None) -> None:
        """Read, answer, repeat."""
        conversation_id, is_new = self._open(conversation_id)
        while True:
            try:
                line = input("\nyou> ").strip()
            except (EOFError, KeyboardInterrupt):
                click.echo()
                break
            if not line:
                continue
            if line in ("/quit", "/exit"):
                break
            if line == "/new":
                conversation_id, is_new = self._open(None)
            elif line == "/history":
                self._history(conversation_id)
            elif line == "/cache":
                self._cache()
            elif line.startswith("/"):
                click.echo(HELP)
            else:
                is_new = not self._turn(conversation_id, line, is_new) and is_new
        click.secho(f"go on with: pensieve chat --conversation {conversation_id}", dim=True)

    def _open(self, conversation_id: str | None) -> tuple[str, bool]:
        try:
            if conversation_id is None:
                raise ConversationNotFound("a new one")
            leaf = self.store.get(DEFAULT_NAMESPACE, conversation_id).leaf
            turns = len(self.store.path(DEFAULT_NAMESPACE, leaf))
            click.secho(f"conversation {conversation_id}, {turns} turns so far", fg="cyan")
            return conversation_id, turns == 0
        except ConversationNotFound:
            conversation = self.store.create(DEFAULT_NAMESPACE, conversation_id)
            click.secho(f"conversation {conversation.id}, new", fg="cyan")
            return conversation.id, True

    def _cache(self) -> None:
        stats = self.runtime.service.engine.stats().result()
        assert isinstance(stats, Stats)
        for tier in stats.tiers:
            click.echo(
                f"{tier.name}: {tier.used} of {tier.num_slots} chunks used, "
                f"{tier.reclaimable} of them reclaimable at no cost"
            )
        click.echo(
            f"since the start: gpu {stats.gpu_tokens}, cpu {stats.cpu_tokens}, "
            f"recomputed {stats.recomputed_tokens}, new {stats.new_tokens}, out {stats.output_tokens} "
            f"tokens; {_bytes(stats.bytes_in)} swapped in, {_bytes(stats.bytes_out)} out; "
            f"{stats.chunks_dropped} chunks dropped, {stats.suspensions} suspensions, {stats.steps} steps"
        )

    def _history(self, conversation_id: str) -> None:
        leaf = self.store.get(DEFAULT_NAMESPACE, conversation_id).leaf
        for message in path_messages(self.store.path(DEFAULT_NAMESPACE, leaf)):
            click.echo(click.style(f"{message.role}: ", bold=True) + message.content)

    def _turn(self, conversation_id: str, line: str, is_new: bool) -> bool:
        """One turn; False if it was not kept."""
        messages = [Message("user", line)]
        if is_new and self.system:
            messages.insert(0, Message("system", self.system))
        turn = self.runtime.service.send(conversation_id, messages, self.sampling, on_text=_stream)
        while True:
            try:
                done = turn.future.result(timeout=0.2)  # (a wait without a timeout would not see Ctrl-C)
                break
            except NotYet:
                continue
            except KeyboardInterrupt:
                with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C is no reason to leave the chat
                    self.runtime.service.abort(turn)
            except PensieveError as error:
                click.secho(f"\n{error.code}: {error.message}", fg="red", err=True)
                return False
        click.echo()
        if done.warning:
            click.secho(f"note: {done.warning}", fg="yellow")
        if done.turn_id is None:
            click.secho("no token was answered yet: this turn was not kept", fg="yellow")
        click.secho(f"[{done.receipt} | ended by {done.reason.value}]", dim=True)
        return done.turn_id is not None


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count < GB else f"{count / GB:.2f} GB"


def _stream(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _say(message: str) -> None:
    click.secho(message, dim=True, err=True)
