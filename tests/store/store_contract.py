"""What every conversation store promises. A store's test class inherits this one and says how to open it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pensieve.errors import ConversationNotFound, InvalidRequest, StoreError
from pensieve.message import Message, ToolCall, path_digests
from pensieve.store import CLAIM_S, INTERRUPTED, Claim, ConversationStore, Turn, path_messages, path_tokens

# Fixtures are shared by the examples on purpose (each begins with names or a store of its own), and so are
# tests by classes.
INHERITED = [HealthCheck.function_scoped_fixture, HealthCheck.differing_executors]


def user(text: str) -> list[Message]:
    return [Message("user", text)]


def say(store: ConversationStore, id: str, text: str, token_ids: list[int], **options: Any) -> Turn:
    """Append to the conversation's leaf in namespace "a" and wait for it."""
    return store.append("a", id, store.get("a", id).leaf, user(text), token_ids, **options).result(timeout=30)


def log(store: ConversationStore, id: str, namespace: str = "a") -> list[int]:
    return path_tokens(store.path(namespace, store.get(namespace, id).leaf))


class ConversationStoreContract:
    """Inherit, and override `new_store` with a fixture that yields an empty store."""

    @pytest.fixture
    def new_store(self) -> Iterator[Callable[[], ConversationStore]]:
        raise NotImplementedError

    @pytest.fixture
    def store(self, new_store: Callable[[], ConversationStore]) -> ConversationStore:
        return new_store()

    # -- conversations

    def test_a_new_conversation_is_empty(self, store: ConversationStore) -> None:
        made = store.create("a", "one", title="Title", metadata={"model": "m", "n": [1, None]})
        assert made == store.get("a", "one")
        assert (made.id, made.namespace, made.leaf, made.title) == ("one", "a", None, "Title")
        assert made.metadata == {"model": "m", "n": [1, None]}
        assert store.path("a", made.leaf) == []

    def test_ids_are_made_up_when_none_is_given(self, store: ConversationStore) -> None:
        assert len({store.create("a").id for _ in range(20)}) == 20

    def test_an_id_is_taken_once_in_a_namespace(self, store: ConversationStore) -> None:
        store.create("a", "one")
        with pytest.raises(InvalidRequest, match="there is a conversation 'one' already"):
            store.create("a", "one")
        assert store.create("b", "one").key != store.get("a", "one").key

    def test_another_namespaces_conversation_does_not_exist(self, store: ConversationStore) -> None:
        store.create("a", "one")
        turn = say(store, "one", "secret", [1])
        store.create("b", "mine")
        for attempt in (
            lambda: store.get("b", "one"),
            lambda: store.path("b", turn.id),
            lambda: store.append("b", "one", None, [], []).result(),
            lambda: store.append("b", "mine", turn.id, [], []).result(),
            lambda: store.fork("b", "one"),
            lambda: store.fork("b", "mine", turn.id),
            lambda: store.set_leaf("b", "one", None),
            lambda: store.set_leaf("b", "mine", turn.id),
            lambda: store.describe("b", "one", title="mine now", metadata={}),
            lambda: store.delete("b", "one"),
        ):
            with pytest.raises(ConversationNotFound):
                attempt()
        assert [c.id for c in store.list("b")] == ["mine"]
        assert log(store, "one") == [1]
        assert store.get("b", "mine").leaf is None

    def test_what_is_absent_is_not_found(self, store: ConversationStore) -> None:
        with pytest.raises(ConversationNotFound, match="'none'"):
            store.get("a", "none")
        with pytest.raises(ConversationNotFound, match="'none'"):
            store.path("a", "none")
        with pytest.raises(ConversationNotFound, match="'none'"):
            store.delete("a", "none")

    def test_listing_goes_by_use(self, store: ConversationStore) -> None:
        for name in ("one", "two", "three"):
            store.create("a", name)
        say(store, "one", "again", [1])
        assert [c.id for c in store.list("a")] == ["one", "three", "two"]
        assert [c.id for c in store.list("a", limit=1, offset=1)] == ["three"]
        assert store.list("a", offset=3) == []
        assert store.list("nobody") == []
        with pytest.raises(InvalidRequest, match="limit=-1"):
            store.list("a", limit=-1)

    def test_descriptions_can_be_replaced(self, store: ConversationStore) -> None:
        store.create("a", "one", title="old")
        assert store.describe("a", "one", title=None, metadata={"k": 1}) == store.get("a", "one")
        assert (store.get("a", "one").title, store.get("a", "one").metadata) == (None, {"k": 1})

    def test_metadata_is_what_json_holds(self, store: ConversationStore) -> None:
        for metadata in ({"k": object()}, {"k": float("nan")}):
            with pytest.raises(InvalidRequest, match="metadata"):
                store.create("a", metadata=metadata)
        with pytest.raises(InvalidRequest, match="Unicode"):
            store.create("a", "\ud800")

    # -- turns

    def test_turns_follow_each_other(self, store: ConversationStore) -> None:
        store.create("a", "one")
        first = say(store, "one", "hi", [1, 2, 3], reply_reason="stop")
        second = say(store, "one", "bye", [4, 5], reply_reason="length")
        assert store.path("a", second.id) == [first, second]
        assert (first.parent, second.parent, first.start, second.start, second.stop) == (
            None,
            first.id,
            0,
            3,
            5,
        )
        assert log(store, "one") == [1, 2, 3, 4, 5]
        assert path_messages([first, second]) == [Message("user", "hi"), Message("user", "bye")]
        conversation = store.get("a", "one")
        assert conversation.leaf == second.id
        assert conversation.updated_s == second.created_s

    @settings(max_examples=25, deadline=None, suppress_health_check=INHERITED)
    @given(
        messages=st.lists(
            st.builds(
                Message, st.sampled_from(["system", "user", "tool"]), st.text() | st.just("\ud800\x00")
            ),
            max_size=4,
        ),
        token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=40),
        title=st.none() | st.text(),
    )
    def test_anything_said_comes_back(
        self, store: ConversationStore, messages: list[Message], token_ids: list[int], title: str | None
    ) -> None:
        id = store.create("a", title=title, metadata={title or "": title}).id
        turn = store.append("a", id, None, messages, token_ids).result(timeout=30)
        assert store.path("a", turn.id) == [turn]
        assert (turn.messages, turn.token_ids) == (tuple(messages), tuple(token_ids))
        assert (store.get("a", id).title, store.get("a", id).metadata) == (title, {title or "": title})

    def test_a_turn_may_be_empty(self, store: ConversationStore) -> None:
        store.create("a", "one")
        turn = store.append("a", "one", None, [], []).result(timeout=30)
        assert store.path("a", turn.id) == [turn]
        assert log(store, "one") == []

    def test_a_rewritten_history_keeps_the_messages(self, store: ConversationStore) -> None:
        store.create("a", "one")
        say(store, "one", "hi", [1, 2, 3, 4])
        say(store, "one", "there", [5, 6])
        rewritten = say(store, "one", "again", [7, 8, 9], start=2)
        after = say(store, "one", "on", [10])
        assert (rewritten.start, rewritten.stop, after.start) == (2, 5, 5)
        assert log(store, "one") == [1, 2, 7, 8, 9, 10]
        assert [m.content for m in path_messages(store.path("a", after.id))] == ["hi", "there", "again", "on"]
        assert path_tokens(store.path("a", rewritten.parent)) == [
            1,
            2,
            3,
            4,
            5,
            6,
        ]  # the branch point is as it was
        whole = say(store, "one", "all anew", [0], start=0)
        assert path_tokens(store.path("a", whole.id)) == [0]

    @pytest.mark.parametrize(
        ("options", "said"), [({"start": 4}, r"\[0, 3\].*got 4"), ({"start": -1}, r"\[0, 3\].*got -1")]
    )
    def test_a_turn_starts_within_its_path(
        self, store: ConversationStore, options: dict[str, int], said: str
    ) -> None:
        store.create("a", "one")
        turn = say(store, "one", "hi", [1, 2, 3])
        with pytest.raises(InvalidRequest, match=said):
            say(store, "one", "no", [4], **options)
        assert store.get("a", "one").leaf == turn.id

    @pytest.mark.parametrize("wrong", [-1, 2**32, 1.5])
    def test_token_ids_are_ids(self, store: ConversationStore, wrong: Any) -> None:
        store.create("a", "one")
        with pytest.raises(InvalidRequest, match=f"got {wrong}"):
            store.append("a", "one", None, [], [1, wrong]).result(timeout=30)

    def test_a_changed_list_changes_nothing_stored(self, store: ConversationStore) -> None:
        store.create("a", "one")
        token_ids, messages = [1, 2], user("hi")
        future = store.append("a", "one", None, messages, token_ids)
        token_ids[:], messages[:] = [], []
        turn = future.result(timeout=30)
        assert store.path("a", turn.id) == [turn]
        assert (turn.token_ids, turn.messages, turn.stop) == ((1, 2), (Message("user", "hi"),), 2)

    # -- branches and forks

    def test_an_old_parent_begins_a_branch(self, store: ConversationStore) -> None:
        store.create("a", "one")
        root = say(store, "one", "hi", [1])
        left = say(store, "one", "left", [2])
        right = store.append("a", "one", root.id, user("right"), [3]).result(timeout=30)
        assert store.get("a", "one").leaf == right.id
        assert log(store, "one") == [1, 3]
        assert path_tokens(store.path("a", left.id)) == [1, 2]
        store.set_leaf("a", "one", left.id)
        assert log(store, "one") == [1, 2]
        store.set_leaf("a", "one", None)
        assert log(store, "one") == []

    def test_a_fork_shares_and_then_goes_its_own_way(self, store: ConversationStore) -> None:
        store.create("a", "one", title="T", metadata={"k": 1})
        root = say(store, "one", "hi", [1])
        say(store, "one", "there", [2])
        fork = store.fork("a", "one", new_id="two")
        early = store.fork("a", "one", root.id)
        assert (fork.id, fork.title, fork.metadata, fork.leaf) == (
            "two",
            "T",
            {"k": 1},
            store.get("a", "one").leaf,
        )
        say(store, "two", "forked", [3])
        say(store, "one", "original", [4])
        assert (log(store, "one"), log(store, "two"), log(store, early.id)) == ([1, 2, 4], [1, 2, 3], [1])
        with pytest.raises(InvalidRequest, match="'two' already"):
            store.fork("a", "one", new_id="two")

    def test_deleting_leaves_what_others_need(self, store: ConversationStore) -> None:
        store.create("a", "one")
        root = say(store, "one", "hi", [1])
        shared = say(store, "one", "there", [2])
        store.fork("a", "one", new_id="two")
        mine = say(store, "one", "mine", [3])
        branch = store.append("a", "one", root.id, user("branch"), [4]).result(timeout=30)
        theirs = say(store, "two", "theirs", [5])
        store.delete("a", "one")
        with pytest.raises(ConversationNotFound):
            store.get("a", "one")
        for gone in (mine, branch):
            with pytest.raises(ConversationNotFound):
                store.path("a", gone.id)
        assert log(store, "two") == [1, 2, 5]
        store.delete("a", "two")
        for gone in (root, shared, theirs):
            with pytest.raises(ConversationNotFound):
                store.path("a", gone.id)

    def test_deleting_the_fork_leaves_the_original(self, store: ConversationStore) -> None:
        store.create("a", "one")
        say(store, "one", "hi", [1])
        store.fork("a", "one", new_id="two")
        extra = say(store, "two", "more", [2])
        store.delete("a", "two")
        assert log(store, "one") == [1]
        with pytest.raises(ConversationNotFound):
            store.path("a", extra.id)

    def test_a_deleted_id_begins_anew(self, store: ConversationStore) -> None:
        store.create("a", "one")
        say(store, "one", "hi", [1])
        store.fork("a", "one", new_id="two")
        store.delete("a", "one")
        store.create("a", "one")
        assert log(store, "one") == []
        store.delete("a", "one")
        assert log(store, "two") == [1]

    @settings(max_examples=20, deadline=None, suppress_health_check=INHERITED)
    @given(data=st.data())
    def test_any_history_agrees_with_a_model_in_plain_python(
        self, new_store: Callable[[], ConversationStore], data: st.DataObject
    ) -> None:
        store = new_store()
        logs: dict[str, list[int]] = {}  # turn -> its path's log
        parents: dict[str, str | None] = {}
        owners: dict[str, str] = {}
        leaves: dict[str, str | None] = {}
        for step in range(data.draw(st.integers(5, 25))):
            alive = list(logs)  # in the order they were made: ids are random
            action = data.draw(
                st.sampled_from(["create", "append", "append", "branch", "fork", "point", "delete"])
            )
            if action == "create" or not leaves:
                leaves[store.create("a", f"c{step}").id] = None
                continue
            id = data.draw(st.sampled_from(sorted(leaves)))
            at = (
                data.draw(st.sampled_from(alive))
                if alive and action in ("branch", "fork", "point")
                else leaves[id]
            )
            if action in ("append", "branch"):
                before = logs[at] if at is not None else []
                start = data.draw(st.none() | st.integers(0, len(before)))
                turn = store.append("a", id, at, user(str(step)), [step], start=start).result(timeout=30)
                logs[turn.id] = [*before[: len(before) if start is None else start], step]
                parents[turn.id], owners[turn.id], leaves[id] = at, id, turn.id
            elif action == "fork":
                leaves[store.fork("a", id, at, new_id=f"c{step}").id] = at
            elif action == "point":
                leaves[store.set_leaf("a", id, at).id] = at
            else:
                store.delete("a", id)
                del leaves[id]
                heirs: dict[str, str] = {}
                for heir in leaves:  # in the order they were made
                    for turn_id in [*(t for t in logs if owners[t] == heir), leaves[heir]]:
                        while turn_id is not None:
                            heirs.setdefault(turn_id, heir)
                            turn_id = parents[turn_id]
                for turn_id in [t for t in logs if owners[t] == id]:
                    if turn_id in heirs:
                        owners[turn_id] = heirs[turn_id]
                        continue
                    del logs[turn_id]
                    with pytest.raises(ConversationNotFound):
                        store.path("a", turn_id)
            assert {c.id: c.leaf for c in store.list("a")} == leaves
            assert {turn_id: path_tokens(store.path("a", turn_id)) for turn_id in logs} == logs
        store.close()

    # -- what a turn keeps

    def test_messages_keep_all_their_fields(self, store: ConversationStore) -> None:
        store.create("a", "one")
        said = [
            Message("user", "What is 1 + 1? \x00 \ud800"),
            Message(
                "assistant", "", (ToolCall("c1", "add", '{"a": 1}'), ToolCall("c2", "add", "no JSON \x00"))
            ),
            Message("tool", "2", tool_call_id="c1", name="add"),
            Message("assistant", "2."),
        ]
        turn = store.append("a", "one", None, said, [1]).result(timeout=30)
        assert store.turn("a", turn.id) == turn
        assert turn.messages == tuple(said)
        assert turn.digest == path_digests(said)[-1]

    def test_a_turn_carries_the_hash_of_its_whole_path(self, store: ConversationStore) -> None:
        store.create("a", "one")
        root = say(store, "one", "hi", [1])
        branches = [
            store.append("a", "one", root.id, user(text), [2]).result(timeout=30)
            for text in ("left", "right")
        ]
        empty = store.append("a", "one", branches[1].id, [], []).result(timeout=30)
        assert [branch.digest for branch in branches] == [
            path_digests(user("hi") + user(text))[-1] for text in ("left", "right")
        ]
        assert empty.digest == branches[1].digest
        assert [turn.digest for turn in store.path("a", empty.id)] == [
            root.digest,
            branches[1].digest,
            empty.digest,
        ]

    def test_a_turn_keeps_the_callers_id_and_meta(self, store: ConversationStore) -> None:
        store.create("a", "one")
        turn = say(store, "one", "hi", [1], turn_id="resp_1", meta={"model": "m", "list": [1, None]})
        assert (turn.id, turn.meta) == ("resp_1", {"model": "m", "list": [1, None]})
        assert store.turn("a", "resp_1") == turn
        assert say(store, "one", "there", [2]).meta == {}
        for namespace, id in (("a", "one"), ("b", "other")):
            if namespace == "b":
                store.create("b", "other")
            with pytest.raises(InvalidRequest, match="'resp_1' is taken"):
                store.append(namespace, id, None, user("again"), [3], turn_id="resp_1").result(timeout=30)
        assert log(store, "one") == [1, 2]

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"meta": {"k": object()}}, "a turn's meta"),
            ({"turn_id": "\ud800"}, "turn id must be valid Unicode"),
            ({"turn_id": "x" * 1025}, "turn id must be at most 1024 bytes long, got 1025"),
        ],
    )
    def test_what_no_column_holds_is_refused(
        self, store: ConversationStore, options: dict[str, Any], said: str
    ) -> None:
        store.create("a", "one")
        with pytest.raises(InvalidRequest, match=said):
            say(store, "one", "hi", [1], **options)
        assert store.get("a", "one").leaf is None

    @pytest.mark.parametrize("name", ["\x00", "\ud800", "x\x00y"])
    def test_names_that_cannot_be_are_not_found(self, store: ConversationStore, name: str) -> None:
        with pytest.raises(InvalidRequest, match="valid Unicode without NUL"):
            store.create("a", name)
        for lookup in (store.get, store.turn, store.path):
            for namespace, id in (("a", name), (name, "one")):
                with pytest.raises(ConversationNotFound):
                    lookup(namespace, id)
        assert (store.list(name), store.count(name), store.leaves("a", name)) == ([], 0, [])
        assert store.find(name, [b"x"]) is None

    def test_turns_are_looked_up_by_namespace(self, store: ConversationStore) -> None:
        store.create("a", "one")
        turn = say(store, "one", "hi", [1])
        with pytest.raises(ConversationNotFound, match=turn.id):
            store.turn("b", turn.id)
        assert store.leaves("b", turn.id) == []
        with pytest.raises(ConversationNotFound):
            store.delete_turn("b", turn.id)

    def test_leaves_are_the_conversations_that_end_there(self, store: ConversationStore) -> None:
        store.create("a", "one")
        turn = say(store, "one", "hi", [1])
        store.fork("a", "one", new_id="two")
        assert [c.id for c in store.leaves("a", turn.id)] == ["two", "one"]
        store.set_leaf("a", "one", turn.id)  # used again
        assert [c.id for c in store.leaves("a", turn.id)] == ["one", "two"]
        say(store, "one", "on", [2])
        assert [c.id for c in store.leaves("a", turn.id)] == ["two"]
        assert store.leaves("a", "none") == []

    # -- recognising a history

    def test_a_resent_history_is_recognised(self, store: ConversationStore) -> None:
        store.create("a", "one")
        turns = []
        history: list[Message] = []
        for i in range(3):
            said = [Message("user", f"q{i}"), Message("assistant", f"a{i}")]
            turns.append(
                store.append("a", "one", turns[-1].id if turns else None, said, [i]).result(timeout=30)
            )
            history += said
        asked = [*history, Message("user", "next")]
        assert store.find("a", path_digests(asked)) == (5, turns[2])
        assert store.find("a", path_digests(asked[:5])) == (3, turns[1])  # "a2" was edited away
        assert store.find("a", path_digests([*history[:2], Message("user", "other")])) == (1, turns[0])
        assert store.find("a", path_digests([Message("user", "never said")])) is None
        assert store.find("a", path_digests(asked[1:])) is None  # the same words, but not from the beginning
        assert store.find("a", []) is None
        assert store.find("b", path_digests(asked)) is None

    def test_of_equal_histories_a_leaf_is_found_then_the_newest(self, store: ConversationStore) -> None:
        digests = path_digests(user("hi"))
        made = []
        for i in range(3):
            store.create("a", f"c{i}")
            made.append(say(store, f"c{i}", "hi", [i]))
        assert store.find("a", digests) == (0, made[2])
        for i in (2, 1):
            say(store, f"c{i}", "on", [9])
            assert store.find("a", digests) == (0, made[i - 1])
        say(store, "c0", "on", [9])
        assert store.find("a", digests) == (0, made[2])

    def test_a_long_history_is_found_wherever_it_ends(self, store: ConversationStore) -> None:
        history = [Message("user", str(i)) for i in range(1201)]
        digests = path_digests(history)
        store.create("a", "one")
        parent: str | None = None
        known = []
        for stop in (1, 500, 501, 700, 701, 1201):
            before = known[-1][0] if known else 0
            turn = store.append("a", "one", parent, history[before:stop], [stop]).result(timeout=30)
            known.append((stop, turn))
            parent = turn.id
        for stop, turn in known:
            assert store.find("a", digests[:stop]) == (stop - 1, turn)
        assert store.find("a", digests[:1200]) == (700, known[4][1])
        assert store.find("a", digests[:499]) == (0, known[0][1])

    # -- drafts

    def test_a_draft_is_no_turn_and_goes_when_its_turn_comes(self, store: ConversationStore) -> None:
        store.create("a", "one")
        root = say(store, "one", "hi", [1])
        store.draft("a", "one", root.id, "t", user("q"), [2, 3], 1, 3, {"k": 1}, owner="me").result(
            timeout=30
        )
        store.extend_draft("t", [4], "An ans").result(timeout=30)
        assert store.get("a", "one").leaf == root.id
        with pytest.raises(ConversationNotFound):
            store.turn("a", "t")
        turn = store.append(
            "a", "one", root.id, [*user("q"), Message("assistant", "An answer")], [2, 3, 4, 5], turn_id="t"
        ).result(timeout=30)
        assert store.recover_drafts() == 0
        assert store.path("a", "t") == [root, turn]
        with pytest.raises(ConversationNotFound, match="'t' under way"):
            store.extend_draft("t", [6], "!").result(timeout=30)

    def test_an_interrupted_answer_becomes_a_branch(self, store: ConversationStore) -> None:
        store.create("a", "one")
        root = say(store, "one", "hi", [1])
        store.draft("a", "one", root.id, "t", user("q"), [2, 3], None, 3, {"k": 1})
        for ids, text in (([4, 5], "An "), ([], "\ud83d\x00"), ([6], "")):
            store.extend_draft("t", ids, text).result(timeout=30)
        assert store.recover_drafts() == 1
        turn = store.turn("a", "t")
        assert (turn.parent, turn.token_ids, turn.start, turn.reply_reason, turn.meta) == (
            root.id,
            (2, 3, 4, 5, 6),
            1,
            INTERRUPTED,
            {"k": 1},
        )
        assert turn.messages == (Message("user", "q"), Message("assistant", "An \ud83d\x00"))
        assert turn.digest == path_digests(path_messages([root, turn]))[-1]
        assert store.get("a", "one").leaf == root.id
        assert store.leaves("a", "t") == []
        assert store.recover_drafts() == 0
        on = store.append("a", "one", "t", user("go on"), [7]).result(timeout=30)
        assert path_tokens(store.path("a", on.id)) == [1, 2, 3, 4, 5, 6, 7]
        assert store.find("a", [turn.digest]) == (0, turn)

    def test_an_answer_that_had_not_begun_is_recovered_empty(self, store: ConversationStore) -> None:
        store.create("a", "one")
        store.draft("a", "one", None, "t", user("q"), [1], None, 1).result(timeout=30)
        assert store.recover_drafts() == 1
        assert store.turn("a", "t").messages == (Message("user", "q"), Message("assistant", ""))

    def test_a_draft_that_begins_anew_forgets_what_it_had(self, store: ConversationStore) -> None:
        store.create("a", "one")
        for text in ("old", "new"):
            store.draft("a", "one", None, "t", user(text), [1], 0, 1)
            store.extend_draft("t", [2], text).result(timeout=30)
        store.recover_drafts()
        assert [message.content for message in store.turn("a", "t").messages] == ["new", "new"]
        assert store.turn("a", "t").token_ids == (1, 2)

    def test_a_discarded_draft_is_gone(self, store: ConversationStore) -> None:
        store.create("a", "one")
        store.draft("a", "one", None, "t", user("q"), [1], 0, 1)
        store.extend_draft("t", [2], "x")
        store.discard_draft("t").result(timeout=30)
        store.discard_draft("t").result(timeout=30)
        assert store.recover_drafts() == 0
        with pytest.raises(ConversationNotFound):
            store.turn("a", "t")

    def test_only_a_dead_owners_drafts_are_recovered(self, store: ConversationStore) -> None:
        store.create("a", "one")
        for owner in ("dead", "alive"):
            store.draft("a", "one", None, owner, user("q"), [1], 0, 1, owner=owner).result(timeout=30)
        assert store.recover_drafts("dead") == 1
        assert store.turn("a", "dead").reply_reason == INTERRUPTED
        store.extend_draft("alive", [2], "goes on").result(timeout=30)
        assert store.recover_drafts("another") == 0
        assert store.recover_drafts() == 0  # the other's lease has not been ended
        assert store.recover_drafts("alive") == 1

    def test_drafts_go_with_their_conversation_and_hold_what_they_follow(
        self, store: ConversationStore
    ) -> None:
        store.create("a", "one")
        root = say(store, "one", "hi", [1])
        store.create("a", "two")
        store.draft("a", "one", root.id, "mine", user("q"), [2], 1, 2)
        store.draft("a", "two", root.id, "theirs", user("q"), [3], 1, 2).result(timeout=30)
        store.delete("a", "one")
        assert store.recover_drafts() == 1
        assert store.path("a", "theirs")[0] == root  # it became the other's
        store.draft("a", "two", root.id, "last", user("q"), [2], 1, 2).result(timeout=30)
        store.delete("a", "two")
        assert store.recover_drafts() == 0
        with pytest.raises(ConversationNotFound):
            store.turn("a", root.id)

    def test_a_draft_is_checked_as_a_turn_is(self, store: ConversationStore) -> None:
        store.create("a", "one")
        store.create("a", "two")
        turn = say(store, "one", "hi", [1])
        store.draft("a", "one", None, "t", [], [], None, 0).result(timeout=30)
        for attempt, error, said in (
            (lambda: store.draft("a", "none", None, "u", [], [], None, 0), ConversationNotFound, "'none'"),
            (lambda: store.draft("b", "one", None, "u", [], [], None, 0), ConversationNotFound, "'one'"),
            (lambda: store.draft("a", "one", "none", "u", [], [], None, 0), ConversationNotFound, "'none'"),
            (lambda: store.draft("a", "one", turn.id, "u", [], [], 2, 2), InvalidRequest, r"\[0, 1\].*got 2"),
            (
                lambda: store.draft("a", "one", turn.id, "u", [], [5], 1, 0),
                InvalidRequest,
                r"output_start.*\[1, 2\].*got 0",
            ),
            (
                lambda: store.draft("a", "one", turn.id, "u", [], [5], 1, 3),
                InvalidRequest,
                r"output_start.*\[1, 2\].*got 3",
            ),
            (lambda: store.draft("a", "one", None, turn.id, [], [], None, 0), InvalidRequest, "is taken"),
            (lambda: store.draft("a", "two", None, "t", [], [], None, 0), InvalidRequest, "'t' is taken"),
            (lambda: store.append("a", "two", None, [], [], turn_id="t"), InvalidRequest, "'t' is taken"),
            (lambda: store.draft("a", "one", None, "u", [], [-1], None, 0), InvalidRequest, "got -1"),
            (lambda: store.extend_draft("t", [-1], ""), InvalidRequest, "got -1"),
            (lambda: store.extend_draft("u", [1], ""), ConversationNotFound, "'u' under way"),
        ):
            with pytest.raises(error, match=said):
                attempt().result(timeout=30)

    def test_a_failed_append_keeps_the_draft(self, store: ConversationStore) -> None:
        store.create("a", "one")
        store.draft("a", "one", None, "t", user("q"), [1], 0, 1).result(timeout=30)
        with pytest.raises(InvalidRequest):
            store.append("a", "one", None, user("q"), [1], start=5, turn_id="t").result(timeout=30)
        assert store.recover_drafts() == 1

    # -- claims

    def test_the_first_claim_holds(self, store: ConversationStore) -> None:
        assert store.claim("a", "key", b"print", "t1") == Claim("t1", b"print", fresh=True)
        assert store.claim("a", "key", b"other", "t2") == Claim("t1", b"print", fresh=False)
        assert store.claim("b", "key", b"other", "t2").fresh
        store.release("a", "key")
        store.release("a", "key")
        assert store.claim("a", "key", b"other", "t2") == Claim("t2", b"other", fresh=True)

    def test_of_many_claims_at_once_one_is_fresh(self, store: ConversationStore) -> None:
        with ThreadPoolExecutor(8) as pool:
            claims = list(pool.map(lambda i: store.claim("a", "key", b"", f"t{i}"), range(24)))
        assert sum(claim.fresh for claim in claims) == 1
        assert {claim.turn_id for claim in claims} == {claim.turn_id for claim in claims if claim.fresh}

    def test_claims_end_after_a_day_or_when_purged(self, store: ConversationStore) -> None:
        store.claim("a", "key", b"", "t1", now_s=1000.0)
        assert not store.claim("a", "key", b"", "t2", now_s=1000.0 + CLAIM_S - 1).fresh
        assert store.claim("a", "key", b"", "t2", now_s=1000.0 + CLAIM_S).fresh
        store.claim("a", "old", b"", "t3", now_s=500.0)
        assert store.purge(1000.0) == 1
        assert store.purge(1000.0) == 0
        assert store.claim("a", "old", b"", "t4", now_s=600.0).fresh
        with pytest.raises(InvalidRequest, match="idempotency key"):
            store.claim("a", "\x00", b"", "t")

    # -- time to live

    def test_conversations_expire_unless_pinned(self, store: ConversationStore) -> None:
        begun_s = time.time()
        for namespace, name, ttl_s in (
            ("a", "late", 300.0),
            ("b", "soon", 100.0),
            ("a", "never", None),
            ("a", "pinned", 110.0),
        ):
            store.create(namespace, name)
            assert store.set_ttl(namespace, name, ttl_s) == store.get(namespace, name)
            found = store.get(namespace, name)
            assert found.ttl_s == ttl_s and (
                found.expires_s is None
                if ttl_s is None
                else begun_s + ttl_s <= found.expires_s < begun_s + ttl_s + 5
            )
        assert store.set_pinned("a", "pinned", True).pinned
        assert store.expired(begun_s + 99.9) == []
        assert [c.id for c in store.expired(begun_s + 105)] == ["soon"]
        assert [c.id for c in store.expired(begun_s + 1000)] == ["soon", "late"]
        assert [c.id for c in store.expired(begun_s + 1000, limit=1)] == ["soon"]
        assert store.set_ttl("a", "late", None).expires_s is None
        assert not store.set_pinned("a", "pinned", False).pinned
        assert [c.id for c in store.expired(begun_s + 1000)] == ["soon", "pinned"]
        assert {c.id for c in store.list("a")} == {"late", "never", "pinned"}

    def test_each_use_begins_the_time_to_live_anew(self, store: ConversationStore) -> None:
        def until(name: str) -> float:
            expires_s = store.get("a", name).expires_s
            assert expires_s is not None
            return expires_s

        store.create("a", "one")
        store.set_ttl("a", "one", 100.0)
        for use in (
            lambda: store.touch("a", "one").result(timeout=30),  # a turn begins
            lambda: store.draft("a", "one", None, "t", user("q"), [1], 0, 1).result(
                timeout=30
            ),  # has its first token
            lambda: store.append("a", "one", None, user("q"), [1], turn_id="t").result(timeout=30),  # ends
            lambda: store.set_ttl("a", "one", 100.0),
        ):
            before = until("one")
            time.sleep(0.002)
            use()
            assert before < until("one") <= time.time() + 100.0
        before = until("one")
        store.path("a", "t"), store.list("a"), store.describe("a", "one", title="read", metadata={})
        assert until("one") == before  # neither reading nor describing is a use
        store.create("a", "two")
        store.touch("a", "two").result(timeout=30)
        say(store, "two", "hi", [1])
        assert store.get("a", "two").expires_s is None

    def test_a_conversation_that_is_being_answered_does_not_expire(self, store: ConversationStore) -> None:
        store.create("a", "one")
        store.set_ttl("a", "one", 10.0)
        store.draft("a", "one", None, "t", user("q"), [1], 0, 1, owner="me").result(timeout=30)
        assert store.expired(time.time() + 1000) == []
        store.discard_draft("t").result(timeout=30)
        assert [c.id for c in store.expired(time.time() + 1000)] == ["one"]

    def test_a_fork_lives_as_long_as_its_origin_and_is_not_pinned(self, store: ConversationStore) -> None:
        store.create("a", "one")
        store.set_ttl("a", "one", 100.0)
        store.set_pinned("a", "one", True)
        fork = store.fork("a", "one")
        assert (fork.ttl_s, fork.pinned) == (100.0, False)
        assert fork.expires_s == fork.created_s + 100.0

    def test_ttl_and_pins_are_checked(self, store: ConversationStore) -> None:
        store.create("a", "one")
        for attempt in (lambda: store.set_ttl("b", "one", 1.0), lambda: store.set_pinned("b", "one", True)):
            with pytest.raises(ConversationNotFound):
                attempt()
        for wrong in (float("nan"), float("inf"), -1.0):
            with pytest.raises(InvalidRequest, match="ttl_s"):
                store.set_ttl("a", "one", wrong)
        with pytest.raises(InvalidRequest, match="limit"):
            store.expired(0.0, limit=-1)

    def test_conversations_are_counted(self, store: ConversationStore) -> None:
        for namespace, name in (("a", "one"), ("a", "two"), ("b", "one")):
            store.create(namespace, name)
        store.delete("a", "two")
        assert [store.count(namespace) for namespace in ("a", "b", "c")] == [1, 1, 0]

    # -- erasing

    def test_erasing_says_what_went(self, store: ConversationStore) -> None:
        store.create("a", "one")
        root = say(store, "one", "hi", [1])
        store.fork("a", "one", new_id="two")
        say(store, "one", "mine", [1, 2], turn_id="t", meta={"k": 1})
        store.draft("a", "one", root.id, "d", user("q"), [9], 1, 2)
        store.extend_draft("d", [9, 9], "xy").result(timeout=30)
        store.claim("a", "key", b"", "t")
        store.claim("a", "draft", b"", "d")
        store.claim("a", "kept", b"", root.id)
        erased = store.erase("a", "one")
        sizes = [
            *(len('[["user", "mine"]]'), 2 * 4, len('{"k": 1}')),  # the turn
            *(len('[["user", "q"]]'), 4, len("{}"), 2 * 4, len('"xy"')),  # the draft
        ]
        assert (erased.turns, erased.bytes) == (1, sum(sizes))
        with pytest.raises(ConversationNotFound):
            store.get("a", "one")
        for gone in ("t", "d"):
            with pytest.raises(ConversationNotFound):
                store.turn("a", gone)
        assert store.recover_drafts() == 0
        assert store.claim("a", "key", b"", "new").fresh
        assert store.claim("a", "draft", b"", "new").fresh
        assert not store.claim("a", "kept", b"", "new").fresh
        assert store.path("a", store.get("a", "two").leaf) == [root]
        with pytest.raises(ConversationNotFound):
            store.erase("a", "one")

    def test_a_turn_that_is_not_needed_can_be_deleted(self, store: ConversationStore) -> None:
        store.create("a", "one")
        root = say(store, "one", "hi", [1])
        last = say(store, "one", "there", [2])
        store.claim("a", "key", b"", last.id)
        assert store.delete_turn("a", last.id)
        assert store.get("a", "one").leaf == root.id
        assert store.claim("a", "key", b"", "new").fresh
        with pytest.raises(ConversationNotFound):
            store.turn("a", last.id)
        branch = say(store, "one", "branch", [3])
        store.set_leaf("a", "one", root.id)
        assert store.delete_turn("a", branch.id)
        assert store.get("a", "one").leaf == root.id
        assert store.delete_turn("a", root.id)
        assert store.get("a", "one").leaf is None

    @pytest.mark.parametrize("dependent", ["turn", "conversation", "draft"])
    def test_a_turn_that_is_needed_is_marked(self, store: ConversationStore, dependent: str) -> None:
        store.create("a", "one")
        turn = say(store, "one", "hi", [1], meta={"k": 1})
        if dependent == "turn":
            say(store, "one", "on", [2])
        elif dependent == "conversation":
            store.fork("a", "one")
        else:
            store.draft("a", "one", turn.id, "d", [], [], None, 1).result(timeout=30)
        leaf = store.get("a", "one").leaf
        assert not store.delete_turn("a", turn.id)
        assert store.turn("a", turn.id) == replace(turn, meta={"k": 1, "deleted": True})
        assert store.get("a", "one").leaf == leaf
        assert not store.delete_turn("a", turn.id)

    # -- threads and ends

    def test_many_threads_at_once(self, store: ConversationStore) -> None:
        def converse(name: str) -> None:
            store.create("a", name)
            for number in range(15):
                say(store, name, str(number), [number])
                assert log(store, name) == list(range(number + 1))

        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(converse, f"c{i}") for i in range(8)]:
                done.result(timeout=60)
        assert all(log(store, c.id) == list(range(15)) for c in store.list("a"))

    def test_appends_to_one_parent_at_once_make_branches(self, store: ConversationStore) -> None:
        store.create("a", "one")
        root = say(store, "one", "hi", [0])
        futures = [store.append("a", "one", root.id, user(str(i)), [i]) for i in range(40)]
        turns = [future.result(timeout=30) for future in futures]
        assert all(path_tokens(store.path("a", turn.id)) == [0, i] for i, turn in enumerate(turns))
        assert store.get("a", "one").leaf == turns[-1].id  # in the order of the calls

    def test_a_failed_append_takes_no_other_down(self, store: ConversationStore) -> None:
        store.create("a", "one")
        parents = [None, "nowhere", None, "nowhere", None]
        futures = [store.append("a", "one", parent, user("x"), [1]) for parent in parents]
        wait(futures, timeout=30)
        assert [type(future.exception()) for future in futures] == [type(None), ConversationNotFound] * 2 + [
            type(None)
        ]
        assert log(store, "one") == [1]

    def test_an_append_is_readable_when_it_is_acknowledged(self, store: ConversationStore) -> None:
        """Also from its future's callback, which runs on the store's own thread."""
        store.create("a", "one")
        seen: list[object] = []
        done = threading.Event()

        def acknowledged(future: Any) -> None:
            try:
                seen.append(log(store, "one"))
                store.describe("a", "one", title="from the callback", metadata={})
                seen.append(store.get("a", "one").title)
            finally:
                done.set()

        store.append("a", "one", None, user("hi"), [1, 2]).add_done_callback(acknowledged)
        assert done.wait(30)
        assert seen == [[1, 2], "from the callback"]

    def test_closing_finishes_what_was_queued(self, store: ConversationStore) -> None:
        store.create("a", "one")
        futures = [store.append("a", "one", None, user(str(i)), [i]) for i in range(100)]
        store.close()
        store.close()
        assert all(future.result(timeout=0).token_ids == (i,) for i, future in enumerate(futures))
        for attempt in (
            lambda: store.get("a", "one"),
            lambda: store.create("a", "two"),
            lambda: store.append("a", "one", None, [], []).result(timeout=5),
        ):
            with pytest.raises(StoreError, match="is closed"):
                attempt()
