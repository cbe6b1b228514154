"""The one parse of an answer: what streams, the store and the cut of an answer take from it is the same."""

from __future__ import annotations

from typing import Any

from text_tokenizers import HERMES, chat

from pensieve.core.request import SamplingParams
from pensieve.engine.messages import Token
from pensieve.service import PendingTurn, TurnSpec
from pensieve.service.answer_parser import AnswerForm, AnswerParser
from pensieve.service.answer_text import AnswerText
from pensieve.text import CallBegin, CallDelta, CallEnd, ChatText, ContentDelta

TOOLS = ({"type": "function", "function": {"name": "now", "description": "", "parameters": {}}},)
CALL = '<tool_call>\n{"name": "now", "arguments": {"zone": "UTC"}}\n</tool_call>'


def answered(text: ChatText, form: AnswerForm, said: str, **sampling: Any) -> PendingTurn:
    """A turn whose answer is `said`, taken token by token until the text ends it."""
    spec = TurnSpec("n", "c", (), SamplingParams(**sampling), ignore_eos=True, form=form, turn_id="t")
    turn, answers = PendingTurn(spec, 0.0), AnswerText(text)
    answers.begin(turn)
    for token_id in text.encode_answer(said):
        if answers.take(turn, Token("t", token_id)) is not None:
            break
    answers.end(turn)
    return turn


def test_a_turn_s_pieces_hold_the_events_that_one_parser_finds_in_the_whole_text() -> None:
    text, form = chat(HERMES), AnswerForm(TOOLS)
    whole = AnswerParser(text, form, "t")
    events = [*whole.feed(f"Well. {CALL}"), *whole.finish()]
    turn = answered(text, form, f"Well. {CALL}")
    assert turn.parser is not None and turn.parser.message() == whole.message()
    streamed = [event for piece in turn.pieces for event in piece.events]
    for kind in (CallBegin, CallEnd):
        assert [e for e in streamed if isinstance(e, kind)] == [e for e in events if isinstance(e, kind)]
    arguments = "".join(event.arguments for event in streamed if isinstance(event, CallDelta))
    assert arguments == whole.message().tool_calls[0].arguments == '{"zone": "UTC"}'
    assert "".join(event.text for event in streamed if isinstance(event, ContentDelta)) == "Well."
    assert turn.text == f"Well. {CALL}"


def test_what_an_answer_is_made_to_begin_with_is_parsed_and_not_streamed_as_text() -> None:
    text = chat(HERMES)
    prefix = '<tool_call>\n{"name": "now", "arguments":'
    turn = answered(text, AnswerForm(TOOLS, prefix=prefix), CALL.removeprefix(prefix))
    assert turn.parser is not None and not turn.text.startswith("<")
    assert [call.name for call in turn.parser.message().tool_calls] == ["now"]
    events = [event for piece in turn.pieces for event in piece.events]
    assert isinstance(events[0], CallBegin) and not any(isinstance(event, ContentDelta) for event in events)


def test_the_only_call_that_an_answer_may_hold_ends_it_also_where_it_began_before_its_least_length() -> None:
    text = chat(HERMES)
    for least in (0, len(text.encode_answer(CALL)) + 3):
        said = f"{CALL} and more words behind it"
        turn = answered(
            text, AnswerForm(TOOLS, parallel=False), said, max_new_tokens=512, min_new_tokens=least
        )
        assert turn.cut is not None and turn.parser is not None
        assert turn.parser.message().tool_calls[0].arguments == '{"zone": "UTC"}'
