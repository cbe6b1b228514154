"""What users say: conversations from files and the shipped ones. Knows text; never a model's tokens, a
template or time.

Only the users' side is read, and how long the answers were: the model under test gives its own.
"""

from __future__ import annotations

import importlib.resources
import json
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pensieve.errors import ConfigError

SHIPPED = "conversations.jsonl"
FORMATS = 'a JSON list or one JSON object a line, each with "turns": [texts], "messages": [{"role", "content"}] or "conversations": [{"from", "value"}]'

_USER = {"user", "human", "prompter"}
_MODEL = {"assistant", "gpt", "chatgpt", "bing", "bard", "model"}
_ANSWER = _MODEL | {"tool", "function", "observation", "function_call"}
_SYSTEM = {"system", "developer"}


@dataclass(frozen=True, slots=True)
class Conversation:
    """What one user says, turn by turn."""

    id: str  # unique within one dataset
    system: str | None  # the system prompt, if there is one
    turns: tuple[str, ...]  # the user's texts, none of them blank
    answer_tokens: tuple[int | None, ...] = field(
        default=(), compare=False
    )  # of the recorded answer to each turn, about; None: there is none


@dataclass(frozen=True, slots=True)
class Selection:
    """Conversations picked for one experiment."""

    conversations: tuple[Conversation, ...]
    note: str | None  # what a reader of the results must know of the picking; None = nothing


def load_dataset(path: str | Path | None = None) -> list[Conversation]:
    """Read conversations from a file, or the shipped ones when `path` is None.

    A file is one JSON list or has one JSON object a line; an object is in any of these forms:

    - ours: `{"id", "system"?, "turns": ["text", ...]}`, the system prompt and the id being optional,
    - MT-Bench questions: `{"question_id", "turns"}`,
    - chat messages: `{"id"?, "messages": [{"role", "content"}]}`,
    - ShareGPT: `{"id"?, "conversations": [{"from": "human" | "gpt" | "system", "value"}]}`.

    Recorded chats (the last two) may hold blank messages and conversations without a user: these are left
    out. An id that is missing is made from the position; one that comes again gets `#2`, `#3`, ...

    Raises:
        ConfigError: the file cannot be read or an entry has none of these forms; the message names file, line
            or index, what is wrong and what is allowed.
    """
    if path is None:
        data = importlib.resources.files("pensieve.workloads").joinpath("data", SHIPPED).read_bytes()
        name = f"{SHIPPED} (shipped)"
    else:
        name = str(path)
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(
                f"cannot read the conversation file {name}: {error.strerror or error}; without one the shipped conversations are used"
            ) from error
    found: list[Conversation] = []
    seen: Counter[str] = Counter()
    for where, record in _records(data, name):
        conversation = _parse(record, where)
        if not conversation.turns:
            continue
        seen[conversation.id] += 1
        if (count := seen[conversation.id]) > 1:
            conversation = replace(conversation, id=_fresh_id(conversation.id, count, seen))
        found.append(conversation)
    if not found:
        raise ConfigError(f"{name} holds no conversation with a user's turn; it must be {FORMATS}")
    return found


def select(
    conversations: Sequence[Conversation], num: int, min_turns: int = 1, max_turns: int | None = None
) -> Selection:
    """The first `num` conversations of at least `min_turns` turns, each cut after `max_turns` (None: not
    cut).

    When there are fewer, they are taken again from the first on, under new ids, and the note says so.

    Raises:
        ConfigError: a number is out of range, or no conversation is long enough.
    """
    if num < 1:
        raise ConfigError(f"the number of conversations must be at least 1, got {num}")
    if min_turns < 1:
        raise ConfigError(f"min_turns must be at least 1, got {min_turns}")
    if max_turns is not None and max_turns < min_turns:
        raise ConfigError(f"max_turns must be at least min_turns ({min_turns}), got {max_turns}")
    fit = [c for c in conversations if len(c.turns) >= min_turns]
    if not fit:
        longest = max((len(c.turns) for c in conversations), default=0)
        raise ConfigError(
            f"no conversation has {min_turns} turns (the longest of {len(conversations)} has {longest}): lower min_turns"
        )
    used = {c.id for c in fit}
    picked = []
    for index in range(num):
        source, copy = fit[index % len(fit)], index // len(fit)
        identity = source.id
        if copy:
            identity = f"{source.id}~{copy + 1}"
            while identity in used:
                identity += "~"
            used.add(identity)
        picked.append(
            replace(
                source,
                id=identity,
                turns=source.turns[:max_turns],
                answer_tokens=source.answer_tokens[:max_turns],
            )
        )
    note = None
    if num > len(fit):
        which = f"{len(fit)} conversations" if len(fit) > 1 else "1 conversation"
        note = (
            f"{num} conversations were asked for and the dataset has {which} of at least {min_turns} turn(s): {num - len(fit)} are repeats "
            "under new ids. Repeats begin with the same words, so a cache that shares prefixes finds more than with distinct users"
        )
    return Selection(tuple(picked), note)


def text_length_tokens(text: str) -> int:
    """About how many tokens a text is, at least 1: four UTF-8 bytes a token, the usual ratio of English text."""
    return max(1, math.ceil(len(text.encode()) / 4))


def random_tokens(length: int, vocab_size: int, seed: int | str) -> tuple[int, ...]:
    """`length` token ids in `[0, vocab_size)`; the same for the same arguments, on every machine.

    Raises:
        ConfigError: the vocabulary is empty or the length negative.
    """
    if vocab_size < 1:
        raise ConfigError(f"a vocabulary must have at least 1 token to draw from, got {vocab_size}")
    if length < 0:
        raise ConfigError(f"cannot draw {length} tokens: the length must be at least 0")
    return tuple(random.Random(f"tokens/{seed}").choices(range(vocab_size), k=length))


