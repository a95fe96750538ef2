"""Prometheus metrics of one server: counters, gauges and histograms in base units. Ratios are computed in PromQL.

The counters that outlive the process are in `outcomes`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest

from scalabl import __version__
from scalabl.errors import ScalaBLError
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


# With one of these prometheus_client keeps its values in files of that folder, for applications of several processes.
MULTIPROCESS = ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir")


class MetricsError(ScalaBLError):
    """Metrics cannot be kept because of a setting of prometheus_client in the environment."""


class Metrics:
    """The metrics of one application. Each has its own registry, so that several can run in one process.

    Raises:
        MetricsError: the environment names a folder for prometheus_client's files that cannot be written to.
    """

    def __init__(self) -> None:
        _check_environment()
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        build = Info("scalabl_build", "Version of the server, as the label version.", registry=self.registry)
        build.info({"version": __version__})
        self.ready = Gauge("scalabl_ready", "1 while the server accepts requests, else 0.", registry=self.registry)
        self.requests = Counter(
            "scalabl_requests", "HTTP requests, by route, method and status code.", ["route", "method", "code"],
            registry=self.registry,
        )  # fmt: skip
        self.request_duration = self._histogram(
            "scalabl_request_duration_seconds",
            "Seconds from the arrival of a request to the end of its answer.",
            SECONDS,
            ["route"],
        )
        self.key_requests = Counter(
            "scalabl_key_requests", "HTTP requests, by the name of their API key.", ["key"], registry=self.registry
        )
        self.queue_inputs = Gauge(
            "scalabl_queue_inputs", "Inputs in the queue, waiting for a forward pass.", registry=self.registry
        )
        self.queue_tokens = Gauge(
            "scalabl_queue_tokens",
            "Tokens (inputs x samples x length) in the queue, estimated until an input is tokenised.",
            registry=self.registry,
        )
        self.queue_limit_inputs = Gauge(
            "scalabl_queue_limit_inputs",
            "Largest number of inputs in the queue. Above it, requests are answered with 429.",
            registry=self.registry,
        )
        self.queue_limit_tokens = Gauge(
            "scalabl_queue_limit_tokens",
            "Largest number of tokens in the queue. Above it, requests are answered with 429.",
            registry=self.registry,
        )
        self.rejected = Counter(
            "scalabl_rejected_requests",
            "Requests answered with 429, because of too many inputs or tokens in the queue or too long a wait.",
            ["reason"],
            registry=self.registry,
        )
        self.stage_duration = self._histogram(
            "scalabl_stage_duration_seconds",
            "Seconds per stage: tokenise and total are per request, queue is per input, forward is per forward pass.",
            SECONDS,
            ["stage"],
        )
        self.padding_tokens = Counter(
            "scalabl_padding_tokens", "Padding tokens computed in forward passes.", registry=self.registry
        )
        self.failed_passes = Counter(
            "scalabl_failed_passes", "Forward passes that failed.", ["kind"], registry=self.registry
        )
        for counter, values in ((self.rejected, Reason), (self.failed_passes, PassFailure)):
            for value in get_args(values):
                counter.labels(value)  # create it at 0, so that PromQL sees the first event as an increase
        self.batch_splits = Counter(
            "scalabl_batch_splits", "Batches that were split in two after their forward pass failed.", registry=self.registry
        )
        self.adapters = Gauge("scalabl_adapters_loaded", "Adapters that are loaded.", registry=self.registry)
        self.pass_gap = self._histogram(
            "scalabl_pass_gap_seconds",
            "Seconds between two forward passes, when the batch of the second was already chosen.",
            GAPS,
        )
        self.batch_rows = self._histogram("scalabl_batch_rows", "Rows (inputs x samples) in a forward pass.", POWERS)
        self.batch_tokens = self._histogram(
            "scalabl_batch_tokens", "Tokens (rows x padded length) in a forward pass.", POWERS
        )
        self.prefixes = PrefixCollector()
        self.registry.register(self.prefixes)
        self.predictions = Counter("scalabl_predictions", "Inputs that were answered.", ["adapter"], registry=self.registry)
        twentieths = tuple(n / 20 for n in range(1, 21))
        self.confidence = self._histogram(
            "scalabl_prediction_confidence",
            "Confidence of predictions: the probability of the most probable choice.",
            twentieths,
            ["adapter"],
        )
        self.entropy = self._histogram(
            "scalabl_prediction_entropy_nats", "Entropy of predictions in nats: their total uncertainty.", NATS, ["adapter"]
        )
        self.mutual_information = self._histogram(
            "scalabl_prediction_mutual_information_nats",
            "Mutual information of predictions in nats: their epistemic uncertainty.",
            NATS,
            ["adapter"],
        )
        self.label_delay = self._histogram(
            "scalabl_label_delay_seconds", "Seconds from a prediction to its first label.", DELAYS, ["adapter"]
        )
        self.feedback = Counter(
            "scalabl_feedback_labels",
            "Labels received through /feedback, by what they changed.",
            ["status"],
            registry=self.registry,
        )
        self.unrecorded = Counter(
            "scalabl_predictions_unrecorded",
            "Predictions that could not be stored. They are answered all the same, or with --outcomes-required refused.",
            ["adapter"],
            registry=self.registry,
        )
        self.engine_ready = Gauge(
            "scalabl_engine_ready", "1 while a vLLM server accepts calls, else 0.", ["server"], registry=self.registry
        )
        self.engine_calls = Counter(
            "scalabl_engine_calls", "Calls to vLLM servers, by outcome.", ["server", "outcome"],
            registry=self.registry,
        )  # fmt: skip
        self.engine_call_duration = self._histogram(
            "scalabl_engine_call_duration_seconds", "Seconds of a call to a vLLM server.", SECONDS, ["server"]
        )
        self.engine_second_calls = Counter(
            "scalabl_engine_second_calls",
            "Calls that were also sent to a second vLLM server because the first was slow.",
            registry=self.registry,
        )
        self.outcomes_up = Gauge(
            "scalabl_outcomes_up", "1 while the outcomes database can be used, else 0.", registry=self.registry
        )
        self.outcomes_errors = Counter(
            "scalabl_outcomes_errors", "Failures of the outcomes database.", registry=self.registry
        )
        self.outcomes_deleted = Counter(
            "scalabl_outcomes_deleted",
            "Stored predictions deleted because of their age or the limit on their number.",
            registry=self.registry,
        )
        self.outcomes_commit_duration = self._histogram(
            "scalabl_outcomes_commit_duration_seconds", "Seconds of a commit to the outcomes database.", SECONDS
        )

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], labels: list[str] | None = None) -> Histogram:
        return Histogram(name, text, labels or [], buckets=buckets, registry=self.registry)

    def stage(self, stage: Stage, seconds: float) -> None:
        """Record the duration of a stage."""
        self.stage_duration.labels(stage).observe(seconds)

    def observe_batch(self, rows: int, padded_tokens: int, tokens: int, seconds: float) -> None:
        """Record one forward pass of `rows` rows. `padded_tokens` includes padding, `tokens` does not."""
        self.batch_rows.observe(rows)
        self.batch_tokens.observe(padded_tokens)
        self.padding_tokens.inc(padded_tokens - tokens)
        self.stage("forward", seconds)

    def observe_prediction(self, adapter: str, outcome: Predictive) -> None:
        """Record the answer to one input. The tensors of `outcome` have no batch dimension."""
        self.predictions.labels(adapter).inc()
        self.confidence.labels(adapter).observe(float(outcome.probabilities.max()))
        self.entropy.labels(adapter).observe(float(outcome.entropy))
        self.mutual_information.labels(adapter).observe(float(outcome.mutual_information))

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


def _check_environment() -> None:
    for name in MULTIPROCESS:
        folder = os.environ.get(name)
        if folder is not None and not (folder and Path(folder).is_dir() and os.access(folder, os.W_OK)):
            raise MetricsError(
                f"{name} is {folder!r}, which is not a folder that can be written to; unset it, since this server is one "
                "process and does not need it, or create the folder"
            )
