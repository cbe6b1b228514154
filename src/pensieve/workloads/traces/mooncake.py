"""Requests with the hashes of their prompts' blocks, as Mooncake published them. Knows that form; never
conversations' names: there are none.

A line is `{"timestamp": ms, "input_length", "output_length", "hash_ids": [...]}`; a hash stands for 512
tokens and all before them (Qin et al., FAST '25; github.com/kvcache-ai/Mooncake). Who said what is not told.
A request goes on with the conversation whose latest prompt it begins with, if it is long enough to hold the
answer too; what else it shares with others, a system prompt or an attempt that was given up, becomes what its
conversation begins with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pensieve.errors import ConfigError
from pensieve.workloads.scripts import Piece, Script, ScriptTurn
from pensieve.workloads.traces.prefixes import Tree, shared_beginnings
from pensieve.workloads.traces.reading import TraceFile, check_fields, count, number

BLOCK = 512  # tokens
_FIELDS = frozenset({"timestamp", "input_length", "output_length", "hash_ids"})


@dataclass(frozen=True, slots=True)
class _Request:
    line: int
    arrival_s: float
    input_tokens: int
    output_tokens: int
    blocks: list[int | str]  # the whole ones


def is_mooncake(entry: object) -> bool:
    """Whether a first entry is of this form."""
    return isinstance(entry, dict) and ("hash_ids" in entry or "input_length" in entry)


def read_mooncake(file: TraceFile) -> tuple[Script, ...]:
    """Every request of a file, in conversations."""
    requests: list[_Request] = []
    before_s = 0.0
    for line, record in file.objects():
        request = _request(record, line, file.where(line))
        if request.arrival_s < before_s:
            raise ConfigError(
                f'{file.where(line)}: "timestamp" must not go back: it is {1e3 * request.arrival_s:g} ms '
                f"after {1e3 * before_s:g} ms; "
                "sort the file by it"
            )
        before_s = request.arrival_s
        requests.append(request)
    conversations = _chained(requests)
    # (a message has a token of its own)
    firsts = [
        [(block, BLOCK) for block in one[0].blocks[: (one[0].input_tokens - 1) // BLOCK]]
        for one in conversations
    ]
    return tuple(
        _script(conversation, tuple(Piece(*stretch) for stretch in stretches), file)
        for conversation, stretches in zip(conversations, shared_beginnings(firsts), strict=True)
    )


def _request(record: Mapping[str, object], line: int, where: str) -> _Request:
    check_fields(record, _FIELDS, where)
    arrival_s = number(record.get("timestamp"), f'{where}: "timestamp"', "milliseconds") / 1e3
    tokens = count(record.get("input_length"), f'{where}: "input_length"')
    output = max(1, count(record.get("output_length"), f'{where}: "output_length"', least=0))  # (0: cut off)
    hashes = record.get("hash_ids")
    if not isinstance(hashes, list) or any(
        isinstance(one, bool) or not isinstance(one, str | int) for one in hashes
    ):
        raise ConfigError(f'{where}: "hash_ids" must be a list of whole numbers or texts, got {hashes!r:.40}')
    if len(hashes) != (due := -(-tokens // BLOCK)):
        raise ConfigError(
            f'{where}: "hash_ids" must have a hash for each {BLOCK} tokens of "input_length", {due} for '
            f"{tokens}, got {len(hashes)}"
        )
    return _Request(line, arrival_s, tokens, output, hashes[: tokens // BLOCK])


def _chained(requests: Sequence[_Request]) -> list[list[_Request]]:
    """Which requests are turns of one conversation."""
    tree = Tree()
    conversations: list[list[_Request]] = []
    users: dict[int, int | None] = {}  # of a node, the conversation that alone has been there; None: several
    ends: dict[int, list[int]] = {}  # by the last node of their latest prompt, the conversations
    for request in requests:
        path = tree.path(request.blocks)
        end = next((node for node in reversed(path) if node in ends), None)
        which: int | None = None
        if (
            end is not None and users[end] is not None
        ):  # (of several with the same beginning, none can be told)
            last = conversations[ends[end][-1]][-1]
            if last.input_tokens + last.output_tokens < request.input_tokens:
                which = ends[end].pop()
                if not ends[end]:
                    del ends[end]
        if which is None:
            which = len(conversations)
            conversations.append([])
        conversations[which].append(request)
        for node in path:
            users[node] = which if users.get(node, which) == which else None
        if path:
            ends.setdefault(path[-1], []).append(which)
    return conversations


def _script(conversation: Sequence[_Request], prefix: tuple[Piece, ...], file: TraceFile) -> Script:
    turns = []
    history = sum(piece.tokens for piece in prefix)
    for request in conversation:
        turns.append(
            ScriptTurn(request.input_tokens - history, request.output_tokens, due_s=request.arrival_s)
        )
        history = request.input_tokens + request.output_tokens
    line = conversation[0].line
    return Script(f"line-{line}", tuple(turns), prefix=prefix, where=file.where(line))
