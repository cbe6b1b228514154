"""Reports as `pensieve bench` writes them, by hand; a server that answers one path; who is alive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SERVER = """
import http.server, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404); self.end_headers()
    def log_message(self, *words): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""


def spread(p50: float) -> dict[str, float]:
    return {"mean": p50, "p50": p50, "p90": p50, "p99": p50}


def request(**changes: Any) -> dict[str, Any]:
    usual = {
        "run": 0,
        "conversation": 0,
        "turn": 0,
        "submitted_s": 0.0,
        "ttft_s": 0.1,
        "latency_s": 1.0,
        "prompt_tokens": 100,
    }
    return {**usual, "cached_tokens": 0, "output_tokens": 64, "error": None, **changes}


def run_of(
    rate: float | None = None, *, normalized: float = 40.0, failed: int = 0, **changes: Any
) -> dict[str, Any]:
    told: dict[str, Any] = {
        "rate": rate,
        "wall_s": 4.0,
        "requests": 12,
        "failed": failed,
        "requests_per_s": 3.0,
        "output_tokens": 768,
    }
    told |= {
        "output_tokens_per_s": 192.0,
        "prompt_tokens": 1200,
        "cached_tokens": 0,
        "ttft_ms": {**spread(80.0), "p90": 90.0},
    }
    told |= {
        "normalized_ms": spread(normalized),
        "inter_token_ms": spread(30.0),
        "latency_ms": spread(2000.0),
    }
    turns = [
        {"turn": turn, "requests": 6, "ttft_ms": spread(100.0 / (turn + 1)), "normalized_ms": spread(40.0)}
        for turn in (0, 1)
    ]
    return {**told, "by_turn": turns, "client_cpu_s": 0.1, "client_cpu_share": 0.02, **changes}


def report(runs: list[dict[str, Any]], requests: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {
        "kind": "pensieve-bench",
        "version": 1,
        "runs": runs,
        "requests": [request()] if requests is None else requests,
    }


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
