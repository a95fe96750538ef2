"""The parts of the dashboards: data source, variables, queries, and a function per kind of panel. No dashboard is here."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from grafana_foundation_sdk.builders import bargauge, dashboard, heatmap, prometheus, stat, table, timeseries, trend
from grafana_foundation_sdk.builders import common as options
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    DataTransformerConfig,
    DynamicConfigValue,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode, HeatmapColorScale
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
TAG = "scalabl"

Panel = TypeVar("Panel", bargauge.Panel, heatmap.Panel, stat.Panel, table.Panel, timeseries.Panel, trend.Panel)


@dataclass(frozen=True)
class Query:
    """A PromQL query and the name of its result in the legend."""

    expr: str
    name: str = "__auto"


@dataclass(frozen=True)
class Look:
    """How the series named `field` is drawn. With `below`, the area down to the series of that name is filled."""

    field: str
    dashed: bool = False
    below: str | None = None
    points: bool = False
    bars: bool = False
    color: str | None = None
    width: int = 1

    def properties(self) -> list[DynamicConfigValue]:
        properties: dict[str, Any] = {"custom.lineWidth": self.width}
        if self.dashed:
            properties["custom.lineStyle"] = {"fill": "dash", "dash": [8, 6]}
        if self.below is not None:
            properties |= {"custom.fillBelowTo": self.below, "custom.fillOpacity": 15}
        if self.points:
            properties |= {"custom.showPoints": "always", "custom.pointSize": 7}
        if self.bars:
            properties |= {
                "custom.drawStyle": "bars",
                "custom.fillOpacity": 20,
                "custom.axisPlacement": "right",
                "unit": "short",
            }
        if self.color is not None:
            properties["color"] = {"mode": "fixed", "fixedColor": self.color}
        return [DynamicConfigValue(id_val=name, value=value) for name, value in properties.items()]


def new_board(title: str, uid: str, text: str, period: str) -> dashboard.Dashboard:
    """An empty dashboard with its data source, the variables that every query uses, and marks for firing alerts."""
    marks = (
        dashboard.AnnotationQuery()
        .name("Alerts")
        .datasource(SOURCE)
        .enable(True)
        .icon_color("red")
        .expr('ALERTS{alertname=~"Scalabl.*", alertstate="firing", namespace=~"$namespace", job=~"$job|"}')
    )
    others = dashboard.DashboardLink("ScalaBL").type(DashboardLinkType.DASHBOARDS).tags([TAG]).include_vars(True)
    return (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(text)
        .tags([TAG])
        .readonly()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .time(f"now-{period}", "now")
        .refresh("1m")
        .timezone("browser")
        .annotation(marks)
        .link(others.keep_time(True))
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(choice("namespace", "Namespace", "label_values(scalabl_ready, namespace)"))
        .with_variable(choice("job", "Job", 'label_values(scalabl_ready{namespace=~"$namespace"}, job)', every=False))
    )


def choice(name: str, label: str, query: str, *, every: bool = True, multi: bool = False) -> dashboard.QueryVariable:
    """A variable with values from Prometheus. With `every`, all are selected at first, also series without the label."""
    variable = (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query({"query": query, "refId": f"variable-{name}"})
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(multi)
        .include_all(every)
    )
    if every:
        variable.all_value(".*").current(VariableOption(text="All", value="$__all", selected=True))
    return variable


def lines(
    title: str,
    text: str,
    queries: Sequence[Query],
    unit: str,
    *,
    looks: Sequence[Look] = (),
    stacked: bool = False,
    low: float | None = None,
    high: float | None = None,
    width: int = 12,
) -> timeseries.Panel:
    """Lines over time."""
    panel = _panel(timeseries.Panel(), title, text, queries, unit, width)
    _named(panel)
    panel.show_points(common.VisibilityMode.NEVER).fill_opacity(25 if stacked else 0)
    if stacked:
        panel.stacking(options.StackingConfig().mode(common.StackingMode.NORMAL).group("A"))
    if low is not None:
        panel.min(low)
    if high is not None:
        panel.max(high)
    for look in looks:
        panel.override_by_name(look.field, look.properties())
    return panel


def curve(
    title: str, text: str, queries: Sequence[Query], unit: str, *, x: str, looks: Sequence[Look], width: int = 12
) -> trend.Panel:
    """A curve now over another quantity than time: the query named `x`, no two values of which may be equal."""
    panel = _panel(trend.Panel(), title, text, queries, unit, width, height=10, at_once=True)
    panel.x_field(x).min(0).show_points(common.VisibilityMode.NEVER)
    _named(panel)
    for step in joined(queries, sort=x, hidden=("bin", "least")):
        panel.with_transformation(step)
    for look in looks:
        panel.override_by_name(look.field, look.properties())
    return panel


def rows(
    title: str, text: str, queries: Sequence[Query], unit: str, *, sort: str, counts: Sequence[str] = (), width: int = 12
) -> table.Panel:
    """The same as a table; `counts` are fields that are not in `unit`."""
    panel = _panel(table.Panel(), title, text, queries, unit, width, height=10, at_once=True)
    for step in joined(queries, sort=sort):
        panel.with_transformation(step)
    for field in counts:
        short = [DynamicConfigValue(id_val="unit", value="short"), DynamicConfigValue(id_val="decimals", value=0)]
        panel.override_by_name(field, short)
    return panel


def joined(queries: Sequence[Query], sort: str, hidden: Sequence[str] = ()) -> list[DataTransformerConfig]:
    """Grafana's steps from one table for each query to one with a column for each, named as the queries are."""
    hidden = ("Time", "namespace", "job", "adapter", *hidden)
    values = ["Value"] if len(queries) == 1 else [f"Value #{letter}" for letter, _ in _lettered(queries)]
    names = {value: query.name for value, query in zip(values, queries, strict=True)}
    organize = {"excludeByName": dict.fromkeys(hidden, True), "indexByName": {}, "renameByName": names}
    return [
        DataTransformerConfig(id_val="merge", options={}),
        DataTransformerConfig(id_val="organize", options=organize),
        DataTransformerConfig(id_val="sortBy", options={"fields": {}, "sort": [{"field": sort}]}),
    ]


