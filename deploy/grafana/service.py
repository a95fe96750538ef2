"""The dashboard *ScalaBL: service*: errors, latency, and the use of time and memory."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard

from deploy.grafana.panels import Look, Query, choice, lines, new_board, number

SOME = '{namespace=~"$namespace", job=~"$job", instance=~"$replica"}'
JOB = '{namespace=~"$namespace", job=~"$job"}'
SERVING = SOME.replace("}", ', route=~"/predict|/feedback|/v2/models/.*/infer"}')


def where(selector: str, more: str) -> str:
    """A selector with another matcher."""
    return selector.replace("}", f", {more}}}")


def rate(metric: str, selector: str = SOME) -> str:
    """PromQL for the rate of a counter, per second."""
    return f"rate({metric}{selector}[$__rate_interval])"


def mean(metric: str, by: str, selector: str = SOME) -> str:
    """PromQL for the mean of a histogram."""
    return f"sum by ({by}) ({rate(metric + '_sum', selector)}) / sum by ({by}) ({rate(metric + '_count', selector)})"


def quantiles(metric: str, selector: str = SOME) -> list[Query]:
    """Queries for the median, the 90% and the 99% quantile of a histogram."""
    counts = f"sum by (le) ({rate(metric + '_bucket', selector)})"
    return [Query(f"histogram_quantile({q}, {counts})", f"p{q}") for q in (0.5, 0.9, 0.99)]


def build() -> dashboard.Dashboard:
    """The whole dashboard."""
    board = new_board(
        "ScalaBL: service",
        "scalabl-service",
        "Requests, errors, latency, the queue, forward passes, the outcomes database and the processes, of all or some "
        "replicas. docs/runbook.md says what to do about its alerts.",
        "6h",
    )
    board.with_variable(choice("replica", "Replica", f"label_values(scalabl_ready{JOB}, instance)", multi=True))
    for part in (_numbers, _requests, _queue, _passes, _answers, _outcomes, _process):
        part(board)
    return board


def _numbers(board: dashboard.Dashboard) -> None:
    board.with_row(dashboard.Row("Now"))
    for title, text, expr, unit in (
        ("Replicas ready", "Replicas that accept requests.", f"sum(scalabl_ready{SOME})", "short"),
        (
            "Requests",
            "Requests for predictions and feedback per second.",
            f"sum({rate('scalabl_requests_total', SERVING)})",
            "reqps",
        ),
        (
            "Failed, last hour",
            "Share of requests answered with a 5xx, on all replicas. The objective is at most 0.1% over 30 days.",
            f"sum(job:scalabl_request_errors:increase1h{JOB}) / sum(job:scalabl_requests:increase1h{JOB})",
            "percentunit",
        ),
        (
            "Refused",
            "Share of requests answered with 429, on all replicas.",
            f"max(job:scalabl_rejected:now{JOB})",
            "percentunit",
        ),
        (
            "Fullest queue",
            "Fill of the fullest queue, by inputs or tokens, whichever is more.",
            f"max(instance:scalabl_queue_fill:now{SOME})",
            "percentunit",
        ),
        (
            "Inputs answered",
            "Inputs answered per second, by all adapters.",
            f"sum({rate('scalabl_predictions_total')})",
            "cps",
        ),
    ):
        board.with_panel(number(title, text, Query(expr, title), unit))


def _requests(board: dashboard.Dashboard) -> None:
    board.with_row(dashboard.Row("Requests"))
    query = Query(f"sum by (code) ({rate('scalabl_requests_total', SERVING)})", "{{code}}")
    text = (
        "Requests for predictions and feedback. 429: the queue is full; 499: the client left; 503 and 504: see the runbook."
    )
    board.with_panel(lines("Requests by status", text, [query], "reqps", stacked=True, low=0))
    selector = where(SOME, 'route=~"/predict|/v2/models/.*/infer"')
    text = "Time from request to answer, for predictions only."
    board.with_panel(lines("Latency", text, quantiles("scalabl_request_duration_seconds", selector), "s", low=0))
    budget = "job:scalabl_request_errors:increase{w}{job} / job:scalabl_requests:increase{w}{job} / 0.001"
    queries = [Query(budget.format(w=window, job=JOB), f"{window}, {{{{job}}}}") for window in ("1h", "6h", "3d")]
    text = "Rate at which the error budget (0.1% over 30 days) is spent. At 1 it lasts exactly 30 days. All replicas."
    board.with_panel(lines("Error budget burn", text, queries, "none", low=0, width=8))
    query = Query(f"sum by (route) ({rate('scalabl_requests_total')})", "{{route}}")
    board.with_panel(
        lines("Requests by route", "All requests, health probes included.", [query], "reqps", stacked=True, low=0, width=8)
    )
    query = Query(f"sum by (key) ({rate('scalabl_key_requests_total')})", "{{key}}")
    text = "Requests by the name of their API key. Empty if the server has no keys."
    board.with_panel(lines("Requests by key", text, [query], "reqps", stacked=True, low=0, width=8))


def _queue(board: dashboard.Dashboard) -> None:
    board.with_row(dashboard.Row("Queue"))
    queries = [
        Query(f"scalabl_queue_inputs{SOME}", "{{instance}}"),
        Query(f"min(scalabl_queue_limit_inputs{SOME})", "Limit"),
    ]
    text = "Inputs that wait for a forward pass. Use it to scale the number of replicas."
    board.with_panel(
        lines("Inputs in the queue", text, queries, "short", low=0, width=8, looks=[Look("Limit", dashed=True, color="red")])
    )
    query = Query(f"instance:scalabl_queue_fill:now{SOME}", "{{instance}}")
    text = "Fill by inputs or by tokens, whichever is more. The alert fires above 80% for five minutes."
    board.with_panel(lines("Fill of the queue", text, [query], "percentunit", low=0, width=8))
    query = Query(f"sum by (reason) ({rate('scalabl_rejected_requests_total')})", "{{reason}}")
    text = "Requests answered with 429, since too many inputs or tokens wait or the deadline would pass."
    board.with_panel(lines("Refused requests", text, [query], "reqps", stacked=True, low=0, width=8))


def _passes(board: dashboard.Dashboard) -> None:
    board.with_row(dashboard.Row("Forward passes"))
    query = Query(mean("scalabl_stage_duration_seconds", "stage"), "{{stage}}")
    text = (
        "Mean times: tokenise and total per request, queue per input, forward per forward pass. If queue is above forward, "
        "add replicas."
    )
    board.with_panel(lines("Time in the queue and in passes", text, [query], "s", low=0, width=8))
    queries = [
        Query(mean("scalabl_batch_rows", "instance"), "{{instance}}, rows"),
        Query(mean("scalabl_batch_tokens", "instance"), "{{instance}}, tokens"),
    ]
    text = (
        "Mean rows (inputs x samples) and tokens (with padding) per pass. If passes stay small under load, raise "
        "--target-batch-tokens."
    )
    board.with_panel(lines("Size of passes", text, queries, "short", low=0, width=8))
    query = Query(mean("scalabl_pass_gap_seconds", "instance"), "{{instance}}")
    text = (
        "Mean time between two passes, when the batch of the second was already chosen. If it is above a hundredth of "
        "forward, the process lacks CPU."
    )
    board.with_panel(lines("Between two passes", text, [query], "s", low=0, width=8))
    queries = [
        Query(f"sum({rate('scalabl_batch_tokens_sum')})", "Computed"),
        Query(f"sum({rate('scalabl_padding_tokens_total')})", "Padding among them"),
    ]
    board.with_panel(
        lines(
            "Tokens per second",
            "Computed tokens (rows x padded length), and the padding among them.",
            queries,
            "cps",
            low=0,
            width=8,
        )
    )
    forward = where(SOME, 'stage="forward"')
    query = Query(f"sum by (instance) ({rate('scalabl_stage_duration_seconds_count', forward)})", "{{instance}}")
    board.with_panel(lines("Passes per second", "Forward passes per second, by replica.", [query], "cps", low=0, width=8))
    queries = [
        Query(f"sum by (kind) (increase(scalabl_failed_passes_total{SOME}[$__rate_interval]))", "{{kind}}"),
        Query(f"sum(increase(scalabl_batch_splits_total{SOME}[$__rate_interval]))", "Batches split in two"),
    ]
    board.with_panel(lines("Failed passes", "If it is above 0, look at the server's log.", queries, "short", low=0, width=8))
    hit = f"sum by (instance) ({rate('scalabl_prefix_cache_hit_tokens_total')})"
    asked = f"sum by (instance) ({rate('scalabl_prefix_cache_queried_tokens_total')})"
    query = Query(f"{hit} / {asked}", "{{instance}}")
    text = "Share of prompt tokens found in the prefix cache, since earlier prompts began with the same tokens."
    board.with_panel(lines("Tokens from the prefix cache", text, [query], "percentunit", low=0, high=1, width=8))
    queries = [
        Query(f"scalabl_prefix_cache_bytes{SOME}", "{{instance}}"),
        Query(f"min(scalabl_prefix_cache_limit_bytes{SOME})", "Limit"),
    ]
    text = "Size of the attention keys and values in the prefix cache."
    limit = [Look("Limit", dashed=True, color="red")]
    board.with_panel(lines("Prefix cache", text, queries, "bytes", low=0, width=8, looks=limit))
    query = Query(f"increase(scalabl_prefix_cache_evictions_total{SOME}[$__rate_interval])", "{{instance}}")
    text = (
        "Prefixes dropped to make room for others. If there are many while few tokens come from the cache, raise "
        "--prefix-cache-bytes."
    )
    board.with_panel(lines("Dropped from the prefix cache", text, [query], "short", low=0, width=8))


def _answers(board: dashboard.Dashboard) -> None:
    board.with_row(dashboard.Row("Answers and differences between replicas"))
    query = Query(f"sum by (adapter) ({rate('scalabl_predictions_total')})", "{{adapter}}")
    board.with_panel(
        lines("Inputs answered by adapter", "Over the selected replicas.", [query], "cps", stacked=True, low=0, width=8)
    )
    query = Query(mean("scalabl_prediction_confidence", "instance, adapter"), "{{instance}}, {{adapter}}")
    text = "A replica that differs from the others has different weights, samples, settings or traffic."
    board.with_panel(lines("Mean confidence by replica", text, [query], "percentunit", high=1, width=8))
    queries = [
        Query(f"scalabl_ready{SOME}", "{{instance}}, ready"),
        Query(f"scalabl_adapters_loaded{SOME}", "{{instance}}, adapters"),
        Query(f"count by (version) (scalabl_build_info{SOME})", "Version {{version}}, replicas"),
    ]
    board.with_panel(
        lines(
            "Ready, adapters and versions",
            "Should be the same on all replicas, except while one starts or drains.",
            queries,
            "short",
            low=0,
            width=8,
        )
    )


def _outcomes(board: dashboard.Dashboard) -> None:
    board.with_row(dashboard.Row("Outcomes database"))
    text = "Time of a commit. Every answer waits for one, up to --outcomes-timeout."
    queries = quantiles("scalabl_outcomes_commit_duration_seconds")
    board.with_panel(lines("Commits to the outcomes database", text, queries, "s", low=0, width=8))
    queries = [
        Query(f"scalabl_outcomes_up{SOME}", "{{instance}}, up"),
        Query(f"increase(scalabl_outcomes_errors_total{SOME}[$__rate_interval])", "{{instance}}, failures"),
        Query(
            f"sum by (instance) (increase(scalabl_predictions_unrecorded_total{SOME}[$__rate_interval]))",
            "{{instance}}, predictions not stored",
        ),
        Query(f"increase(scalabl_outcomes_deleted_total{SOME}[$__rate_interval])", "{{instance}}, predictions deleted"),
    ]
    text = (
        "up is 1 while the database can be used. The others count failures, predictions not stored, and predictions deleted."
    )
    board.with_panel(lines("State of the outcomes database", text, queries, "short", low=0, width=8))
    query = Query(f"sum by (status) ({rate('scalabl_feedback_labels_total')})", "{{status}}")
    board.with_panel(
        lines(
            "Labels received",
            "Labels by what they changed: recorded, unchanged or corrected.",
            [query],
            "cps",
            stacked=True,
            low=0,
            width=8,
        )
    )


def _process(board: dashboard.Dashboard) -> None:
    board.with_row(dashboard.Row("Processes"))
    for title, expr, unit, text in (
        (
            "Memory",
            f"process_resident_memory_bytes{SOME}",
            "bytes",
            "Resident memory. It should not grow after the warm-up.",
        ),
        ("CPU", rate("process_cpu_seconds_total"), "none", "CPU cores in use."),
        ("Open files", f"process_open_fds{SOME}", "short", "Open file descriptors, including connections."),
    ):
        board.with_panel(lines(title, text, [Query(expr, "{{instance}}")], unit, low=0, width=8))
