"""The hash of a history, on which every stored conversation depends."""

from __future__ import annotations

import hashlib
import json

from hypothesis import given
from hypothesis import strategies as st

from pensieve import message
from pensieve.message import DIGEST_BYTES, Message, extend_digest, json_pieces

ANY = st.text(st.characters(exclude_categories=()), max_size=40)  # half surrogate pairs included


@given(ANY, st.integers(1, 7))
def test_pieces_are_what_json_writes_at_once(text: str, size: int) -> None:
    before, message.PIECE_CHARS = message.PIECE_CHARS, size
    try:
        assert "".join(json_pieces(text)) == json.dumps(text)
    finally:
        message.PIECE_CHARS = before


@given(ANY)
def test_the_hash_is_that_of_the_messages_json(text: str) -> None:
    written = json.dumps(["user", text, []]).encode()
    assert (
        extend_digest(b"parent", Message("user", text))
        == hashlib.blake2b(b"parent" + written, digest_size=DIGEST_BYTES).digest()
    )
