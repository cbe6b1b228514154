"""One answer on its way from token ids to text: shown piece by piece, cut where it has to end. Knows a turn and its text; never engines or stores."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from pensieve.core.request import FinishReason
from pensieve.engine.messages import Finished, Miss, Receipt, Token
from pensieve.service.turn import PendingTurn, Piece, TurnDone, TurnSpec
from pensieve.text import ChatText, Detokenizer, StopStrings, keep_tokens

log = logging.getLogger(__name__)


class AnswerText:
    """Turns what an engine sampled for turns into what their callers see."""

    def __init__(self, text: ChatText | None) -> None:
        """`text` may be None where only token ids are wanted."""
        self._text = text

    def begin(self, turn: PendingTurn) -> None:
        """Make a turn ready for its first token."""
        stop = turn.spec.stop
        if self._text is not None and (turn.spec.raw is None or turn.spec.raw_text):
            turn.detokenizer = self._detokenizer(turn.spec)
            if not turn.spec.ignore_eos:
                stop = (*stop, *self._text.stop_strings)
        turn.stops = StopStrings(stop)

    def take(self, turn: PendingTurn, token: Token) -> int | None:
        """Take a token. How many tokens are kept of the answer, if it ends here by its text; None: it goes on."""
        turn.sampled.append(token)
        turn.unshown.append(token)
        if turn.detokenizer is None or turn.cut is not None:
            return None
        self._show(turn, turn.detokenizer.push((token.token_id,)))
        return None if turn.cut is None else turn.cut[0]

    def end(self, turn: PendingTurn) -> str:
        """The engine is done: what is left is shown. Returns the answer's last words, if it was cut within a token: `finish` takes their ids."""
        if turn.detokenizer is not None and turn.cut is None:
            assert turn.stops is not None
            self._show(turn, turn.detokenizer.finish())
            if turn.cut is None:
                self._say(turn, turn.stops.finish())
        return "" if turn.cut is None else turn.cut[1]

    def finish(self, turn: PendingTurn, event: Finished, rest: Sequence[int]) -> TurnDone:
        """The answer is whole."""
        output, reason = event.output, event.reason
        if turn.cut is not None:
            reason = FinishReason.STOP
            output = (*output[: turn.cut[0]], *rest)
        sampled = turn.sampled[: len(output)]
        return TurnDone(
            text="".join(turn.shown),
            prompt=turn.prompt.tokens,
            output=output,
            logprobs=tuple(token.logprob for token in sampled if token.logprob is not None),
            tops=tuple(token.top for token in sampled) if turn.spec.sampling.logprobs else (),
            reason=reason,
            receipt=_receipt(turn, event.receipt, len(output)),
            turn_id=None,
            warning=turn.prompt.warning,
        )

    def _show(self, turn: PendingTurn, text: str) -> None:
        assert turn.stops is not None
        if len(turn.sampled) < turn.spec.sampling.min_new_tokens:
            self._say(
                turn, text
            )  # nothing in it ends the answer, nor is the beginning of something that does
            return
        text, hit = turn.stops.feed(text)
        self._say(turn, text)
        if hit is not None or (text and turn.spec.watch is not None and turn.spec.watch(text)):
            turn.cut = keep_tokens(
                self._detokenizer(turn.spec), [token.token_id for token in turn.sampled], "".join(turn.shown)
            )

    def _say(self, turn: PendingTurn, text: str) -> None:
        if text:
            turn.shown.append(text)
        if turn.on_piece is not None and (text or turn.spec.sampling.logprobs is not None):
            piece = Piece(text, tuple(turn.unshown))
            turn.unshown.clear()
            turn.on_piece = _told(turn.on_piece, piece)

    def _detokenizer(self, spec: TurnSpec) -> Detokenizer:
        """Markers of calls and reasoning are text where somebody reads them."""
        assert self._text is not None
        return self._text.detokenizer(self._text.marker_ids if spec.tools or self._text.has_reasoning else ())


def _told(on_piece: Callable[[Piece], None], piece: Piece) -> Callable[[Piece], None] | None:
    try:
        on_piece(piece)
    except Exception:
        log.exception("on_piece raised; the turn goes on without it")
        return None
    return on_piece


def _receipt(turn: PendingTurn, receipt: Receipt, num_output: int) -> Receipt:
    """The engine's receipt with what only the text knows: what was truncated, and where a template's rewriting is to blame."""
    misses, at = receipt.misses, turn.prompt.rewritten_at
    if at is not None:
        misses = tuple(
            part for miss in misses for part in _blame_template(miss, at, turn.prompt.history_tokens)
        )
    return replace(
        receipt, truncated_tokens=turn.prompt.truncated_tokens, output_tokens=num_output, misses=misses
    )


def _blame_template(miss: Miss, at: int, history_tokens: int) -> list[Miss]:
    """Of what was missed, what lies between the rewritten token and the end of the history is the template's doing."""
    if miss.why in ("on_cpu", "dropped", "failed") or miss.stop <= at or miss.start >= history_tokens:
        return [miss]
    start, stop = max(miss.start, at), min(miss.stop, history_tokens)
    parts = [replace(miss, stop=start)] if miss.start < start else []
    parts.append(Miss(start, stop, "template_changed"))
    if stop < miss.stop:
        parts.append(replace(miss, start=stop))
    return parts
