"""Prometheus metrics of one server: raw counts and histograms in base units; ratios are PromQL's to take."""

from __future__ import annotations

from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest

from scalabl import __version__
from scalabl.uncertainty.predictive import Predictive
from scalabl_server.observe.prefix_metrics import PrefixCollector

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
GAPS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.1, 1)
NATS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5)
DELAYS = (1, 10, 60, 600, 3600, 6 * 3600, 86400, 3 * 86400, 7 * 86400, 14 * 86400, 30 * 86400, 90 * 86400)
Stage = Literal["tokenise", "queue", "forward", "total"]
Reason = Literal["inputs", "tokens", "wait"]
PassFailure = Literal["out-of-memory", "device", "engine", "error"]
POWERS = tuple(2.0**n for n in range(17))


class Metrics:
    """A registry of its own for each application, so that several can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        build = Info("scalabl_build", "Version of the server.", registry=self.registry)
        build.info({"version": __version__})
        self.ready = Gauge("scalabl_ready", "1 while the server takes requests.", registry=self.registry)
        self.requests = Counter(
            "scalabl_requests", "HTTP requests by route, method and status.", ["route", "method", "code"],
            registry=self.registry,
        )  # fmt: skip
        self.request_duration = self._histogram(
            "scalabl_request_duration_seconds", "Time from request to answer.", SECONDS, ["route"]
        )
        self.key_requests = Counter(
            "scalabl_key_requests", "HTTP requests by the name of their API key.", ["key"], registry=self.registry
        )
        self.queue_inputs = Gauge("scalabl_queue_inputs", "Inputs that wait for a pass.", registry=self.registry)
        self.queue_tokens = Gauge(
            "scalabl_queue_tokens", "Tokens (inputs x samples x length) that wait, estimated until an input is tokenised.",
            registry=self.registry,
        )  # fmt: skip
        self.queue_limit_inputs = Gauge(
            "scalabl_queue_limit_inputs", "Inputs that may wait; beyond it 429.", registry=self.registry
        )
        self.queue_limit_tokens = Gauge(
            "scalabl_queue_limit_tokens", "Tokens that may wait; beyond it 429.", registry=self.registry
        )
        self.rejected = Counter(
            "scalabl_rejected_requests", "Requests answered with 429: too many inputs, tokens, or seconds to wait.",
            ["reason"], registry=self.registry,
        )  # fmt: skip
        self.stage_duration = self._histogram(
            "scalabl_stage_duration_seconds",
            "Time of a request to tokenise and in total, of an input in the queue, and of a forward pass.",
            SECONDS,
            ["stage"],
        )
        self.padding_tokens = Counter(
            "scalabl_padding_tokens", "Tokens of padding that passes computed.", registry=self.registry
        )
        self.failed_passes = Counter(
            "scalabl_failed_passes", "Forward passes that failed.", ["kind"], registry=self.registry
        )
        for counter, values in ((self.rejected, Reason), (self.failed_passes, PassFailure)):
            for value in get_args(values):
                counter.labels(value)  # at 0 from the start, so that the first one is seen as an increase
        self.batch_splits = Counter("scalabl_batch_splits", "Batches cut in two after they failed.", registry=self.registry)
        self.adapters = Gauge("scalabl_adapters_loaded", "Adapters that answer.", registry=self.registry)
        self.pass_gap = self._histogram(
            "scalabl_pass_gap_seconds", "Time of the model's thread between two passes, the second chosen before.", GAPS
        )
        self.batch_rows = self._histogram("scalabl_batch_rows", "Rows (inputs x samples) of a pass.", POWERS)
        self.batch_tokens = self._histogram("scalabl_batch_tokens", "Rows x padded length of a pass.", POWERS)
        self.prefixes = PrefixCollector()
        self.registry.register(self.prefixes)
        self.predictions = Counter("scalabl_predictions", "Inputs answered.", ["adapter"], registry=self.registry)
        twentieths = tuple(n / 20 for n in range(1, 21))
        self.confidence = self._histogram(
            "scalabl_prediction_confidence", "Probability of the prediction.", twentieths, ["adapter"]
        )
        self.entropy = self._histogram("scalabl_prediction_entropy_nats", "Total uncertainty.", NATS, ["adapter"])
        self.mutual_information = self._histogram(
            "scalabl_prediction_mutual_information_nats", "Epistemic uncertainty.", NATS, ["adapter"]
        )
        self.label_delay = self._histogram(
            "scalabl_label_delay_seconds", "Time from a prediction to its first label.", DELAYS, ["adapter"]
        )
        self.feedback = Counter(
            "scalabl_feedback_labels", "Labels taken: recorded, unchanged or corrected.", ["status"], registry=self.registry
        )
        self.unrecorded = Counter(
            "scalabl_predictions_unrecorded", "Answered, but not stored, or refused for that.", ["adapter"],
            registry=self.registry,
        )  # fmt: skip
        self.engine_ready = Gauge(
            "scalabl_engine_ready", "1 while a server of the engine takes calls.", ["server"], registry=self.registry
        )
        self.engine_calls = Counter(
            "scalabl_engine_calls", "Calls of the engine's servers, by what became of them.", ["server", "outcome"],
            registry=self.registry,
        )  # fmt: skip
        self.engine_call_duration = self._histogram(
            "scalabl_engine_call_duration_seconds", "Time of a call of the engine.", SECONDS, ["server"]
        )
        self.engine_second_calls = Counter(
            "scalabl_engine_second_calls", "Calls sent to a second server since the first was slow.", registry=self.registry
        )
        self.outcomes_up = Gauge("scalabl_outcomes_up", "1 while the outcomes database works.", registry=self.registry)
        self.outcomes_errors = Counter(
            "scalabl_outcomes_errors", "Failures of the outcomes database.", registry=self.registry
        )
        self.outcomes_deleted = Counter(
            "scalabl_outcomes_deleted", "Stored predictions deleted by age or number.", registry=self.registry
        )
        self.outcomes_commit_duration = self._histogram(
            "scalabl_outcomes_commit_duration_seconds", "Time of a commit to the outcomes database.", SECONDS
        )

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], labels: list[str] | None = None) -> Histogram:
        return Histogram(name, text, labels or [], buckets=buckets, registry=self.registry)

    def stage(self, stage: Stage, seconds: float) -> None:
        """One stage is over."""
        self.stage_duration.labels(stage).observe(seconds)

    def observe_batch(self, rows: int, padded_tokens: int, tokens: int, seconds: float) -> None:
        """One forward pass over `rows`, with and without padding."""
        self.batch_rows.observe(rows)
        self.batch_tokens.observe(padded_tokens)
        self.padding_tokens.inc(padded_tokens - tokens)
        self.stage("forward", seconds)

    def observe_prediction(self, adapter: str, outcome: Predictive) -> None:
        """The answer to one input: tensors without leading dimensions."""
        self.predictions.labels(adapter).inc()
        self.confidence.labels(adapter).observe(float(outcome.probabilities.max()))
        self.entropy.labels(adapter).observe(float(outcome.entropy))
        self.mutual_information.labels(adapter).observe(float(outcome.mutual_information))

    def render(self) -> bytes:
        """The text format that Prometheus scrapes."""
        return generate_latest(self.registry)
