"""The dashboard *ScalaBL: calibration*: whether confidence, prediction sets and uncertainty are correct."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard
from scalabl_server.outcomes.scoring import UPPER_EDGES

from deploy.grafana.panels import Look, Query, buckets, choice, clouds, curve, lines, new_board, number, rows

# The selector of every query: one adapter, all of its replicas.
ONE = '{namespace=~"$namespace", job=~"$job", adapter="$adapter"}'
LABELS = "Over the last day, by the time of the label (the window of the recording rules)."
BAND = "rgba(128, 128, 128, 0.6)"

LABELLED = f"adapter_bin:scalabl_outcomes:recent{ONE}"
CONFIDENCE = f"adapter_bin:scalabl_confidence:recent{ONE}"
ACCURACY = f"adapter_bin:scalabl_accuracy:recent{ONE}"
# Two standard deviations of a bin's accuracy, for a calibrated adapter.
CHANCE = f"2 * sqrt(adapter_bin:scalabl_outcomes_variance:recent{ONE}) / ({LABELLED} > 0.5)"

BY_CONFIDENCE = [
    Query(CONFIDENCE, "Confidence"),
    Query(ACCURACY, "Accuracy"),
    Query(f"clamp_min({CONFIDENCE} - {CHANCE}, 0)", "Chance, low"),
    Query(f"clamp_max({CONFIDENCE} + {CHANCE}, 1)", "Chance, high"),
    Query(f"{LABELLED} > 0.5", "Labels"),
]


def from_bin_up(metric: str) -> str:
    """PromQL: for each bin with labels, the sum over it and all bins of higher confidence, with the bin as label `least`."""
    sums = []
    for index, edge in enumerate(UPPER_EDGES):
        bins = "|".join(UPPER_EDGES[index:])
        selected = metric.replace("}", f', bin=~"{bins}"}}')
        labels_of_bin = LABELLED.replace("}", f', bin="{edge}"}}')
        total = f"sum without (bin) ({selected}) and sum without (bin) ({labels_of_bin} > 0.5)"
        sums.append(f'label_replace({total}, "least", "{edge}", "", "")')
    return " or ".join(sums)


ANSWERED = from_bin_up(LABELLED)
ANSWERED_RIGHT = from_bin_up(f"adapter_bin:scalabl_outcomes_correct:recent{ONE}")


def build() -> dashboard.Dashboard:
    """The whole dashboard."""
    board = new_board(
        "ScalaBL: calibration",
        "scalabl-calibration",
        "Accuracy, calibration, prediction sets and uncertainty of one adapter, over all replicas. docs/runbook.md says "
        "what to do about its alerts.",
        "7d",
    )
    adapters = 'label_values(scalabl_outcomes_total{namespace=~"$namespace", job=~"$job"}, adapter)'
    board.with_variable(choice("adapter", "Adapter", adapters, every=False))
    for panel in (_labelled_numbers, _calibration, _selection, _uncertainty, _labels):
        panel(board)
    return board


def _labelled_numbers(board: dashboard.Dashboard) -> None:
    board.with_row(dashboard.Row("Labels of the last day"))
    for title, name, unit, decimals, text in (
        (
            "ECE",
            "ece",
            "none",
            3,
            "Expected calibration error, 15 bins. It is not 0 even for a calibrated adapter: see the ECE panel.",
        ),
        ("Accuracy", "accuracy", "percentunit", 1, "Share of labels that equal the prediction."),
        (
            "Mean confidence",
            "confidence",
            "percentunit",
            1,
            "Mean confidence of the same predictions. Above the accuracy means over-confident.",
        ),
        ("Labels", "outcomes", "short", 0, "Number of labels. Below 100 no alert on calibration fires."),
        (
            "Abstained",
            "abstention",
            "percentunit",
            1,
            "Share of all predictions with abstention. Also 0 without a calibration.",
        ),
    ):
        query = Query(f"adapter:scalabl_{name}:recent{ONE}", title)
        board.with_panel(number(title, f"{text} {LABELS}", query, unit, decimals=decimals))
    coverage = Query(f"adapter_level:scalabl_coverage:recent{ONE}", "{{level}}")
    text = f"Share of prediction sets that contain the label, by nominal coverage. {LABELS}"
    board.with_panel(number("Coverage of sets", text, coverage, "percentunit", decimals=1))


def _calibration(board: dashboard.Dashboard) -> None:
    board.with_row(dashboard.Row("Calibration"))
    board.with_panel(
        curve(
            "Reliability diagram",
            "Accuracy against mean confidence, a point for each bin with labels. Points below the diagonal are "
            "over-confident. Within the band (two standard deviations) the difference may be chance. Bars: number of "
            f"labels. {LABELS}",
            [Query(CONFIDENCE, "Mean confidence"), *BY_CONFIDENCE],
            "percentunit",
            x="Mean confidence",
            looks=[
                Look("Confidence", dashed=True, color=BAND),
                Look("Accuracy", points=True, width=2, color="blue"),
                Look("Chance, low", width=0, color=BAND),
                Look("Chance, high", width=0, below="Chance, low", color=BAND),
                Look("Labels", bars=True, color=BAND),
            ],
        )
    )
    text = f"The numbers of the reliability diagram. bin is the upper edge of the confidence. {LABELS}"
    board.with_panel(
        rows("Calibration by confidence", text, BY_CONFIDENCE, "percentunit", sort="Confidence", counts=["Labels"])
    )
    floor, deviation = f"adapter:scalabl_ece_floor:recent{ONE}", f"adapter:scalabl_ece_deviation:recent{ONE}"
    board.with_panel(
        lines(
            "ECE with its confidence band",
            "The band is the ECE of a calibrated adapter with as many labels in the same bins (mean and two standard "
            f"deviations). The alert fires above the dashed line, if ECE is also above 0.05. {LABELS}",
            [
                Query(f"adapter:scalabl_ece:recent{ONE}", "ECE"),
                Query(f"clamp_min({floor} - 2 * {deviation}, 0)", "Calibrated, low"),
                Query(f"{floor} + 2 * {deviation}", "Calibrated, high"),
                Query(f"{floor} + 4 * {deviation}", "Alert"),
            ],
            "none",
            low=0,
            looks=[
                Look("ECE", width=2, color="blue"),
                Look("Calibrated, low", width=0, color=BAND),
                Look("Calibrated, high", width=0, below="Calibrated, low", color=BAND),
                Look("Alert", dashed=True, color="red"),
            ],
        )
    )
    queries = [
        Query(f"adapter:scalabl_accuracy:recent{ONE}", "Accuracy"),
        Query(f"adapter:scalabl_confidence:recent{ONE}", "Mean confidence"),
    ]
    text = f"Mean confidence above accuracy means over-confident. {LABELS}"
    board.with_panel(lines("Accuracy and mean confidence", text, queries, "percentunit", high=1, width=6))
    queries = [
        Query(f"adapter:scalabl_brier:recent{ONE}", "Brier score"),
        Query(f"adapter:scalabl_log_loss_nats:recent{ONE}", "Log loss (nats)"),
    ]
    text = (
        "Proper scores: lower is better. Both calibration and accuracy improve them. The log loss is that of labels that "
        f"are not null. {LABELS}"
    )
    board.with_panel(lines("Brier score and log loss", text, queries, "none", low=0, width=6))


def _selection(board: dashboard.Dashboard) -> None:
    board.with_row(dashboard.Row("Prediction sets and abstention"))
    board.with_panel(
        curve(
            "Risk and coverage by confidence",
            "If only predictions above a confidence were answered (a point for each bin): the share of inputs that would be "
            f"answered, and the share of wrong answers among them. {LABELS}",
            [
                Query(f"({ANSWERED}) / ignoring (least) group_left () adapter:scalabl_outcomes:recent{ONE}", "Answered"),
                Query(f"1 - ({ANSWERED_RIGHT}) / (({ANSWERED}) > 0.5)", "Wrong"),
            ],
            "percentunit",
            x="Answered",
            looks=[Look("Wrong", points=True, width=2, color="blue")],
        )
    )
    level = f"adapter_level:scalabl_coverage_nominal:recent{ONE}"
    chance = f"2 * adapter_level:scalabl_coverage_deviation:recent{ONE}"
    board.with_panel(
        lines(
            "Coverage of prediction sets",
            "Share of prediction sets that contain the label, by nominal coverage. Between the dashed lines (two standard "
            f"deviations) the difference may be chance. {LABELS}",
            [
                Query(f"adapter_level:scalabl_coverage:recent{ONE}", "{{level}}"),
                Query(f"{level} - {chance}", "{{level}}, low"),
                Query(f"clamp_max({level} + {chance}, 1)", "{{level}}, high"),
            ],
            "percentunit",
            high=1,
        ).override_by_regexp(".*, (low|high)", Look("", dashed=True, color=BAND).properties())
    )
    queries = [
        Query(f"adapter:scalabl_abstention:recent{ONE}", "Abstained"),
        Query(f"1 - adapter:scalabl_selective_accuracy:recent{ONE}", "Wrong, where answered"),
        Query(f"1 - adapter:scalabl_accuracy:recent{ONE}", "Wrong, had all been answered"),
    ]
    text = f"Share of abstentions, and the share of wrong answers with and without abstention. {LABELS}"
    board.with_panel(lines("Abstention", text, queries, "percentunit", low=0))
    query = Query(f"adapter_level:scalabl_set_choices:recent{ONE}", "{{level}}")
    text = f"Mean number of choices in a prediction set, by nominal coverage. Small sets are more informative. {LABELS}"
    board.with_panel(lines("Mean size of prediction sets", text, [query], "none", low=0))
    queries = [
        Query(f"adapter:scalabl_abstained_outside:recent{ONE}", "Of the abstentions"),
        Query(f"adapter:scalabl_answered_outside:recent{ONE}", "Of the answers"),
    ]
    text = (
        "Share of labels null: none of the choices was the true answer. A useful abstention has many of them, and leaves "
        f"few among the answers. {LABELS}"
    )
    board.with_panel(lines("None of the choices", text, queries, "percentunit", low=0))


def _uncertainty(board: dashboard.Dashboard) -> None:
    board.with_row(dashboard.Row("Uncertainty, of all predictions"))
    kinds = (
        ("Mutual information", "mutual_information", "Epistemic: high for inputs unlike the training data."),
        ("Entropy", "entropy", "Total uncertainty: of the input and of the model."),
    )
    for title, name, text in kinds:
        expr = f"sum by (le) (increase(scalabl_prediction_{name}_nats_bucket{ONE}[$__rate_interval]))"
        board.with_panel(clouds(title, f"{text} In nats.", expr, "none"))
    for title, name, text in kinds:
        query = Query(f"adapter_quantile:scalabl_{name}_nats:now{ONE}", "p{{quantile}}")
        board.with_panel(
            lines(f"Quantiles of {title.lower()}", f"{text} In nats, of the last hour.", [query], "none", low=0)
        )
    metric = "adapter_le:scalabl_prediction_mutual_information_nats_bucket"
    for title, when, text in (
        ("Mutual information, last hour", "now", "Shares of predictions in the last hour."),
        (
            "Mutual information, reference",
            "reference",
            "Shares of predictions in the week that ended a day ago.",
        ),
    ):
        share = f"{metric}:{when}{ONE} / ignoring (le) group_left () (adapter:scalabl_predictions:{when}{ONE} > 0.5)"
        board.with_panel(buckets(title, f"{text} In nats.", share, "percentunit"))
    queries = [
        Query(f"adapter:scalabl_mutual_information_distance:now{ONE}", "Distance"),
        Query(f"adapter:scalabl_mutual_information_distance_noise:now{ONE}", "Chance"),
    ]
    text = (
        "Kolmogorov-Smirnov distance between the last hour and the reference. The alert fires above 0.2, if the distance "
        "is also above what chance gives once in 1,000 times. Empty until there is a reference, a day after the first "
        "prediction."
    )
    board.with_panel(
        lines("Drift of mutual information", text, queries, "none", low=0, looks=[Look("Chance", dashed=True, color="red")])
    )


def _labels(board: dashboard.Dashboard) -> None:
    board.with_row(dashboard.Row("Labels"))
    delay = f"sum by (le) (increase(scalabl_label_delay_seconds_bucket{ONE}[1d]))"
    queries = [Query(f"histogram_quantile({q}, {delay})", f"p{q}") for q in (0.5, 0.9, 0.99)]
    text = (
        "Time from a prediction to its first label, for labels of the last day. Ids expire after --outcomes-retention-days."
    )
    board.with_panel(lines("Label delay", text, queries, "s", low=0, width=8))
    queries = [
        Query(f"adapter:scalabl_recorded_predictions:recent{ONE}", "Predictions"),
        Query(f"adapter:scalabl_outcomes:recent{ONE}", "Labels"),
    ]
    board.with_panel(lines("Predictions and labels per day", LABELS, queries, "short", low=0, width=8))
    count = "increase(scalabl_outcomes{what}_total{one}[$__rate_interval])"
    queries = [
        Query(f"sum({count.format(what='', one=ONE)})", "Labels, corrections included"),
        Query(f"sum({count.format(what='_retracted', one=ONE)})", "Retracted by corrections"),
    ]
    text = "Many corrections mean that labels are unreliable or sent too early."
    board.with_panel(lines("Labels and corrections", text, queries, "short", low=0, width=8))
