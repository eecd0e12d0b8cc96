"""What Prometheus is told: requests and how long they took, jobs by state, and the process."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, GCCollector, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from autotune.server.problems import HEADERS
from autotune.store import Submissions

__all__ = ["Metrics", "Watch"]

METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """What one server counts."""

    def __init__(self, submissions: Submissions) -> None:
        self.registry = CollectorRegistry()
        labels = ("route", "method", "status")
        self.requests = Counter("autotune_http_requests", "Requests answered.", labels, registry=self.registry)
        self.seconds = Histogram(
            "autotune_http_request_duration_seconds",
            "Until the answer began.",
            ("route", "method"),
            buckets=BUCKETS,
            registry=self.registry,
        )
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.registry.register(_Jobs(submissions))


class _Jobs(Collector):
    """Asks the database when it is asked. It describes nothing before, so a server may start without the database."""

    def __init__(self, submissions: Submissions) -> None:
        self._submissions = submissions

    def describe(self) -> list[GaugeMetricFamily]:
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        jobs = GaugeMetricFamily("autotune_jobs", "Jobs by state.", labels=["state"])
        for state, num_jobs in self._submissions.counts().items():
            jobs.add_metric([state], num_jobs)
        yield jobs


class Watch:
    """Counts what passes, and gives every answer the headers that all have."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, took = time.perf_counter(), 500, 0.0

        async def passed(message: Message) -> None:
            nonlocal status, took
            if message["type"] == "http.response.start":
                status, took = message["status"], time.perf_counter() - began
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, receive, passed)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if scope["method"] in METHODS else "other"
            self._metrics.requests.labels(route, method, status).inc()
            self._metrics.seconds.labels(route, method).observe(took or time.perf_counter() - began)
