"""Prometheus metrics. Knows counters of the engine and of the routes; never what moves them."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector

from pensieve.core.receipt import Receipt
from pensieve.engine.messages import Stats

FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0, 60.0)
PER_TOKEN_S = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 1.0)


class Metrics:
    """One server's metrics."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "pensieve_requests",
            "Requests answered, by endpoint and HTTP status",
            ["endpoint", "status"],
            registry=self.registry,
        )
        self.first_token = Histogram(
            "pensieve_time_to_first_token_seconds",
            "From a turn's arrival to its first token",
            buckets=FIRST_TOKEN_S,
            registry=self.registry,
        )
        self.per_token = Histogram(
            "pensieve_time_per_output_token_seconds",
            "Between an answer's tokens, on average",
            buckets=PER_TOKEN_S,
            registry=self.registry,
        )
        self.queue = Histogram(
            "pensieve_queue_seconds",
            "From a turn's arrival to its admission",
            buckets=FIRST_TOKEN_S,
            registry=self.registry,
        )
        self.streams = Gauge("pensieve_streams", "Streams open now", registry=self.registry)
        self.refused = Counter(
            "pensieve_connections_refused",
            "Connections refused or closed before their request was complete, by reason",
            ["reason"],
            registry=self.registry,
        )
        self.key_file_error = Gauge(
            "pensieve_key_file_error",
            "1 while the API key file cannot be read, is not in order or holds no key",
            registry=self.registry,
        )
        self.erasures = Gauge(
            "pensieve_erasures_pending",
            "Deleted conversations whose bytes may still be in the store's files",
            registry=self.registry,
        )
        self._stats = _EngineCollector()
        self.registry.register(self._stats)

    def observe(self, receipt: Receipt) -> None:
        """Count a turn that has ended."""
        self.queue.observe(receipt.queue_s)
        if receipt.first_token_s is not None:
            self.first_token.observe(receipt.first_token_s)
            if receipt.output_tokens > 1:
                self.per_token.observe(
                    (receipt.total_s - receipt.first_token_s) / (receipt.output_tokens - 1)
                )

    def render(self, stats: Stats | None, restarts: int) -> bytes:
        """The text that Prometheus reads. `stats` is None while the engine does not answer."""
        self._stats.now = (stats, restarts)
        return generate_latest(self.registry)


class _EngineCollector:
    """The engine's own counters, as last reported."""

    def __init__(self) -> None:
        self.now: tuple[Stats | None, int] = (None, 0)

    def collect(self) -> Iterable[Metric]:
        stats, restarts = self.now
        restarted = CounterMetricFamily(
            "pensieve_engine_restarts", "How often the engine process was started again"
        )
        restarted.add_metric([], restarts)
        yield restarted
        if stats is None:
            return
        tokens = CounterMetricFamily(
            "pensieve_tokens", "Prompt tokens by where they came from, and output tokens", labels=["source"]
        )
        for source in ("gpu", "cpu", "recomputed", "new", "output"):
            tokens.add_metric([source], getattr(stats, f"{source}_tokens"))
        yield tokens
        moved = CounterMetricFamily("pensieve_bytes", "Bytes of KV swapped in and out", labels=["direction"])
        moved.add_metric(["in"], stats.bytes_in)
        moved.add_metric(["out"], stats.bytes_out)
        yield moved
        slots = GaugeMetricFamily(
            "pensieve_tier_slots", "Slots of each tier by state", labels=["tier", "state"]
        )
        for tier in stats.tiers:
            slots.add_metric([tier.name, "used"], tier.used - tier.reclaimable)
            slots.add_metric([tier.name, "reclaimable"], tier.reclaimable)
            slots.add_metric([tier.name, "free"], tier.num_slots - tier.used)
        yield slots
        evictions = CounterMetricFamily(
            "pensieve_evictions", "Chunks that left a tier, by reason", labels=["reason"]
        )
        for reason, count in stats.evictions:
            evictions.add_metric([reason], count)
        yield evictions
        requests = GaugeMetricFamily(
            "pensieve_engine_requests", "Requests in the engine by state", labels=["state"]
        )
        requests.add_metric(["waiting"], stats.waiting)
        requests.add_metric(["running"], stats.running)
        yield requests
        suspensions = CounterMetricFamily(
            "pensieve_suspensions", "Requests that lost their room and went back to the queue"
        )
        suspensions.add_metric([], stats.suspensions)
        yield suspensions
        yield GaugeMetricFamily(
            "pensieve_conversations", "Conversations with anything cached", value=stats.sequences
        )
