"""What Prometheus may know: how many ask, how long they wait, how full the batch is. Nothing of what they say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from signbit.serving.scheduler import Scheduler

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """One server's, in a registry of its own: two servers may live in one process."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_SchedulerCollector(scheduler))
        ProcessCollector(registry=self._registry)
        new: dict[str, Any] = {"registry": self._registry}
        self.requests = Counter("signbit_requests", "Requests answered", ["route", "status"], **new)
        self.written = Counter("signbit_generated_tokens", "Tokens written", **new)
        self.first_token = Histogram(
            "signbit_first_token_seconds", "From request to first token", buckets=_SECONDS, **new
        )
        self.duration = Histogram("signbit_request_seconds", "From request to last token", buckets=_SECONDS, **new)
        self.cancelled = Counter("signbit_disconnected_requests", "Clients that went before the end", **new)

    def page(self) -> bytes:
        return generate_latest(self._registry)


class _SchedulerCollector(Collector):
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterator[Any]:
        scheduler, engine = self._scheduler, self._scheduler.engine
        yield GaugeMetricFamily("signbit_slots", "Sequences that are written at once, at most", engine.slots)
        yield GaugeMetricFamily("signbit_active_sequences", "Slots that are taken", engine.active)
        yield GaugeMetricFamily("signbit_waiting_requests", "Prompts that wait for a slot", scheduler.waiting)
        yield CounterMetricFamily("signbit_prompt_tokens", "Tokens of prompts read", engine.read)
        yield CounterMetricFamily("signbit_steps", "Steps of the model", scheduler.steps)
        yield CounterMetricFamily("signbit_step_seconds", "Time spent in steps", scheduler.step_seconds)
        yield CounterMetricFamily("signbit_rejected_requests", "Refused since the queue was full", scheduler.rejected)
