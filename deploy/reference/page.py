"""The text of docs/reference.md. Writing it, and comparing it with the committed page, is in `__main__`.

Names, defaults, descriptions, statuses and labels come from the code. What the code does not say (when to change a flag,
what to do about an error, when to look at a metric) comes from words.toml. A name that only one of them has is refused.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from prometheus_client import Metric
from prometheus_client.metrics import MetricWrapperBase
from pydantic_core import PydanticUndefined
from scalabl_server.engines.vllm.client import Outcome
from scalabl_server.observe.metrics import Metrics, PassFailure, Reason, Stage
from scalabl_server.outcomes.operations import Status
from scalabl_server.outcomes.scoring import FAMILIES, RETRACTED
from scalabl_server.settings import ServeSettings
from scalabl_server.web.errors import STATUSES

WORDS = Path(__file__).with_name("words.toml")

LABEL_VALUES: dict[str, tuple[str, ...]] = {
    "stage": get_args(Stage),
    "reason": get_args(Reason),
    "kind": get_args(PassFailure),
    "outcome": get_args(Outcome),
    "status": get_args(Status),
}
SUFFIXES = {"counter": "_total", "info": "_info"}  # what Prometheus appends to the name of a family


class MismatchError(ValueError):
    """The code and words.toml name different flags, errors or metrics."""


def render() -> str:
    """The text of docs/reference.md."""
    words = tomllib.loads(WORDS.read_text(encoding="utf-8"))
    introductions = words["introductions"]
    parts = [introductions["page"], _flags(words["flags"])]
    parts += ["## Errors\n", introductions["errors"], _errors(words["errors"])]
    parts += ["## Metrics\n", introductions["metrics"], _metrics(words["metrics"])]
    parts += ["### Calibration counters\n", introductions["calibration"], _calibration_counters()]
    return "\n".join(parts)


def _flags(groups: list[dict[str, Any]]) -> str:
    """A table for each group of flags, in the order of words.toml."""
    listed = [name for group in groups for name in group["advice"]]
    _compare("flags", listed, ServeSettings.model_fields)
    parts = ["## Flags\n"]
    for group in groups:
        rows = []
        for name, advice in group["advice"].items():
            field = ServeSettings.model_fields[name]
            rows.append((f"`--{name.replace('_', '-')}`", shown_default(field.default), field.description or "", advice))
        parts.append(f"### {group['title']}\n")
        if "introduction" in group:
            parts.append(f"{group['introduction']}\n")
        parts.append(_table(("flag", "default", "what it does", "when to change it"), rows))
    return "\n".join(parts)


def shown_default(default: object) -> str:
    """A default as the page shows it."""
    if default is PydanticUndefined:
        return "required"
    if default is None:
        return "*none*"
    return f"`{default}`" if default != "" else "*empty*"


def _errors(advice: Mapping[str, list[str]]) -> str:
    _compare("errors", list(advice), STATUSES)
    rows = [(str(status), f"`{slug}`", title, *advice[slug]) for slug, (status, title) in STATUSES.items()]
    return _table(("status", "kind", "title", "when it is sent", "what to do"), rows)


def _metrics(advice: Mapping[str, str]) -> str:
    metrics = Metrics()
    families = [family for family in metrics.registry.collect() if family.name.startswith("scalabl_")]
    _compare("metrics", list(advice), [family.name + SUFFIXES.get(family.type, "") for family in families])
    labels = _labels(metrics)
    rows = []
    for family in families:
        name = family.name + SUFFIXES.get(family.type, "")
        shown = [_label(label) for label in labels.get(family.name, _sample_labels(family))]
        rows.append((f"`{name}`", family.type, ", ".join(shown), family.documentation, advice[name]))
    return _table(("metric", "type", "labels", "what it measures", "look when"), rows)


def _labels(metrics: Metrics) -> dict[str, tuple[str, ...]]:
    """The label names of each metric that is an attribute of `Metrics`, whether or not it has samples yet."""
    names = {}
    for metric in vars(metrics).values():
        if isinstance(metric, MetricWrapperBase):
            (family,) = metric.describe()
            names[family.name] = tuple(metric._labelnames)  # NOTE: prometheus_client has no public attribute for these
    return names


def _sample_labels(family: Metric) -> tuple[str, ...]:
    """The label names of a family by its first sample, when it has one."""
    return tuple(family.samples[0].labels) if family.samples else ()


def _label(name: str) -> str:
    values = LABEL_VALUES.get(name)
    return f"`{name}`" if values is None else f"`{name}` ({', '.join(values)})"


def _calibration_counters() -> str:
    rows = []
    for family in FAMILIES.values():
        names = f"`{family.metric}_total`"
        if family.of_labels:
            names += f", `{family.metric}{RETRACTED}_total`"
        rows.append((names, f"`adapter`, `{family.label}`", family.text))
    return _table(("metric", "labels", "what it counts"), rows)


def _compare(kind: str, listed: list[str], actual: Iterable[str]) -> None:
    """Check that words.toml lists every name exactly once and no other name.

    Raises:
        MismatchError: which names differ.
    """
    names = set(actual)
    differences = [
        f"{what}: {', '.join(sorted(which))}"
        for what, which in (
            ("missing", names - set(listed)),
            ("unknown", set(listed) - names),
            ("listed twice", {name for name in listed if listed.count(name) > 1}),
        )
        if which
    ]
    if differences:
        raise MismatchError(f"{WORDS.name}, {kind}: {'; '.join(differences)}")


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(_lines(header, rows)) + "\n"


def _lines(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        assert len(row) == len(header), row
        yield "| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |"
