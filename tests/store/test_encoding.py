"""How messages are written to a store."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from pensieve.message import Message, ToolCall
from pensieve.store.encoding import messages_text


@given(st.text(max_size=40), st.booleans())
def test_messages_are_written_as_json_writes_them(text: str, calls: bool) -> None:
    tool_calls = (ToolCall("id", "f", text),) if calls else ()
    rows: list[list[object]] = [["user", text], ["assistant", text]]
    if calls:
        rows[1].append({"tool_calls": [["id", "f", text]]})
    assert messages_text([Message("user", text), Message("assistant", text, tool_calls)]) == json.dumps(rows)
