"""Figures in Prometheus' format, under names of our own and those that tools for SGLang and vLLM read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from weft.gateway.chat.base import Receipt

if TYPE_CHECKING:
    from weft.gateway.http.state import State

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_COUNTERS = {
    "prompt": ("weft_prompt_tokens", "sglang:prompt_tokens", "vllm:prompt_tokens"),
    "cached": ("weft_cached_tokens", "sglang:cached_tokens", "vllm:prefix_cache_hits"),
    "queries": ("vllm:prefix_cache_queries",),
    "replayed": ("weft_replayed_tokens",),
    "computed": ("weft_computed_tokens", "sglang:prefill_effective_tokens"),
    "generated": ("weft_generated_tokens", "sglang:generation_tokens", "vllm:generation_tokens"),
    "drafted": ("weft_drafted_tokens",),
    "accepted": ("weft_accepted_tokens",),
}
_TIMES = {
    "first": ("weft_first_token_seconds", "sglang:time_to_first_token_seconds"),
    "gap": ("weft_token_seconds", "sglang:inter_token_latency_seconds"),
    "total": ("weft_generation_seconds", "sglang:e2e_request_latency_seconds"),
}


class Metrics:
    """Owned by the server's state, of which it reads what is under way."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._registry = CollectorRegistry()
        self._counters = {key: [self._counter(name) for name in names] for key, names in _COUNTERS.items()}
        self._times = {key: [self._histogram(name) for name in names] for key, names in _TIMES.items()}
        self._requests = Counter(
            "weft_requests", "Requests by route and status.", ["route", "status"], registry=self._registry
        )
        self._aborted = [self._counter(name) for name in ("weft_aborted_requests", "sglang:num_aborted_requests")]
        self._prompt = self._cached = self._steps = self._drawn = 0
        self._gauges()

    def generated(self, took: Receipt) -> None:
        """A generation has ended."""
        counts = {
            "prompt": took.prompt,
            "queries": took.prompt,
            "cached": took.cached,
            "replayed": took.replayed,
            "computed": max(0, took.computed - took.generated),
            "generated": took.generated,
            "drafted": took.drafted,
            "accepted": took.accepted,
        }
        for key, count in counts.items():
            for counter in self._counters[key]:
                counter.inc(count)
        times = {"first": took.first_token, "total": took.total}
        if took.generated > 1:
            times["gap"] = (took.total - took.first_token) / (took.generated - 1)
        for key, seconds in times.items():
            for histogram in self._times[key]:
                histogram.observe(max(0.0, seconds))
        self._prompt += took.prompt
        self._cached += took.cached
        self._drawn += took.generated
        self._steps += max(0, took.generated - took.accepted)

    def request(self, route: str, status: int) -> None:
        self._requests.labels(route, str(status)).inc()

    def aborted(self) -> None:
        for counter in self._aborted:
            counter.inc()

    def text(self) -> tuple[bytes, str]:
        """What to answer, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def _counter(self, name: str) -> Counter:
        return Counter(name, name.partition(":")[2].replace("_", " ") or name, registry=self._registry)

    def _histogram(self, name: str) -> Histogram:
        return Histogram(name, name.replace("_", " "), registry=self._registry, buckets=_SECONDS)

    def _under_way(self, name: str) -> float:
        return float(getattr(self._state.gate, name)) if self._state.known_engine is not None else 0.0

    def _gauges(self) -> None:
        known = {
            ("weft_running", "sglang:num_running_reqs", "vllm:num_requests_running"): lambda: self._under_way(
                "running"
            ),
            ("weft_waiting", "sglang:num_queue_reqs", "vllm:num_requests_waiting"): lambda: self._under_way(
                "waiting"
            ),
            ("weft_cache_hit_rate", "sglang:cache_hit_rate"): lambda: self._cached / max(1, self._prompt),
            ("weft_tokens_per_step", "sglang:spec_accept_length"): lambda: self._drawn / max(1, self._steps),
            ("weft_kv_usage", "sglang:token_usage", "vllm:kv_cache_usage_perc"): lambda: self._state.kv_usage,
            ("weft_ready",): lambda: float(self._state.stage == "ready"),
        }
        for names, read in known.items():
            for name in names:
                gauge = Gauge(name, name.replace("_", " "), registry=self._registry)
                gauge.set_function(read)
