"""One answer on its way from token ids to text: streamed piece by piece, cut where it ends.

Knows a turn and its text; never engines or stores.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from pensieve.core.receipt import Miss, Receipt
from pensieve.core.request import FinishReason
from pensieve.engine.messages import Finished, Token
from pensieve.message import Message
from pensieve.service.answer_parser import AnswerParser
from pensieve.service.turn import PendingTurn, Piece, TurnDone, TurnSpec
from pensieve.text import ChatText, Detokenizer, StopStrings, keep_tokens

log = logging.getLogger(__name__)


class AnswerText:
    """Turns sampled tokens into the pieces, the text and the parts of answers."""

    def __init__(self, text: ChatText | None) -> None:
        """`text` is None if only token ids are wanted."""
        self._text = text

    def begin(self, turn: PendingTurn) -> None:
        """Make a turn ready for its first token."""
        spec, stop = turn.spec, turn.spec.stop
        if self._text is not None and (spec.raw is None or spec.raw_text):
            turn.detokenizer = self._detokenizer(spec)
            if not spec.ignore_eos:
                stop = (*stop, *self._text.stop_strings)
            if spec.form is not None:
                turn.parser = AnswerParser(self._text, spec.form, spec.turn_id)
                if spec.prefix:
                    turn.events += turn.parser.feed(spec.prefix)
        turn.stops = StopStrings(stop)

    def take(self, turn: PendingTurn, token: Token) -> int | None:
        """Take a token.

        Returns how many tokens are kept if the text ends the answer here, None if it goes on.
        """
        turn.sampled.append(token)
        if turn.detokenizer is None or turn.cut is not None:
            return None
        self._show(turn, turn.detokenizer.push((token.token_id,)))
        return None if turn.cut is None else turn.cut[0]

    def end(self, turn: PendingTurn) -> str:
        """The engine has ended the answer: show what was held back.

        Returns:
            The answer's last words if it was cut within a token; `finish` takes their ids. Mostly empty.
        """
        if turn.detokenizer is not None and turn.cut is None:
            assert turn.stops is not None
            self._show(turn, turn.detokenizer.finish())
            if turn.cut is None:
                self._add_piece(turn, turn.stops.finish())
        if turn.parser is not None:
            turn.events += turn.parser.finish()
            if turn.events:
                self._add_piece(turn, "")
        return "" if turn.cut is None else turn.cut[1]

    def finish(self, turn: PendingTurn, event: Finished, rest: Sequence[int]) -> TurnDone:
        """The whole answer; `rest` are the ids of what `end` returned."""
        output, reason = event.output, event.reason
        if turn.cut is not None:
            reason = FinishReason.STOP
            output = (*output[: turn.cut[0]], *rest)
        sampled = turn.sampled[: len(output)]
        text, message = turn.text, None
        if turn.parser is not None:
            message = turn.parser.message()
        elif turn.detokenizer is not None:
            message = Message("assistant", text)
        return TurnDone(
            text=text,
            prompt=turn.prompt.tokens,
            output=output,
            logprobs=tuple(token.logprob for token in sampled if token.logprob is not None),
            tops=tuple(token.top for token in sampled) if turn.spec.sampling.logprobs else (),
            reason=reason,
            receipt=_receipt(turn, event.receipt, len(output)),
            turn_id=None,
            warning=turn.prompt.warning,
            message=message,
        )

    def _show(self, turn: PendingTurn, text: str) -> None:
        assert turn.stops is not None
        if len(turn.sampled) < turn.spec.sampling.min_new_tokens:
            # No stop string ends the answer this early, not even one that only begins here.
            self._add_piece(turn, text)
            return
        text, hit = turn.stops.feed(text)
        self._add_piece(turn, text)
        if hit is not None or (turn.parser is not None and turn.parser.is_complete):
            sampled = [token.token_id for token in turn.sampled]
            turn.cut = keep_tokens(self._detokenizer(turn.spec), sampled, turn.text)

    def _add_piece(self, turn: PendingTurn, text: str) -> None:
        if turn.parser is not None and text:
            turn.events += turn.parser.feed(text)
        if not (text or turn.spec.sampling.logprobs is not None or turn.events):
            return
        piece = Piece(text, tuple(turn.sampled[turn.num_in_pieces :]), tuple(turn.events))
        turn.num_in_pieces = len(turn.sampled)
        turn.events.clear()
        turn.pieces.append(piece)
        if turn.on_piece is not None:
            try:
                turn.on_piece(piece)
            except Exception:
                log.exception("on_piece raised; the turn goes on without it")
                turn.on_piece = None

    def _detokenizer(self, spec: TurnSpec) -> Detokenizer:
        """One that shows the markers of calls and reasoning as text where a parser looks for them."""
        assert self._text is not None
        return self._text.detokenizer(self._text.marker_ids if spec.tools or self._text.has_reasoning else ())


def _receipt(turn: PendingTurn, receipt: Receipt, num_output: int) -> Receipt:
    """The engine's receipt, completed by what only the text knows: truncation, and misses that a rewriting
    template caused.
    """
    misses, at = receipt.misses, turn.prompt.rewritten_at
    if at is not None:
        misses = tuple(
            part for miss in misses for part in _blame_template(miss, at, turn.prompt.history_tokens)
        )
    return replace(
        receipt, truncated_tokens=turn.prompt.truncated_tokens, output_tokens=num_output, misses=misses
    )


def _blame_template(miss: Miss, at: int, history_tokens: int) -> list[Miss]:
    """Split a miss: what lies between the first rewritten token and the end of the history is due to the
    template.
    """
    if miss.why in ("on_cpu", "dropped", "failed") or miss.stop <= at or miss.start >= history_tokens:
        return [miss]
    start, stop = max(miss.start, at), min(miss.stop, history_tokens)
    parts = [replace(miss, stop=start)] if miss.start < start else []
    parts.append(Miss(start, stop, "template_changed"))
    if stop < miss.stop:
        parts.append(replace(miss, start=stop))
    return parts