def number(title: str, text: str, query: Query, unit: str, *, decimals: int | None = None, width: int = 4) -> stat.Panel:
    """The last value, large."""
    panel = _panel(stat.Panel(), title, text, [query], unit, width, height=4)
    panel.reduce_options(options.ReduceDataOptions().calcs(["lastNotNull"]))
    panel.graph_mode(common.BigValueGraphMode.AREA).color_mode(common.BigValueColorMode.NONE)
    if decimals is not None:
        panel.decimals(decimals)
    return panel


def buckets(title: str, text: str, expr: str, unit: str, *, width: int = 6) -> bargauge.Panel:
    """The current histogram: a bar for each bucket, from cumulative counts or shares by `le`."""
    panel = _panel(bargauge.Panel(), title, text, [], unit, width)
    panel.with_target(_target("A", Query(expr, "{{le}}")).format(PromQueryFormat.HEATMAP).range())
    panel.reduce_options(options.ReduceDataOptions().calcs(["lastNotNull"]))
    panel.orientation(common.VizOrientation.HORIZONTAL).display_mode(common.BarGaugeDisplayMode.BASIC)
    return panel.min(0)


def clouds(title: str, text: str, expr: str, unit: str, *, width: int = 12) -> heatmap.Panel:
    """A histogram over time. `unit` is the unit of the buckets' edges."""
    panel = _panel(heatmap.Panel(), title, text, [], unit, width)
    panel.with_target(_target("A", Query(expr, "{{le}}")).format(PromQueryFormat.HEATMAP).range())
    colors = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Blues").steps(64)
    panel.color(colors.scale(HeatmapColorScale.EXPONENTIAL).exponent(0.5))
    return panel.calculate(False).y_axis(heatmap.YAxisConfig().unit(unit)).show_legend()


def _panel(
    panel: Panel,
    title: str,
    text: str,
    queries: Sequence[Query],
    unit: str,
    width: int,
    *,
    height: int = 8,
    at_once: bool = False,
) -> Panel:
    panel.title(title).description(text).datasource(SOURCE).unit(unit).span(width).height(height)
    for letter, query in _lettered(queries):
        if at_once:  # "+ 0" drops the metric's name, so that rows of different metrics can be merged
            target = _target(letter, Query(f"({query.expr}) + 0", query.name)).format(PromQueryFormat.TABLE).instant()
        else:
            target = _target(letter, query).range()
        panel.with_target(target)
    return panel


def _named(panel: timeseries.Panel | trend.Panel) -> None:
    legend = options.VizLegendOptions().display_mode(common.LegendDisplayMode.LIST).placement(common.LegendPlacement.BOTTOM)
    panel.legend(legend.show_legend(True))
    panel.tooltip(options.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI))


def _lettered(queries: Sequence[Query]) -> list[tuple[str, Query]]:
    return list(zip(string.ascii_uppercase, queries, strict=False))


def _target(letter: str, query: Query) -> prometheus.Dataquery:
    return prometheus.Dataquery().ref_id(letter).datasource(SOURCE).expr(query.expr).legend_format(query.name)
