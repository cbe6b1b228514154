"""What every conversation store promises. A store's test class inherits this one and says how to open it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pensieve.chat import Message
from pensieve.errors import ConversationNotFound, InvalidRequest, StoreError
from pensieve.store import ConversationStore, Turn, path_messages, path_tokens

# Fixtures are shared by the examples on purpose (each begins with names or a store of its own), and so are tests by classes.
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
        assert (first.parent, second.parent, first.start, second.start, second.stop) == (None, first.id, 0, 3, 5)
        assert log(store, "one") == [1, 2, 3, 4, 5]
        assert path_messages([first, second]) == [Message("user", "hi"), Message("user", "bye")]
        conversation = store.get("a", "one")
        assert conversation.leaf == second.id
        assert conversation.updated_s == second.created_s

    @settings(max_examples=25, deadline=None, suppress_health_check=INHERITED)
    @given(
        messages=st.lists(st.builds(Message, st.sampled_from(["system", "user", "tool"]), st.text() | st.just("\ud800\x00")), max_size=4),
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
        assert path_tokens(store.path("a", rewritten.parent)) == [1, 2, 3, 4, 5, 6]  # the branch point is as it was
        whole = say(store, "one", "all anew", [0], start=0)
        assert path_tokens(store.path("a", whole.id)) == [0]

    @pytest.mark.parametrize(("options", "said"), [({"start": 4}, r"\[0, 3\].*got 4"), ({"start": -1}, r"\[0, 3\].*got -1")])
    def test_a_turn_starts_within_its_path(self, store: ConversationStore, options: dict[str, int], said: str) -> None:
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
        assert (fork.id, fork.title, fork.metadata, fork.leaf) == ("two", "T", {"k": 1}, store.get("a", "one").leaf)
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
    def test_any_history_agrees_with_a_model_in_plain_python(self, new_store: Callable[[], ConversationStore], data: st.DataObject) -> None:
        store = new_store()
        logs: dict[str, list[int]] = {}  # turn -> its path's log
        parents: dict[str, str | None] = {}
        owners: dict[str, str] = {}
        leaves: dict[str, str | None] = {}
        for step in range(data.draw(st.integers(5, 25))):
            alive = list(logs)  # in the order they were made: ids are random
            action = data.draw(st.sampled_from(["create", "append", "append", "branch", "fork", "point", "delete"]))
            if action == "create" or not leaves:
                leaves[store.create("a", f"c{step}").id] = None
                continue
            id = data.draw(st.sampled_from(sorted(leaves)))
            at = data.draw(st.sampled_from(alive)) if alive and action in ("branch", "fork", "point") else leaves[id]
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
        assert [type(future.exception()) for future in futures] == [type(None), ConversationNotFound] * 2 + [type(None)]
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