def _records(data: bytes, name: str) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Every object of a file with words for where it stands."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{name}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start}): save it as UTF-8"
        ) from error
    if text.lstrip()[:1] == "[":
        listed = _json(text, name, 1)
        assert isinstance(listed, list)
        for index, record in enumerate(listed):
            where = f"{name}, index {index}"
            yield where, _object(record, where)
        return
    for number, row in enumerate(text.split("\n"), start=1):
        if row.strip():
            where = f"{name}, line {number}"
            yield where, _object(_json(row, name, number), where)


def _json(text: str, name: str, first_line: int) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ConfigError(
            f"{name}, line {line}, column {error.colno}: not JSON ({error.msg}); the file must be {FORMATS}"
        ) from error
    except RecursionError as error:
        raise ConfigError(
            f"{name}, line {first_line}: nested too deeply to be a conversation; the file must be {FORMATS}"
        ) from error


def _object(record: object, where: str) -> Mapping[str, object]:
    if not isinstance(record, dict):
        raise ConfigError(
            f"{where}: a conversation must be a JSON object, got {_kind(record)}; the file must be {FORMATS}"
        )
    return record


def _parse(record: Mapping[str, object], where: str) -> Conversation:
    identity = next(
        (record[key] for key in ("id", "question_id", "conversation_id") if record.get(key) is not None), None
    )
    if identity is not None and (isinstance(identity, bool) or not isinstance(identity, str | int)):
        raise ConfigError(f"{where}: the id must be a text or a whole number, got {_kind(identity)}")
    name = (
        _clean(str(identity)) if identity not in (None, "") else where.rpartition(", ")[2].replace(" ", "-")
    )
    system = record.get("system")
    if system is not None and not isinstance(system, str):
        raise ConfigError(f'{where}: "system" must be a text, got {_kind(system)}')
    answers: list[int | None] = []
    if "turns" in record:
        turns = _texts(record["turns"], where)
    elif "messages" in record:
        system, turns, answers = _chat(record["messages"], where, "messages", "role", "content", system)
    elif "conversations" in record:
        system, turns, answers = _chat(
            record["conversations"], where, "conversations", "from", "value", system
        )
    else:
        raise ConfigError(
            f'{where}: none of "turns", "messages" or "conversations" is there; the file must be {FORMATS}'
        )
    return Conversation(
        name, _clean(system) if system and system.strip() else None, tuple(turns), tuple(answers)
    )


def _texts(value: object, where: str) -> list[str]:
    """The turns of our own form: each must be a text with something in it."""
    if not isinstance(value, list) or not value:
        raise ConfigError(f'{where}: "turns" must be a list of at least 1 text, got {_kind(value)}')
    for index, text in enumerate(value):
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"{where}: turn {index} must be a text that is not blank, got {_kind(text)}")
    return [_clean(text) for text in value]


def _chat(
    value: object, where: str, field: str, role_key: str, text_key: str, system: str | None
) -> tuple[str | None, list[str], list[int | None]]:
    """System prompt, user texts and the lengths of their answers in a recorded chat; blank messages are left
    out.
    """
    if not isinstance(value, list):
        raise ConfigError(f'{where}: "{field}" must be a list of messages, got {_kind(value)}')
    turns: list[str] = []
    answers: list[int | None] = []
    for index, message in enumerate(value):
        here = f"{where}: {field}[{index}]"
        if not isinstance(message, dict):
            raise ConfigError(f"{here} must be an object, got {_kind(message)}")
        role = message.get(role_key)
        if not isinstance(role, str) or role.lower() not in _USER | _ANSWER | _SYSTEM:
            known = ", ".join(sorted(_USER | _ANSWER | _SYSTEM))
            raise ConfigError(f'{here}: "{role_key}" must be one of {known}, got {role!r}')
        text = message.get(text_key)
        if role.lower() in _ANSWER:
            if role.lower() in _MODEL and answers and isinstance(text, str) and text.strip():
                answers[-1] = (answers[-1] or 0) + text_length_tokens(_clean(text))
            continue
        if isinstance(text, list):
            text = _joined_parts(text, here, text_key)
        if not isinstance(text, str):
            raise ConfigError(f'{here}: "{text_key}" must be a text, got {_kind(text)}')
        if not text.strip():
            continue
        if role.lower() in _SYSTEM:
            if turns:
                raise ConfigError(
                    f"{here}: a system message must come before the first user message; move or remove it"
                )
            system = text if system is None else f"{system}\n\n{text}"
        else:
            turns.append(_clean(text))
            answers.append(None)
    return system, turns, answers


def _joined_parts(parts: Sequence[object], here: str, text_key: str) -> str:
    """OpenAI's content parts, text only."""
    texts = []
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise ConfigError(
                f'{here}: "{text_key}" has a part that is not text; images and sounds are not supported'
            )
        texts.append(part["text"])
    return "".join(texts)


def _clean(text: str) -> str:
    """Half a surrogate pair (cut emoji in recorded chats) has no UTF-8: it becomes the replacement character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _fresh_id(identity: str, count: int, seen: Counter[str]) -> str:
    while (name := f"{identity}#{count}") in seen:
        count += 1
    seen[name] += 1
    return name


def _kind(value: object) -> str:
    """A value in few words for an error message."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    return f"{value!r:.40}"
