"""What `/metrics` tells, in Prometheus' form."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

PREFIX = "twinbrush_gateway_"
SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
NO_ROUTE = "none"  # label of requests that no route takes: paths are clients' own words


class Metrics:
    """Counters of one gateway, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter(
            f"{PREFIX}requests", "Requests by route and status.", ["route", "status"], registry=own
        )
        self.live = Gauge(f"{PREFIX}requests_live", "Requests that have not ended.", registry=own)
        self.seconds = Histogram(
            f"{PREFIX}request_seconds", "Time to the end of the answer.", ["route"],
            buckets=SECONDS, registry=own,
        )  # fmt: skip
        self.pictures = Counter(
            f"{PREFIX}pictures", "Pictures that servers finished.", registry=own
        )
        self.outstanding = Gauge(
            f"{PREFIX}server_outstanding_work", "Steps at the native size that a server still has.",
            ["server"], registry=own,
        )  # fmt: skip
        self.healthy = Gauge(
            f"{PREFIX}server_healthy", "1 where a server takes requests.", ["server"], registry=own
        )

    def text(self) -> bytes:
        return generate_latest(self.registry)
