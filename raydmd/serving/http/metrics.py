"""What the API counts, for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from raydmd.serving.contract import GenerationResult, Maker

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
STAGE_SECONDS = (0.0005, 0.001, 0.0025, *SECONDS)
SAMPLES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The figures of one API replica, in a registry of their own.

    Args:
        queued: says how many samples are asked for and not made yet.
    """

    CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self, queued: Callable[[], int]) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "raydmd_http_requests", "Requests that ended; 499: the client left.", ["route", "status"], registry=registry
        )
        self.in_flight = Gauge("raydmd_http_in_flight", "Requests being answered.", registry=registry)
        self.seconds = Histogram(
            "raydmd_http_request_seconds", "From a request to its answer's end.", ["route"],
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        queue = Gauge("raydmd_queued_samples", "Samples that are asked for and not made yet.", registry=registry)
        queue.set_function(queued)
        self.stage_seconds = Histogram(
            "raydmd_stage_seconds", "A stage's work on the batch of a request; queue: all the waiting; total: all.",
            ["stage"], buckets=STAGE_SECONDS, registry=registry,
        )  # fmt: skip
        self.batch = Histogram(
            "raydmd_batch_samples", "Samples in the batch in which a request was made.", ["stage"],
            buckets=SAMPLES, registry=registry,
        )  # fmt: skip
        self.samples = Counter("raydmd_samples", "Pictures and videos made.", ["maker"], registry=registry)

    def ended(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def record(self, maker: Maker, result: GenerationResult) -> None:
        """Count what was made."""
        self.samples.labels(maker).inc(len(result.pictures))
        for stage, seconds in result.seconds.items():
            self.stage_seconds.labels(stage).observe(seconds)
        for stage, samples in result.batches.items():
            self.batch.labels(stage).observe(samples)

    def text(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self.registry)
