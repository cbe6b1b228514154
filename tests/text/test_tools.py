"""Calls are found wherever the pieces are cut; what is no call stays what it was."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pensieve.errors import InvalidRequest
from pensieve.text import (
    CallBegin,
    CallDelta,
    CallEnd,
    ContentDelta,
    ToolCallParser,
    ToolEvent,
    ToolFormat,
    force_prefix,
    tools_prompt,
)

HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS = (
    ToolFormat.HERMES,
    ToolFormat.LLAMA3,
    ToolFormat.MISTRAL,
    ToolFormat.MISTRAL_ARGS,
)
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {}}}
    for name in ("get_weather", "get", "now")
]


def joined(events: list[ToolEvent]) -> list[tuple[object, ...]]:
    """Events without ids, neighbouring deltas put together."""
    out: list[tuple[object, ...]] = []
    for event in events:
        match event:
            case ContentDelta(text):
                assert text
                out.append(("content", text))
            case CallBegin(index, _, name):
                out.append(("begin", index, name))
            case CallDelta(index, arguments):
                assert arguments
                out.append(("arguments", index, arguments))
            case CallEnd(index):
                out.append(("end", index))
        if len(out) > 1 and out[-1][:-1] == out[-2][:-1] and out[-1][0] in ("content", "arguments"):
            last = out.pop()
            out[-1] = (*out[-1][:-1], str(out[-1][-1]) + str(last[-1]))
    return out


def parse(
    format: ToolFormat, text: str, pieces: int | list[int] = 0, **options: object
) -> list[tuple[object, ...]]:
    parser = ToolCallParser(format, TOOLS, **options)  # type: ignore[arg-type]
    cuts = list(range(0, len(text), pieces)) if isinstance(pieces, int) and pieces else pieces or []
    assert isinstance(cuts, list)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    events: list[ToolEvent] = []
    for start, stop in itertools.pairwise(edges):
        events += parser.feed(text[start:stop])
    return joined(events + parser.finish())


def content(events: list[tuple[object, ...]]) -> str:
    return "".join(str(event[1]) for event in events if event[0] == "content")


def calls(events: list[tuple[object, ...]]) -> list[tuple[str, str]]:
    """Name and arguments of each call; the events of one stand together, in order."""
    found: list[tuple[str, str]] = []
    state = "outside"
    for event in events:
        match event:
            case ("begin", index, name):
                assert state == "outside" and index == len(found)
                found.append((str(name), ""))
                state = "inside"
            case ("arguments", index, text):
                assert state == "inside" and index == len(found) - 1
                found[-1] = (found[-1][0], found[-1][1] + str(text))
            case ("end", index):
                assert state == "inside" and index == len(found) - 1
                state = "outside"
            case _:
                assert state == "outside"
    assert state == "outside"
    return found


CITY = '{"city": "Paris"}'
WEATHER = ("get_weather", CITY)

FOUND = {
    "hermes": (
        HERMES,
        f'<tool_call>\n{{"name": "get_weather", "arguments": {CITY}}}\n</tool_call>',
        [WEATHER],
        "",
    ),
    "hermes, tight": (
        HERMES,
        f'<tool_call>{{"name":"get_weather","arguments":{CITY}}}</tool_call>',
        [WEATHER],
        "",
    ),
    "hermes, between words": (
        HERMES,
        f'Let me see.\n<tool_call>\n{{"name": "get_weather", "arguments": {CITY}}}\n</tool_call>\nDone.\n',
        [WEATHER],
        "Let me see.\nDone.\n",
    ),
    "hermes, two": (
        HERMES,
        f'<tool_call>\n{{"name": "get_weather", "arguments": {CITY}}}\n</tool_call>\n<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>',
        [WEATHER, ("now", "{}")],
        "",
    ),
    "hermes, arguments first": (
        HERMES,
        f'<tool_call>{{"arguments": {CITY}, "name": "get_weather"}}</tool_call>',
        [WEATHER],
        "",
    ),
    "hermes, other members": (
        HERMES,
        f'<tool_call>{{"id": 7, "type": "function", "name": "get_weather", "x": [{{"name": "no"}}], "arguments": {CITY}, "y": null}}</tool_call>',
        [WEATHER],
        "",
    ),
    "hermes, no arguments": (HERMES, '<tool_call>{"name": "now"}</tool_call>', [("now", "{}")], ""),
    "hermes, null": (
        HERMES,
        '<tool_call>{"name": "now", "arguments": null}</tool_call>',
        [("now", "{}")],
        "",
    ),
    "hermes, in a string": (
        HERMES,
        '<tool_call>{"name": "now", "arguments": "{\\"x\\": 1}"}</tool_call>',
        [("now", '{"x": 1}')],
        "",
    ),
    "hermes, a name with escapes": (
        HERMES,
        '<tool_call>{"name": "\\u006eow", "arguments": {}}</tool_call>',
        [("now", "{}")],
        "",
    ),
    "hermes, a bracket is missing": (
        HERMES,
        f'<tool_call>{{"name": "get_weather", "arguments": {CITY}\n</tool_call>',
        [WEATHER],
        "",
    ),
    "hermes, no end marker": (
        HERMES,
        f'<tool_call>{{"name": "get_weather", "arguments": {CITY}}}',
        [WEATHER],
        "",
    ),
    "hermes, no end marker but another": (
        HERMES,
        f'<tool_call>{{"name": "get_weather", "arguments": {CITY}}}<tool_call>{{"name": "now", "arguments": {{}}}}',
        [WEATHER, ("now", "{}")],
        "",
    ),
    "hermes, a marker twice": (
        HERMES,
        f'<tool_call>\n<tool_call>{{"name": "get_weather", "arguments": {CITY}}}',
        [WEATHER],
        "<tool_call>",
    ),
    "hermes, one of two": (
        HERMES,
        '<tool_call>{"name": "fly", "arguments": {}}</tool_call>\n<tool_call>{"name": "now", "arguments": {}}</tool_call>',
        [("now", "{}")],
        '<tool_call>{"name": "fly", "arguments": {}}</tool_call>',
    ),
    "hermes, strings with brackets": (
        HERMES,
        '<tool_call>{"name": "get", "arguments": {"a": "}]\\"}</tool_call>", "b": [{}, "{["]}}</tool_call>',
        [("get", '{"a": "}]\\"}</tool_call>", "b": [{}, "{["]}')],
        "",
    ),
    "llama3": (LLAMA3, f'{{"name": "get_weather", "parameters": {CITY}}}', [WEATHER], ""),
    "llama3, tagged": (
        LLAMA3,
        f'\n<|python_tag|>{{"name": "get_weather", "parameters": {CITY}}}',
        [WEATHER],
        "",
    ),
    "llama3, arguments": (
        LLAMA3,
        f'\n {{"type": "function", "name": "get_weather", "arguments": {CITY}}}',
        [WEATHER],
        "",
    ),
    "llama3, two": (
        LLAMA3,
        f'<|python_tag|>{{"name": "get_weather", "parameters": {CITY}}}; {{"name": "now", "parameters": {{}}}};',
        [WEATHER, ("now", "{}")],
        "",
    ),
    "llama3, words behind": (
        LLAMA3,
        f'{{"name": "get_weather", "parameters": {CITY}}}; that is all',
        [WEATHER],
        "; that is all",
    ),
    "llama3, words before": (
        LLAMA3,
        f'Well. <|python_tag|>{{"name": "get_weather", "parameters": {CITY}}}',
        [WEATHER],
        "Well.",
    ),
    "mistral": (MISTRAL, f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {CITY}}}]', [WEATHER], ""),
    "mistral, two": (
        MISTRAL,
        f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {CITY}, "id": "123456789"}}, {{"name": "now", "arguments": {{}}}}]',
        [WEATHER, ("now", "{}")],
        "",
    ),
    "mistral, no list": (
        MISTRAL,
        f'[TOOL_CALLS]{{"name": "get_weather", "arguments": {CITY}}}',
        [WEATHER],
        "",
    ),
    "mistral, list open": (
        MISTRAL,
        f'Well [TOOL_CALLS][{{"name": "get_weather", "arguments": {CITY}}}, ',
        [WEATHER],
        "Well",
    ),
    "mistral, words behind": (
        MISTRAL,
        f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {CITY}}}] so',
        [WEATHER],
        "so",
    ),
    "mistral args": (
        MISTRAL_ARGS,
        f"Well.[TOOL_CALLS]get_weather[ARGS]{CITY}[TOOL_CALLS]now[ARGS]{{}}",
        [WEATHER, ("now", "{}")],
        "Well.",
    ),
    "mistral args, ids": (
        MISTRAL_ARGS,
        f"[TOOL_CALLS]get_weather[CALL_ID]a1B2c3D4e[ARGS]{CITY}",
        [WEATHER],
        "",
    ),
    "mistral args in the older form": (
        MISTRAL_ARGS,
        f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {CITY}}}]',
        [WEATHER],
        "",
    ),
    "mistral in the newer form": (MISTRAL, f"[TOOL_CALLS]get_weather[ARGS]{CITY}", [WEATHER], ""),
}


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("pieces", [0, 1, 3])
@pytest.mark.parametrize("case", FOUND)
def test_calls_are_found(case: str, pieces: int, streams: bool) -> None:
    format, text, expected, words = FOUND[case]
    events = parse(format, text, pieces, stream_arguments=streams)
    assert calls(events) == expected
    assert content(events) == words


NO_CALLS = {
    "words": (HERMES, "  Hello < there\n\n"),
    "unknown": (HERMES, '<tool_call>\n{"name": "fly", "arguments": {}}\n</tool_call>'),
    "no object": (HERMES, "<tool_call>now</tool_call>"),
    "another syntax": (HERMES, "<tool_call>\n<function=now>\n</function>\n</tool_call>"),
    "not quoted": (HERMES, '<tool_call>{name: "now"}</tool_call>'),
    "no comma": (HERMES, '<tool_call>{"name": "now" "arguments": {}}</tool_call>'),
    "a longer name": (HERMES, '<tool_call>{"name": "nowhere", "arguments": {}}'),
    "arguments are a list": (HERMES, '<tool_call>{"name": "now", "arguments": []}</tool_call>'),
    "arguments are a number": (HERMES, '<tool_call>{"name": "now", "arguments": 7}</tool_call>'),
    "arguments are words": (HERMES, '<tool_call>{"name": "now", "arguments": "please"}</tool_call>'),
    "no name": (HERMES, '<tool_call>{"arguments": {}}</tool_call>'),
    "the name is a number": (HERMES, '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
    "cut in the name": (HERMES, 'Well \n<tool_call>\n{"name": "no'),
    "cut in the marker": (HERMES, "Well \n<tool_ca"),
    "a lonely end": (HERMES, "so </tool_call> it ends"),
    "markers of others": (HERMES, '[TOOL_CALLS][{"name": "now", "arguments": {}}]'),
    "json": (LLAMA3, '{"answer": 42}'),
    "json with a name": (LLAMA3, '{"name": "now", "age": 3}'),
    "json, unknown": (LLAMA3, '{"name": "Ann", "parameters": {}}'),
    "json behind words": (LLAMA3, 'It is {"name": "now", "parameters": {}}'),
    "python": (LLAMA3, "<|python_tag|>print(1)"),
    "a list": (LLAMA3, "[1, 2]"),
    "mistral, unknown": (MISTRAL, '[TOOL_CALLS] [{"name": "fly", "arguments": {}}]'),
    "mistral, nothing": (MISTRAL, "[TOOL_CALLS] [ ]"),
    "mistral, words": (MISTRAL, "[TOOL_CALLS] I would like to"),
    "mistral args, unknown": (MISTRAL_ARGS, "[TOOL_CALLS]fly[ARGS]{}"),
    "mistral args, no object": (MISTRAL_ARGS, "[TOOL_CALLS]now[ARGS] 7"),
    "mistral args, other marker": (MISTRAL_ARGS, "[TOOL_CALLS]now[ARG]{}"),
    "mistral args, alone": (MISTRAL_ARGS, "now[ARGS]{}"),
}


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("pieces", [0, 1, 4])
@pytest.mark.parametrize("case", NO_CALLS)
def test_what_is_no_call_is_content_unchanged(case: str, pieces: int, streams: bool) -> None:
    format, text = NO_CALLS[case]
    assert parse(format, text, pieces, stream_arguments=streams) == [("content", text)]


BROKEN = {
    "cut": (HERMES, '<tool_call>{"name": "now", "arguments": {"a": [1, "x', '{"a": [1, "x', ""),
    "brackets": (
        HERMES,
        '<tool_call>{"name": "now", "arguments": {"a": [1}}}</tool_call> so',
        '{"a": [1}}}',
        "so",
    ),
    "brackets and a marker's beginning": (
        HERMES,
        '<tool_call>{"name": "now", "arguments": {"a": [1}</tool</tool_call>',
        '{"a": [1}</tool',
        "",
    ),
    "list": (MISTRAL, '[TOOL_CALLS][{"name": "now", "arguments": {"a": [1}}]', '{"a": [1}}]', ""),
    "named": (MISTRAL_ARGS, '[TOOL_CALLS]now[ARGS]{"a": [1}, so', '{"a": [1}, so', ""),
}


@pytest.mark.parametrize("pieces", [0, 1])
@pytest.mark.parametrize("case", BROKEN)
def test_arguments_that_break_off_come_as_far_as_they_go(case: str, pieces: int) -> None:
    format, text, arguments, words = BROKEN[case]
    events = parse(format, text, pieces)
    assert calls(events) == [("now", arguments)]
    assert content(events) == words
    assert parse(format, text, pieces, stream_arguments=False) == [("content", text)]


@pytest.mark.parametrize("bad", ['{"a": True}', "{'a': 1}", '{"a": 1,}', '{"a": "x\ny"}'])
def test_invalid_json_is_content_if_it_need_not_stream(bad: str) -> None:
    text = f'<tool_call>{{"name": "now", "arguments": {bad}}}</tool_call>'
    assert calls(parse(HERMES, text)) == [("now", bad)]
    assert parse(HERMES, text, stream_arguments=False) == [("content", text)]
    named = f"[TOOL_CALLS]now[ARGS]{bad}"
    assert calls(parse(MISTRAL_ARGS, named)) == [("now", bad)]
    assert parse(MISTRAL_ARGS, named, stream_arguments=False) == [("content", named)]


def test_the_name_comes_first_and_arguments_as_they_arrive() -> None:
    parser = ToolCallParser(HERMES, TOOLS)
    assert parser.feed("Hi \n<tool_call>") == [ContentDelta("Hi")]
    assert parser.feed('\n{"name": "get_weather", "arguments": ') == []
    begin, delta = parser.feed('{"ci')
    assert isinstance(begin, CallBegin) and (begin.index, begin.name) == (0, "get_weather")
    assert re.fullmatch(r"call_[0-9a-f]{24}", begin.id)
    assert delta == CallDelta(0, '{"ci')
    assert parser.feed('ty": 1}') == [CallDelta(0, 'ty": 1}')]
    assert parser.feed("}") == [CallEnd(0)]
    assert parser.feed("\n</tool_call>") + parser.finish() == []
    assert parser.num_calls == 1


MARKS = {
    HERMES: [
        "<tool_call>",
        "</tool_call>",
        "<tool",
        "</",
        '{"name": "now", "arguments": {"a": [1, "}"]}}',
        '"arguments": ',
    ],
    LLAMA3: [
        "<|python_tag|>",
        "<|py",
        ";",
        '{"name": "now", "parameters": {"a": [1, "}"]}}',
        '"parameters": ',
    ],
    MISTRAL: [
        "[TOOL_CALLS]",
        "[TOOL",
        "[",
        "]",
        ",",
        '{"name": "now", "arguments": {"a": [1, "}"]}}',
        "now[ARGS]{}",
        "[CALL_ID]x1",
    ],
}
MARKS[MISTRAL_ARGS] = MARKS[MISTRAL]
SHARED = [
    '{"name": "get',
    '"',
    "{",
    "}",
    "}}",
    "\\",
    " ",
    "\n",
    "é",
    "x",
    '{"name": "fly", "arguments": {}}',
    "now",
    "get_weather",
    ": ",
    "null",
]


@st.composite
def answers(draw: st.DrawFn) -> tuple[ToolFormat, str]:
    format = draw(st.sampled_from(list(ToolFormat)))
    parts = st.sampled_from(MARKS[format]) | st.sampled_from(SHARED) | st.text(max_size=3)
    return format, "".join(draw(st.lists(parts, max_size=12)))


@settings(max_examples=600, deadline=None)
@given(
    answer=answers(),
    cuts=st.lists(st.integers(0, 200), max_size=12),
    streams=st.booleans(),
    max_calls=st.none() | st.integers(1, 2),
)
def test_pieces_do_not_matter_and_nothing_is_lost(
    answer: tuple[ToolFormat, str], cuts: list[int], streams: bool, max_calls: int | None
) -> None:
    format, text = answer
    whole = parse(format, text, stream_arguments=streams, max_calls=max_calls)
    assert parse(format, text, cuts, stream_arguments=streams, max_calls=max_calls) == whole
    assert parse(format, text, 1, stream_arguments=streams, max_calls=max_calls) == whole
    found = calls(whole)
    if not found:
        assert content(whole) == text
    if not streams:
        assert all(isinstance(json.loads(arguments), dict) for _, arguments in found)


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60), format=st.sampled_from(list(ToolFormat)), piece=st.integers(1, 5))
def test_arbitrary_text_passes(text: str, format: ToolFormat, piece: int) -> None:
    assert content(parse(format, text, piece)) == text


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.text(max_size=6), JSON, max_size=3)
WORDS = st.text("ab .,é", max_size=10).filter(lambda text: text == text.strip())
SPACE = st.text(" \n\t", max_size=2)


@settings(max_examples=300, deadline=None)
@given(
    format=st.sampled_from(list(ToolFormat)),
    asked=st.lists(
        st.tuples(st.sampled_from(["get_weather", "get", "now"]), OBJECTS), min_size=1, max_size=3
    ),
    before=WORDS,
    space=SPACE,
    indent=st.none() | st.integers(0, 2),
    ascii=st.booleans(),
    piece=st.integers(1, 7),
    streams=st.booleans(),
)
def test_written_calls_are_read_back(
    format: ToolFormat,
    asked: list[tuple[str, dict[str, object]]],
    before: str,
    space: str,
    indent: int | None,
    ascii: bool,
    piece: int,
    streams: bool,
) -> None:
    texts = [(name, json.dumps(arguments, indent=indent, ensure_ascii=ascii)) for name, arguments in asked]
    key = "parameters" if format is LLAMA3 else "arguments"
    objects = [
        f'{{{space}"name"{space}:"{name}",{space}"{key}":{space}{arguments}{space}}}'
        for name, arguments in texts
    ]
    match format:
        case ToolFormat.HERMES:
            written = "".join(f"{space}<tool_call>{space}{call}{space}</tool_call>" for call in objects)
        case ToolFormat.LLAMA3:
            written = f"<|python_tag|>{space}" + f"{space};{space}".join(objects)
        case ToolFormat.MISTRAL:
            written = f"{space}[TOOL_CALLS]{space}[{space}" + f"{space},{space}".join(objects) + f"{space}]"
        case ToolFormat.MISTRAL_ARGS:
            written = "".join(f"[TOOL_CALLS]{name}[ARGS]{arguments}" for name, arguments in texts)
    events = parse(format, before + written + space, piece, stream_arguments=streams)
    assert calls(events) == texts
    assert content(events) == before


@settings(max_examples=200, deadline=None)
@given(answer=answers())
def test_nothing_is_held_back_without_need(answer: tuple[ToolFormat, str]) -> None:
    """Plain words pass at once, and what is held begins with white space or what a call may begin with."""
    format, text = answer
    parser = ToolCallParser(format, TOOLS)
    shown = ""
    for index, char in enumerate(text, start=1):
        for event in parser.feed(char):
            shown += event.text if isinstance(event, ContentDelta) else ""
        if parser.num_calls:
            return
        held = text[len(shown) : index]
        assert text.startswith(shown)
        assert (
            held.strip() == ""
            or format.begin.startswith(held.strip()[: len(format.begin)])
            or held.strip()[0] == "{"
        )


STOPPED = {
    "hermes": (HERMES, '<tool_call>{"name": "now", "arguments": {}}\n</tool_call>', "\n<tool_call>{...", ""),
    "hermes, no end marker": (HERMES, '<tool_call>{"name": "now", "arguments": {}}', "<tool_call>", ""),
    "llama3": (LLAMA3, '{"name": "now", "parameters": {}}', '; {"name": "now", "parameters": {}}', ""),
    "mistral": (
        MISTRAL,
        '[TOOL_CALLS][{"name": "now", "arguments": {}}',
        ', {"name": "now", "arguments": {}}]',
        "]",
    ),
    "mistral, ended": (MISTRAL, '[TOOL_CALLS][{"name": "now", "arguments": {}}]', "[TOOL_CALLS]", ""),
    "mistral args": (MISTRAL_ARGS, "[TOOL_CALLS]now[ARGS]{}", "[TOOL_CALLS]now[ARGS]{}", ""),
}


@pytest.mark.parametrize("pieces", [1, 1000])
@pytest.mark.parametrize("case", STOPPED)
def test_after_enough_calls_the_answer_is_done(case: str, pieces: int) -> None:
    format, text, more, closing = STOPPED[case]
    parser = ToolCallParser(format, TOOLS, max_calls=1)
    events: list[ToolEvent] = []
    for start in range(0, len(text + more), pieces):
        events += parser.feed((text + more)[start : start + pieces])
    assert parser.done
    assert (text + more)[: parser.taken] == text
    assert parser.closing == closing
    assert parser.feed("more") + parser.finish() == []
    assert calls(joined(events)) == [("now", "{}")]
    assert content(joined(events)) == ""


@pytest.mark.parametrize("name", [None, "get_weather"])
@pytest.mark.parametrize("format", list(ToolFormat))
def test_a_forced_answer_goes_on_as_a_call(format: ToolFormat, name: str | None) -> None:
    prefix = force_prefix(format, name)
    rest = {HERMES: "}\n</tool_call>", LLAMA3: "}", MISTRAL: "}]", MISTRAL_ARGS: ""}[format]
    key = "parameters" if format is LLAMA3 else "arguments"
    chosen = "" if name else "get_weather[ARGS]" if format is MISTRAL_ARGS else f'get_weather", "{key}": '
    assert prefix == prefix.strip()
    events = parse(format, f"{prefix}{chosen}{CITY}{rest}", 2)
    assert calls(events) == [WEATHER]
    assert content(events) == ""


def test_a_forced_name_may_hold_anything() -> None:
    name = 'say "é"'
    parser = ToolCallParser(HERMES, [{"type": "function", "function": {"name": name}}])
    events = parser.feed(force_prefix(HERMES, name) + " {}}")
    assert isinstance(events[0], CallBegin) and events[0].name == name


@pytest.mark.parametrize("format", list(ToolFormat))
def test_the_prompt_asks_for_calls_of_the_format(format: ToolFormat) -> None:
    prompt = tools_prompt(TOOLS, format)
    assert all(json.dumps(tool) in prompt for tool in TOOLS)
    example = prompt.rpartition(":\n")[2]
    example = example.replace("<function-name>", "now" if format is MISTRAL_ARGS else '"now"').replace(
        "<args-json-object>", CITY
    )
    assert calls(parse(format, example)) == [("now", CITY)]


@pytest.mark.parametrize(
    ("tools", "match"),
    [
        ([{"type": "retrieval"}], r"tools\[0\] must be .*'retrieval'"),
        (["get"], r"tools\[0\] must be"),
        ([{"type": "function", "function": {}}], r"tools\[0\].function.name must be text, got None"),
        ([*TOOLS, TOOLS[0]], r"'get_weather' is there twice"),
    ],
)
def test_tools_are_checked(tools: list[dict[str, object]], match: str) -> None:
    with pytest.raises(InvalidRequest, match=match):
        ToolCallParser(HERMES, tools)


def test_long_answers_take_time_in_proportion() -> None:
    """Each character is looked at a bounded number of times, also where markers open and nothing closes."""
    for format in ToolFormat:
        for text in (
            format.begin + '{"' * 3,
            '{"name": "now", "x": "' + format.begin + "{",
            format.begin * 3 + " ",
        ):
            parser = ToolCallParser(format, TOOLS)
            steps = 0
            state = parser._step

            def counted(char: str, state: object = state) -> None:
                nonlocal steps
                steps += 1
                state(char)  # type: ignore[operator]

            parser._step = counted  # type: ignore[method-assign]
            parser.feed(text * 200)
            parser.finish()
            assert steps <= 3 * len(text * 200)
