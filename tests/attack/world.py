"""What every check is handed: a folder, the tiny model, servers, and the watch over one while it is attacked. Knows limits and processes."""

from __future__ import annotations

import contextlib
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from beside import Beside
from promises import MAX_CHAT_S, MAX_FAMILY_MB, MAX_GROWTH_MB, MAX_HEALTH_S, NOISE_S, Notes
from served import Served, offered
from wire import Address, post

TENANTS = ("bystander", "mallory", "bob")
SETTLE_S = 0.3  # after an input: what it left to do shows in the probes
WAIT_S = 30.0  # for the server to answer the probes again


class World:
    """One run's surroundings. Closes every server it made."""

    def __init__(self, folder: Path, model: Path, seed: int, quick: bool) -> None:
        self.folder, self.model, self.quick = folder, model, quick
        self.rng = random.Random(seed)
        self._servers: list[Served] = []
        self._shared: dict[str, tuple[Served, Beside]] = {}
        self._count = 0

    # -- servers

    def new_folder(self) -> Path:
        """An empty one."""
        self._count += 1
        folder = self.folder / f"{self._count:03d}"
        folder.mkdir()
        return folder

    @contextlib.contextmanager
    def server(
        self, *options: str, start: bool = True, model: Path | None = None, **keywords: Any
    ) -> Iterator[Served]:
        """A server of one check's own; the shared one ends, since it would be measured too."""
        self.drop_shared()
        server = Served(self.new_folder(), model or self.model, *options, **keywords)
        self._servers.append(server)
        try:
            if start:
                server.start()
            yield server
        finally:
            server.close()
            self._servers.remove(server)
            shutil.rmtree(server.folder, ignore_errors=True)

    def shared(self, *options: str, model: Path | None = None) -> Served:
        """The server that many checks attack one after the other, with keys; a new one if the last did not survive."""
        name = " ".join((str(model or self.model), *options))
        if name in self._shared:
            server, _ = self._shared[name]
            if server.alive:
                return server
            self._drop(name)
        for other in list(self._shared):  # one at a time: they would measure each other
            self._drop(other)
        server = Served(self.new_folder(), model or self.model, *options, tenants=TENANTS)
        self._servers.append(server)
        server.start()
        self._shared[name] = (
            server,
            Beside(server.address.host, server.address.port, server.keys["bystander"]),
        )
        return server

    def drop_shared(self) -> None:
        """End the shared servers: a check needs the machine, or the last one left them ill."""
        for name in list(self._shared):
            self._drop(name)

    def _drop(self, name: str) -> None:
        server, beside = self._shared.pop(name)
        beside.close()
        server.close()
        self._servers.remove(server)

    def close(self) -> None:
        """End everything."""
        self.drop_shared()
        for server in list(self._servers):
            server.close()

    # -- watching

    @contextlib.contextmanager
    def watched(
        self, server: Served, notes: Notes, *, chats: bool = True, max_chat_s: float | None = MAX_CHAT_S
    ) -> Iterator[None]:
        """An attack on a server: /health, memory and the bystander's chats hold while it lasts and just after.

        Args:
            server: shared, or one that the probes are started for.
            notes: where it is told.
            chats: whether a bystander's chats must come to their ends meanwhile.
            max_chat_s: the longest such chat; None: any.
        """
        beside = next((beside for other, beside in self._shared.values() if other is server), None)
        own = beside is None
        if beside is None:
            beside = Beside(server.address.host, server.address.port, server.keys.get("bystander"))
        watch = server.watch
        assert watch is not None
        try:
            time.sleep(SETTLE_S)
            quiet = beside.look()
            front, family, _, _ = watch.look()
            yield
            time.sleep(SETTLE_S)
            seen = self._until_seen(server, beside, chats)
            after, _, front_peak, family_peak = watch.look()
        finally:
            if own:
                beside.close()
        worst = max(seen["worst"].get("fresh", 0.0), seen["worst"].get("kept", 0.0))
        worst_quiet = max(quiet["worst"].get("fresh", 0.0), quiet["worst"].get("kept", 0.0))
        noise, chat_s = seen["worst"].get("noise", 0.0), seen["worst"].get("chat", 0.0)
        growth, others = front_peak - front, family_peak - family
        notes.say(
            f"worst /health {worst:.3f} s (quiet {worst_quiet:.3f}, noise {noise:.3f}); front {front:.0f} -> {front_peak:.0f} -> {after:.0f} MB; "
            f"{seen['count'].get('chat', 0)} chats, worst {chat_s:.2f} s",
            worst_health_s=round(worst, 4), quiet_health_s=round(worst_quiet, 4), noise_s=round(noise, 4), growth_mb=round(growth, 1),
            left_mb=round(after - front, 1), family_growth_mb=round(others, 1), worst_chat_s=round(chat_s, 3),
        )  # fmt: skip
        notes.hold(
            worst <= MAX_HEALTH_S,
            f"/health waited {worst:.3f} s, at most {MAX_HEALTH_S} s may be",
            noise=worst < NOISE_S,
        )
        notes.hold(
            growth <= MAX_GROWTH_MB,
            f"the front end grew by {growth:.0f} MB, at most {MAX_GROWTH_MB:.0f} MB may be",
        )
        notes.hold(
            others <= MAX_FAMILY_MB,
            f"all processes together grew by {others:.0f} MB, at most {MAX_FAMILY_MB:.0f} MB may be",
        )
        for kind, errors in seen["errors"].items():
            if chats or kind != "chat":
                notes.hold(
                    not errors,
                    f"{len(errors)} of the bystander's {kind} requests failed: {'; '.join(errors[:2])[:300]}",
                )
        if chats and watch.killed is None:
            notes.hold(seen["count"].get("chat", 0) > 0, "not one chat of the bystander came to its end")
            if max_chat_s is not None:
                notes.hold(
                    chat_s <= max_chat_s,
                    f"a bystander's chat took {chat_s:.1f} s, at most {max_chat_s:g} s may be",
                    noise=True,
                )
        if watch.killed is not None:
            notes.hold(False, watch.killed)
        elif not server.alive:
            notes.hold(False, "the server ended")

    def _until_seen(self, server: Served, beside: Beside, chats: bool) -> dict[str, Any]:
        """What the probes saw: after the server has answered each kind, a chat included, or has had long to do so."""
        total: dict[str, Any] = {"worst": {}, "count": {}, "errors": {}}
        deadline = time.monotonic() + WAIT_S
        while True:
            seen = beside.look()
            for kind, seconds in seen["worst"].items():
                total["worst"][kind] = max(total["worst"].get(kind, 0.0), seconds)
            for kind, count in seen["count"].items():
                total["count"][kind] = total["count"].get(kind, 0) + count
            for kind, errors in seen["errors"].items():
                total["errors"].setdefault(kind, []).extend(errors)
            done = all(total["count"].get(kind) for kind in ("fresh", "kept", *(("chat",) if chats else ())))
            if done or not server.alive or time.monotonic() > deadline:
                return total
            time.sleep(0.1)

    # -- clients

    @staticmethod
    def chat(
        address: Address,
        key: str | None,
        content: str = "Good morning.",
        num_tokens: int = 8,
        timeout_s: float = 30.0,
        **headers: str,
    ) -> Any:
        """A plain chat completion; the reply."""
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": content}],
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        return post(address, "/v1/chat/completions", body, key, timeout_s, **headers)

    @staticmethod
    def options(notes: Notes, *wanted: tuple[str, str]) -> list[str]:
        """Those of the options that the server has; a promise is broken for each that it has not."""
        found = []
        for name, value in wanted:
            if notes.hold(offered(name), f"`pensieve serve` has no {name}"):
                found += [name, value]
        return found
