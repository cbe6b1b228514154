"""What every conversation store promises of answers under way.

Leases, drafts and keys of servers that die, freeze or share a store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pensieve.errors import AnswerLost, ConversationNotFound, StoreError
from pensieve.message import Message, path_digests
from pensieve.store import CLAIM_S, INTERRUPTED, LEASE_S, Claim, ConversationStore, Owner

WHOLE = [Message("user", "q"), Message("assistant", "whole")]


def write(store: Any, sql: str, *values: object) -> None:
    """Change a store behind its back."""
    store._writer.call(lambda connection: connection.execute(sql, values) and None)


def begin(store: ConversationStore, turn_id: str, owner: str, conversation: str = "one") -> None:
    """An answer in the middle."""
    store.draft("a", conversation, None, turn_id, [Message("user", "q")], [1], 0, 1, owner=owner).result(
        timeout=30
    )
    store.extend_draft(turn_id, [2], "half").result(timeout=30)


def end(store: ConversationStore, turn_id: str, conversation: str = "one", **more: Any) -> Any:
    return store.append(
        "a", conversation, None, WHOLE, [1, 2, 3], reply_reason="stop", turn_id=turn_id, **more
    ).result(timeout=30)


def owner_of(store: ConversationStore, id: str) -> Owner:
    (found,) = [owner for owner in store.owners() if owner.id == id]
    return found


class OwnersContract:
    """Inherit, and override `new_store` with a fixture that yields an empty store."""

    @pytest.fixture
    def new_store(self) -> Iterator[Callable[[], ConversationStore]]:
        raise NotImplementedError

    @pytest.fixture
    def store(self, new_store: Callable[[], ConversationStore]) -> ConversationStore:
        made = new_store()
        made.create("a", "one")
        return made

    # -- leases

    def test_a_lease_is_renewed_and_lapses(self, store: ConversationStore) -> None:
        store.join("me", "here")
        first = owner_of(store, "me")
        assert (first.process, first.lapsed) == ("here", False)
        time.sleep(0.002)
        assert store.renew("me", "here")
        assert first.expires_s < owner_of(store, "me").expires_s < first.expires_s + LEASE_S
        write(store, "UPDATE owners SET expires_s = expires_s - ?", 2 * LEASE_S)
        assert owner_of(store, "me").lapsed
        assert store.renew("me", "here") and not owner_of(store, "me").lapsed  # it had not been recovered

    def test_an_owner_that_was_recovered_learns_it_and_begins_anew(self, store: ConversationStore) -> None:
        store.join("me", "here")
        store.recover_drafts("me")
        assert store.owners() == []
        assert not store.renew("me", "here")
        assert owner_of(store, "me").process == "here" and store.renew("me", "here")
        assert store.leave("me") == 0 and store.owners() == []

    def test_a_lease_that_was_renewed_meanwhile_is_not_ended(self, store: ConversationStore) -> None:
        store.join("me", "")
        begin(store, "t", "me")
        seen = owner_of(store, "me")
        time.sleep(0.002)
        store.renew("me", "")
        assert store.recover_drafts("me", seen.expires_s) == 0
        assert store.recover_drafts() == 0
        assert end(store, "t").messages[-1].content == "whole"

    def test_of_many_that_find_a_dead_owner_one_recovers_it(self, store: ConversationStore) -> None:
        store.join("dead", "")
        for number in range(3):
            begin(store, f"t{number}", "dead")
        seen = owner_of(store, "dead")
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: store.recover_drafts("dead", seen.expires_s), range(8)))
        assert sorted(found) == [0] * 7 + [3]

    def test_two_owners_do_not_end_each_others_answers(self, store: ConversationStore) -> None:
        for owner in ("first", "second"):
            store.join(owner, "")
            begin(store, owner, owner)
        assert store.recover_drafts() == 0  # as a third one does at its start
        assert store.leave("second") == 1
        assert store.turn("a", "second").reply_reason == INTERRUPTED
        assert end(store, "first").reply_reason == "stop"

    def test_what_an_owner_begins_is_its_own_though_its_lease_was_ended(
        self, store: ConversationStore
    ) -> None:
        begin(store, "t", "me")
        store.claim("a", "key", b"", "t", owner="me")
        assert store.recover_drafts() == 0
        assert not store.claim("a", "key", b"", "u", owner="another").fresh

    # -- keys

    def test_a_key_whose_answer_was_interrupted_is_free(self, store: ConversationStore) -> None:
        store.claim("a", "key", b"print", "t", owner="dead")
        begin(store, "t", "dead")
        assert store.claim("a", "key", b"print", "u", owner="me") == Claim(
            "t", b"print", fresh=False, owner="dead"
        )
        assert store.recover_drafts("dead") == 1
        assert store.turn("a", "t").reply_reason == INTERRUPTED  # the fragment is there, under its own id
        assert store.claim("a", "key", b"print", "u", owner="me").fresh
        end(store, "u", claimed=True)
        assert store.claim("a", "key", b"print", "v", owner="me") == Claim(
            "u", b"print", fresh=False, stored=True, owner="me"
        )
        assert store.get("a", "one").leaf == "u"

    def test_a_key_whose_answer_had_not_begun_is_free_when_its_owner_is_dead(
        self, store: ConversationStore
    ) -> None:
        store.claim("a", "key", b"", "t", owner="dead")
        write(store, "UPDATE owners SET expires_s = expires_s - ?", 2 * LEASE_S)
        assert not store.claim(
            "a", "key", b"", "u", owner="me"
        ).fresh  # it has lapsed, but not been recovered
        store.recover_drafts("dead", owner_of(store, "dead").expires_s)
        assert store.claim("a", "key", b"", "u", owner="me").fresh

    def test_a_whole_answer_keeps_its_key_though_its_client_was_not_told(
        self, store: ConversationStore
    ) -> None:
        store.claim("a", "key", b"", "t", owner="dead")
        begin(store, "t", "dead")
        whole = end(store, "t", claimed=True)
        store.recover_drafts("dead")
        assert store.claim("a", "key", b"", "u", owner="me") == Claim(
            "t", b"", fresh=False, stored=True, owner="dead"
        )
        assert store.turn("a", "t") == whole

    def test_one_key_is_not_answered_twice_by_an_owner_that_was_frozen(
        self, store: ConversationStore
    ) -> None:
        store.claim("a", "key", b"", "t", owner="frozen")
        store.recover_drafts("frozen")
        assert store.claim("a", "key", b"", "u", owner="me").fresh
        end(store, "u", claimed=True)
        with pytest.raises(AnswerLost, match="ask again"):
            end(store, "t", claimed=True)
        with pytest.raises(ConversationNotFound):
            store.turn("a", "t")

    def test_two_answers_never_have_one_id(self, store: ConversationStore) -> None:
        begin(store, "t", "frozen")
        store.recover_drafts("frozen")
        before = store.turn("a", "t")
        with pytest.raises(AnswerLost, match="ask again"):
            end(store, "t")
        with pytest.raises(AnswerLost):
            begin(store, "t", "frozen")
        assert store.turn("a", "t") == before
        assert (
            end(store, "free").messages[-1].content == "whole"
        )  # without a key and under a free id it is as good as any

    def test_a_key_under_way_is_kept_for_longer_than_a_day(self, store: ConversationStore) -> None:
        store.claim("a", "key", b"", "t", now_s=1000.0, owner="me")
        begin(store, "t", "me")
        late_s = 1000.0 + 2 * CLAIM_S
        assert store.purge(late_s) == 0
        assert not store.claim("a", "key", b"", "u", now_s=late_s, owner="me").fresh
        end(store, "t", claimed=True)
        assert store.purge(late_s) == 1

    def test_a_key_does_not_bring_back_what_was_deleted(self, store: ConversationStore) -> None:
        turn = end(store, "t")
        store.append("a", "one", "t", [Message("user", "more")], [4]).result(timeout=30)
        store.claim("a", "key", b"", "t", owner="me")
        assert not store.delete_turn("a", "t")  # another stands on it
        assert store.turn("a", "t").meta == {**turn.meta, "deleted": True}
        assert store.claim("a", "key", b"", "u", owner="me").fresh

    def test_a_turn_has_a_home(self, store: ConversationStore) -> None:
        end(store, "t")
        store.fork("a", "one", new_id="two")
        assert store.home("a", "t") == "one"
        assert (
            store.home("b", "t") is None
            and store.home("a", "none") is None
            and store.home("a", "\x00") is None
        )
        store.delete("a", "one")
        assert store.home("a", "t") == "two"

    # -- erasures that are completed later

    def test_an_erasure_that_is_put_off_is_remembered(self, store: ConversationStore) -> None:
        store.create("a", "two")
        store.erase("a", "two", overwrite=False)
        with pytest.raises(ConversationNotFound):
            store.erase("a", "two", overwrite=False)
        assert store.erasures() == 1
        store.overwrite()
        assert store.erasures() == 0
        store.erase("a", "one")
        assert store.erasures() == 0

    # -- what is read is what was written

    @pytest.mark.parametrize(
        "change",
        [
            "messages = replace(messages, 'q', 'p')",
            'messages = \'[["user", "q"\'',
            "meta = '{\"left_out\": 1}'",
            "reply_reason = 'length'",
            "start = 1, stop = 4",
            "stop = 4",
            "token_ids = ?",
            "digest = ?",
        ],
    )
    def test_a_damaged_turn_is_not_served_and_keeps_no_other_back(
        self, store: ConversationStore, change: str
    ) -> None:
        turn = end(store, "t")
        store.append("a", "one", "t", [Message("user", "more")], [4], turn_id="leaf").result(timeout=30)
        store.create("a", "two")
        other = store.append("a", "two", None, [Message("user", "other")], [7], turn_id="other").result(
            timeout=30
        )
        values = (
            [b"\x01\0\0\0\x02\0\0\0\x04\0\0\0"]
            if "token_ids" in change
            else [bytes(16)]
            if "digest" in change
            else []
        )
        write(store, f"UPDATE turns SET {change} WHERE id = 't'", *values)
        for read in (
            lambda: store.turn("a", "t"),
            lambda: store.path("a", "leaf"),
            lambda: (
                store.find("a", [path_digests(turn.messages)[-1]])
                if "digest" not in change
                else store.path("a", "t")
            ),
        ):
            with pytest.raises(StoreError, match="turn 't' is not what was written") as raised:
                read()
            assert raised.value.http_status == 500
        assert store.path("a", "other") == [other]
        assert [one.id for one in store.list("a")] == ["two", "one"]
        store.erase("a", "one")  # it can still be deleted

    @pytest.mark.parametrize(
        "change", ["messages = replace(messages, 'q', 'p')", "messages = '[['", "token_ids = ?", "stop = 7"]
    )
    def test_turns_of_before_there_were_checksums_are_checked_as_far_as_they_can_be(
        self, store: ConversationStore, change: str
    ) -> None:
        end(store, "t")
        write(store, "UPDATE turns SET checksum = NULL")
        assert store.path("a", "t")[0].token_ids == (1, 2, 3)
        write(
            store, f"UPDATE turns SET {change}", *([b"\x01\0\0\0\x02\0\0"] if "token_ids" in change else [])
        )
        with pytest.raises(StoreError, match="turn 't' is not what was written"):
            store.path("a", "t")

    def test_a_damaged_conversation_keeps_no_other_back(self, store: ConversationStore) -> None:
        store.create("a", "two", title="kept")
        write(store, "UPDATE conversations SET metadata = '{' WHERE id = 'one'")
        with pytest.raises(StoreError, match="conversation 'one' is damaged"):
            store.get("a", "one")
        assert [one.id for one in store.list("a")] == ["two"]

    def test_a_damaged_draft_keeps_no_other_from_being_recovered(self, store: ConversationStore) -> None:
        for turn_id in ("good", "bad"):
            store.claim("a", turn_id, b"", turn_id, owner="dead")
            begin(store, turn_id, "dead")
        write(store, "UPDATE drafts SET messages = '[[' WHERE turn_id = 'bad'")
        assert store.recover_drafts("dead") == 2
        assert store.turn("a", "good").reply_reason == INTERRUPTED
        with pytest.raises(ConversationNotFound):
            store.turn("a", "bad")
        assert store.claim("a", "bad", b"", "u", owner="me").fresh

    # -- the storage itself

    def test_a_probe_writes_and_finds_nothing_wrong(self, store: ConversationStore) -> None:
        assert store.trouble() is None
        store.probe()
        store.probe()
        assert store.trouble() is None
