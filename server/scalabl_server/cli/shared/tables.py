"""Prints the report of `scalabl evaluate` as tables on standard error, for people. Programs read the JSON report."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

LABELLED = {
    "accuracy": "accuracy",
    "nll": "NLL (nats)",
    "ece": "ECE, 15 equal bins",
    "ece_adaptive": "ECE, 15 bins of equal counts",
    "ece_classwise": "ECE, class-wise",
    "brier": "Brier score",
    "entropy": "mean entropy (nats)",
    "mutual_information": "mean mutual information (nats)",
}
DOUBTS = {"mutual_information": "mutual information", "entropy": "entropy", "confidence": "1 - confidence"}


def print_report(report: dict[str, Any]) -> None:
    """Print the tables of a report."""
    console = Console(stderr=True)
    for table in tables(report):
        console.print(table)


def tables(report: dict[str, Any]) -> list[Table]:
    """One table for the labelled set and one for each out-of-distribution set. A row is a score with its interval."""
    data = report["data"]
    labelled = _table(data, f"{report['adapter']} on {data['name']}", report["num_samples"])
    for name, label in LABELLED.items():
        _add(labelled, label, data, name)
    for prefix, label in (("auroc_wrong", "AUROC of wrong answers"), ("aurc", "area under risk-coverage")):
        for name, doubt in DOUBTS.items():
            _add(labelled, f"{label}, {doubt}", data, f"{prefix}_{name}")
    _add_decisions(labelled, data)
    result = [labelled]
    for ood in report["ood"]:
        table = _table(ood, f"{ood['name']} against {data['name']}", report["num_samples"])
        for name, doubt in (DOUBTS | {"novelty": "novelty"}).items():
            _add(table, f"AUROC, {doubt}", ood, f"auroc_ood_{name}")
        for name, doubt in (DOUBTS | {"novelty": "novelty"}).items():
            _add(table, f"share that passes where 95% of {data['name']} do, {doubt}", ood, f"fpr95_ood_{name}")
        _add(table, "mean entropy (nats)", ood, "ood_entropy")
        _add(table, "mean mutual information (nats)", ood, "ood_mutual_information")
        _add_decisions(table, ood)
        result.append(table)
    return result


def _table(data: dict[str, Any], title: str, num_samples: int) -> Table:
    cost = f"{data['cost']['seconds_per_input']:.3g} s and {data['cost']['tokens_per_input']:.1f} tokens per input"
    method = f"{num_samples} samples" if num_samples else "linearized"
    table = Table(title=title, caption=f"{data['inputs']} inputs, {method}, {cost}")
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column("95% interval", justify="right")
    return table


def _add(table: Table, label: str, data: dict[str, Any], name: str) -> None:
    if name in data:
        low, high = data.get("intervals", {}).get(name, (None, None))
        table.add_row(label, f"{data[name]:.4f}", "" if low is None else f"{low:.4f} … {high:.4f}")


def _add_decisions(table: Table, data: dict[str, Any]) -> None:
    for sets in data.get("prediction_sets", ()):
        label = f"{sets['method'].upper()} sets at {sets['level']:g}"
        if "coverage" in sets:
            table.add_row(
                f"{label}: coverage", f"{sets['coverage']:.4f}", f"conformal rule alone {sets['coverage_of_rule']:.4f}"
            )
        table.add_row(f"{label}: mean size", f"{sets['mean_size']:.3f}", "")
    if (novelty := data.get("novelty")) is not None:
        for alpha, share in novelty["p_value_at_most"].items():
            table.add_row(f"novelty p-value at most {alpha}", f"{share:.4f}", "")
    abstention = data.get("abstention")
    if abstention is not None:
        table.add_row("answered without abstention", f"{abstention['answered']:.4f}", "")
        if "risk" in abstention:
            target = f"target {abstention['target_risk']:g}" if "target_risk" in abstention else ""
            table.add_row("wrong among the answered", f"{abstention['risk']:.4f}", target)
