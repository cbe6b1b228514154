"""The whole run with fake servers (processes that answer one path) and a fake client: order, failures, what is kept, what is said."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from peer_fakes import SERVER, alive, report, run_of
from peers import cli, client, run
from peers.curve import Point
from peers.errors import PeerError
from peers.goals import GOALS
from peers.install import Peers
from peers.report import plot, rounds_of, summary, tables
from peers.run import Cell, compare_loops, run_turn, turns
from peers.servers import Server
from peers.workloads import PENSIEVE, SYSTEMS, VLLM, Kv, Measurement, Workload, workloads
from rich.console import Console

SHAPE = Measurement("users", users=2, turns=2, new_tokens=10, output_tokens=4)
WORKLOAD = Workload("users", "a few", (SHAPE, replace(SHAPE, name="more")), dict.fromkeys(SYSTEMS, Kv(1024)))


def server_of(system: str, kv: Kv, port: int, scratch: Path) -> Server:
    command = (sys.executable, "-c", SERVER, str(port))
    return Server(system, "1.0", command, {"A": "B"}, port, "/health", "m", kv.bytes, 1000, start_limit_s=20)


@dataclass
class Client:
    """Answers with one report, and remembers who was asked what, with which seed, by which process."""

    asked: list[tuple[str, str, int]] = field(default_factory=list)
    fails: str | None = None  # the system whose requests fail

    def __call__(self, server: Server, measurement: Measurement, seed: int, path: Path) -> dict[str, Any]:
        self.asked.append((server.system, measurement.name, seed))
        if server.system == self.fails:
            raise PeerError("3 of 12 requests failed\nand here is why")
        return report([run_of()])


def test_systems_take_turns_in_every_round() -> None:
    known = {workload.name: workload for workload in workloads()}
    order = [
        (workload.name, round_, system)
        for workload, round_, system in turns([known["users"], known["fits"]], (PENSIEVE, VLLM), 2)
    ]
    assert order == [
        *(("users", 0, PENSIEVE), ("users", 0, VLLM), ("users", 1, PENSIEVE), ("users", 1, VLLM)),
        *(("fits", 0, PENSIEVE), ("fits", 0, VLLM), ("fits", 1, PENSIEVE), ("fits", 1, VLLM)),
    ]


def test_a_turn_measures_one_fresh_server_and_leaves_nothing_behind(tmp_path: Path) -> None:
    measure, seen = Client(), []

    def make(system: str, kv: Kv, port: int, scratch: Path) -> Server:
        assert scratch.is_dir()
        seen.append(scratch)
        return server_of(system, kv, port, scratch)

    cell = run_turn(WORKLOAD, VLLM, 1, make_server=make, out=tmp_path, seed=40, measure=measure)
    assert measure.asked == [(VLLM, "users", 40), (VLLM, "more", 41)] and not seen[0].exists()
    assert (
        cell.error is None
        and cell.figures is not None
        and cell.start_s is not None
        and cell.memory is not None
    )
    assert cell.figures["users/requests_per_s"] == cell.figures["more/requests_per_s"] == 3.0
    assert cell.figures["memory_pss_gb"] == cell.memory.pss / 1e9 and "memory_beyond_gb" not in cell.figures
    kept = json.loads((tmp_path / "users" / "1-vllm" / "turn.json").read_text())
    assert (
        kept["command"][0] == sys.executable and kept["variables"] == {"A": "B"} and kept["version"] == "1.0"
    )
    assert (
        kept["figures"] == cell.figures
        and kept["memory"]["processes"] == 1
        and (tmp_path / "users" / "1-vllm" / "server.log").exists()
    )


def test_pensieves_memory_is_told_beyond_what_lies_in_its_tiers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "kv_in_use", lambda server: 500)
    figures = run_turn(
        WORKLOAD, PENSIEVE, 0, make_server=server_of, out=tmp_path, seed=1, measure=Client()
    ).figures
    assert figures is not None and figures["memory_beyond_gb"] == pytest.approx(
        figures["memory_pss_gb"] - 1500e-9
    )


def test_who_does_not_start_or_answers_wrongly_fails_alone_and_its_server_is_ended(tmp_path: Path) -> None:
    started: list[int] = []

    def make(system: str, kv: Kv, port: int, scratch: Path) -> Server:
        server = server_of(system, kv, port, scratch)
        return (
            replace(server, command=(sys.executable, "-c", "raise SystemExit('no model')"))
            if system == "llama.cpp"
            else server
        )

    class Watching(Client):
        def __call__(self, server: Server, *asked: Any) -> dict[str, Any]:
            started.extend(
                pid
                for pid in map(int, filter(str.isdigit, (p.name for p in Path("/proc").iterdir())))
                if _serves(pid, server.port)
            )
            return super().__call__(server, *asked)

    measure = Watching(fails=VLLM)
    cells = [
        run_turn(WORKLOAD, system, 0, make_server=make, out=tmp_path, seed=1, measure=measure)
        for system in (VLLM, "llama.cpp", "transformers")
    ]
    assert [cell.error and cell.error.splitlines()[0][:24] for cell in cells] == [
        "3 of 12 requests failed",
        "it ended with status 1 b",
        None,
    ]
    assert [cell.figures is None for cell in cells] == [True, True, False]
    assert len(started) == 3 and not any(
        map(alive, started)
    )  # one of vLLM's, two of the last one's: all of them gone
    told = summary(cells, [], {})
    assert [failure["system"] for failure in told["failures"]] == [VLLM, "llama.cpp"]
    console = Console(width=140, record=True, file=(tmp_path / "table").open("w"))
    console.print(tables(cells, [WORKLOAD], []))
    text = console.export_text()
    assert "FAILED 1 of 1" in text and "and here is why" in text and "no model" in text


def _serves(pid: int, port: int) -> bool:
    try:
        return str(port).encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def cell(system: str, round_: int, points: list[Point], unloaded: float) -> Cell:
    return Cell("open", system, round_, 0.0, figures={"unloaded/normalized_mean_ms": unloaded}, points=points)


def test_a_sweep_ends_where_latency_is_twice_what_it_is_without_load(tmp_path: Path) -> None:
    asked: list[tuple[str, int]] = []
    normalized = {"unloaded": 20.0, "open-1": 25.0, "open-2": 40.0, "open-4": 41.0}

    def measure(server: Server, call: Measurement, seed: int, path: Path) -> dict[str, Any]:
        asked.append((path.name, seed))
        rate = call.rates[0] if call.rates else None
        return report([run_of(rate, requests_per_s=0.9 * (rate or 1), normalized=normalized[call.name])])

    sweep = replace(SHAPE, name="open", rates=(4, 1, 8, 2), duration_s=1)
    workload = replace(WORKLOAD, name="open", measurements=(replace(SHAPE, name="unloaded"), sweep))
    found = run_turn(workload, VLLM, 0, make_server=server_of, out=tmp_path, seed=5, measure=measure)
    assert asked == [("unloaded.json", 5), ("open-1.json", 6), ("open-2.json", 7), ("open-4.json", 8)]
    assert found.points == [Point(0.9, 25.0), Point(1.8, 40.0), Point(3.6, 41.0)]


def test_a_bound_is_compared_only_where_pensieve_loses_by_it() -> None:
    never, at_once = [Point(1, 20), Point(2, 30)], [Point(1, 90), Point(2, 95)]
    for curve, system, bound, kept in (
        *((never, PENSIEVE, "at least", True), (never, VLLM, "at least", False)),
        *((at_once, PENSIEVE, "at most", False), (at_once, VLLM, "at most", False)),
    ):
        one = cell(system, 0, curve, 20.0)
        compare_loops([one])
        assert one.crossing is not None and one.crossing.bound == bound and one.figures is not None
        assert ("open/requests_per_s_at_limit" in one.figures) == kept


def test_open_loops_of_a_round_have_one_limit_the_strictest() -> None:
    curve = [Point(1, 20), Point(2, 40), Point(3, 120)]
    cells = [
        cell(PENSIEVE, 0, curve, 30.0),
        cell(VLLM, 0, curve, 40.0),
        cell(PENSIEVE, 1, curve, 10.0),
        Cell("users", VLLM, 0, 0.0),
    ]
    compare_loops(cells)
    assert [c.figures and c.figures.get("open/limit_ms") for c in cells] == [60.0, 60.0, 20.0, None]
    assert [c.figures and c.figures.get("open/requests_per_s_at_limit") for c in cells] == [
        2.25,
        2.25,
        1.0,
        None,
    ]


def test_the_summary_tells_every_round_and_the_picture_is_one(tmp_path: Path) -> None:
    cells = []
    for round_ in range(2):
        for system in (PENSIEVE, VLLM):
            figures = {
                "users/output_tokens_per_s": 100.0 + round_,
                "users/ttft_turn0_ms": 5.0,
                "users/ttft_turn1_ms": 4.0,
            }
            cells.append(Cell("users", system, round_, 0.5, figures=figures))
    cells += [cell(system, 0, [Point(1, 20), Point(2, 90)], 20.0) for system in (PENSIEVE, VLLM)]
    cells += [Cell(name, VLLM, 0, 0.1, figures={"pressure/ttft_p90_ms": 80.0}) for name in ("fits", "third")]
    cells.append(
        Cell("alone", VLLM, 0, 0.1, figures={"long/decode_tokens_per_s": 9.0, "history/ttft_turn0_ms": 9.0})
    )
    compare_loops(cells)
    told = json.loads(json.dumps(summary(cells, [], {"date": "today"})))
    assert told["workloads"]["users"][PENSIEVE]["figures"]["users/output_tokens_per_s"] == {
        "median": 100.5,
        "min": 100,
        "max": 101,
        "rounds": [100, 101],
    }
    assert told["workloads"]["open"][VLLM]["open_loop"][0]["points"][1] == {
        "requests_per_s": 2,
        "latency_ms": 90,
    }
    assert told["failures"] == [] and rounds_of(cells)["users", VLLM][1] == cells[3].figures
    picture = plot(cells, tmp_path / "peers.png")
    assert picture is not None and picture.read_bytes().startswith(b"\x89PNG")
    assert plot([], tmp_path / "none.png") is None


def test_from_the_command_line_to_the_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, int]] = []

    def measure(
        server: Server, measurement: Measurement, seed: int, path: Path, **more: Any
    ) -> dict[str, Any]:
        asked.append((server.system, seed))
        return report([run_of(failed=0)])

    monkeypatch.setattr(cli, "install", lambda root, names, torch, say: Peers(root))
    monkeypatch.setattr(cli, "model_folder", lambda: tmp_path)
    monkeypatch.setattr(cli, "make", lambda system, site, kv, port: server_of(system, kv, port, site.scratch))
    monkeypatch.setattr(run, "kv_in_use", lambda server: 0)
    monkeypatch.setattr(cli, "run_turn", lambda *given, **named: run_turn(*given, **named, measure=measure))
    words = [
        "--workloads",
        "users",
        "--systems",
        "vllm,pensieve",
        "--rounds",
        "2",
        "--quick",
        "--out",
        str(tmp_path / "out"),
        "--seed",
        "7",
    ]
    assert cli.main(words) == 0
    assert asked == [(PENSIEVE, 7), (VLLM, 7), (PENSIEVE, 10_007), (VLLM, 10_007)]
    lines = capsys.readouterr().out.splitlines()
    told = json.loads(lines[-1])
    assert (
        told == json.loads((tmp_path / "out" / "summary.json").read_text()) and told["machine"]["cores"] >= 1
    )
    assert any("8 users: output tokens/s" in line and "missed" in line for line in lines)  # 1.00 x
    assert [goal["met"] for goal in told["goals"]].count(None) == len(GOALS) - 3
    assert (tmp_path / "out" / "peers.png").exists()

    def broken(server: Server, *given: Any, **named: Any) -> dict[str, Any]:
        raise PeerError("broken")

    monkeypatch.setattr(cli, "run_turn", lambda *given, **named: run_turn(*given, **named, measure=broken))
    assert cli.main(words) == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--workloads", "users,nothing"], "nothing"),
        (["--systems", "gpt"], "gpt"),
        (["--systems", ","], "names nothing"),
    ],
)
def test_what_is_not_known_is_refused(words: list[str], expected: str) -> None:
    with pytest.raises(SystemExit, match=expected):
        cli.main(words)


def test_what_cannot_be_set_up_ends_the_run_before_it_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def install(*given: Any, **named: Any) -> Peers:
        raise PeerError("cmake is missing")

    monkeypatch.setattr(cli, "install", install)
    assert cli.main(["--quick"]) == 2 and "cmake is missing" in capsys.readouterr().err


def test_the_client_is_a_process_whose_report_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = replace(server_of(VLLM, Kv(1), 9, tmp_path), bench_options=("--fresh-connections",))
    words = client.command(server, SHAPE, 3, tmp_path / "r.json")
    assert words[1:4] == ["-m", "pensieve", "bench"] and words[-4:] == [
        "--seed",
        "3",
        "--json",
        str(tmp_path / "r.json"),
    ]
    assert "--fresh-connections" in words and words[words.index("--url") + 1] == server.url

    def say(code: str) -> None:
        monkeypatch.setattr(
            client, "command", lambda server, measurement, seed, path: [sys.executable, "-c", code, str(path)]
        )

    say(f"import sys; open(sys.argv[1], 'w').write({json.dumps(report([run_of()]))!r})")
    assert client.run(server, SHAPE, 3, tmp_path / "a.json")["kind"] == "pensieve-bench"
    say("print('the server is gone'); raise SystemExit(1)")
    with pytest.raises(PeerError, match=r"no report of 'users' \(status 1(.|\n)*the server is gone"):
        client.run(server, SHAPE, 3, tmp_path / "b.json")
    say("import time; time.sleep(60)")
    with pytest.raises(PeerError, match=r"after 0\.2 s"):
        client.run(server, SHAPE, 3, tmp_path / "c.json", limit_s=0.2)
