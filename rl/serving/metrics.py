"""What a server did, in the format of Prometheus.

In: the counts of an engine, and each request as it ends. Out: the text of /metrics.
"""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from rl.serving.engine import Engine

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_COUNTERS = {
    "num_jobs": "completions and prompts that were taken in",
    "num_ended": "of these, those that came to their end",
    "num_cancelled": "of these, those whose client went away",
    "num_timeouts": "of these, those that took too long",
    "num_prompt_tokens": "tokens of prompts",
    "num_reused_tokens": "tokens of prompts whose keys and values were there from an earlier completion",
    "num_drawn_tokens": "tokens that were drawn",
    "num_scored_tokens": "tokens whose log-probs were asked for",
    "num_going_on": "completions whose prompt goes on from an earlier completion",
    "num_forgotten": "completions that were kept for such prompts, and made room",
}
_GAUGES = {
    "num_drawing": "completions that are being drawn",
    "num_waiting": "completions that wait for a slot",
    "num_parked": "completions that are kept for prompts that go on from them",
}


class Metrics:
    """Counts requests by path and status, and tells the counts of an engine."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._registry = CollectorRegistry()
        self._registry.register(self)  # pyright: ignore[reportArgumentType]
        self._requests = Counter("grpo_requests", "requests", ("path", "status"), registry=self._registry)
        self._seconds = Histogram(
            "grpo_request_seconds", "from a request to the end of its answer", ("path",),
            buckets=_SECONDS, registry=self._registry,
        )  # fmt: skip

    def collect(self) -> Iterator[Any]:
        """For the registry."""
        for name, text in _COUNTERS.items():
            title = name.removeprefix("num_")
            yield CounterMetricFamily(f"grpo_{title}", text, value=getattr(self._engine.counts, name))
        for name, text in _GAUGES.items():
            title = name.removeprefix("num_")
            yield GaugeMetricFamily(f"grpo_{title}", text, value=getattr(self._engine.counts, name))

    def note(self, path: str, status: int, seconds: float) -> None:
        """Counts a request that ended. path: of a short list."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        """The answer of /metrics."""
        return generate_latest(self._registry)
