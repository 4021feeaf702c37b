"""
Makes the Grafana dashboard, docker/grafana/dashboards/ride.json, with Grafana's Foundation SDK.

    python docker/grafana/dashboard.py            # writes it again, after a change here

The committed JSON is what Grafana loads; a test holds it equal to what this file makes. Every query is one of
service/metrics.py's metrics, and docker/grafana/check_queries.py asks a running Prometheus for each of them.
"""

from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import common, heatmap, stat, timeseries
from grafana_foundation_sdk.builders.dashboard import CustomVariable, Dashboard, FieldColor, Row, ThresholdsConfig
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardRangeMapOptions,
    DataSourceRef,
    DynamicConfigValue,
    FieldColorModeId,
    RangeMap,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
    VariableOption,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

JSON_FILE = Path(__file__).parent / "dashboards" / "ride.json"
PROMETHEUS = DataSourceRef(type_val="prometheus", uid="prometheus")
MOST_EXPERTS = 9  # bundles with more are not drawn by "experts per image"; recipes make 1 to 6

# A colour means the same on every panel: from one expert, cheap and green, to three, red, and beyond.
EXPERT_COLOURS = {"1 used": "green", "2 used": "yellow", "3 used": "red", "4 used": "dark-red", "5 used": "purple"}
SPLIT_COLOURS = {"many": "blue", "medium": "purple", "few": "orange"}

IMAGES_PER_SECOND = "suffix: images/s"
LATELY = "5m"  # what "now" means where one number stands
RATE = "$__rate_interval"
LEVELS = {"0.5": "p50", "0.95": "p95", "0.99": "p99"}
REF_IDS = "ABCDEF"  # of a panel's queries


def rate(metric: str, by: str = "", window: str = RATE) -> str:
    """Per second, summed over instances and over every label but `by`."""
    grouping = f" by ({by})" if by else ""
    return f"sum{grouping} (rate({metric}[{window}]))"


def share(metric: str, by: str, window: str = RATE) -> str:
    """The part of the whole that each value of label `by` has, in 0..1; empty without traffic, not 0/0."""
    return f"{rate(metric, by, window)} / on () group_left () ({rate(metric, '', window)} > 0)"


def mean(histogram: str, by: str = "", window: str = RATE) -> str:
    """A histogram's mean per observation; empty while nothing is observed."""
    return f"{rate(histogram + '_sum', by, window)} / ({rate(histogram + '_count', by, window)} > 0)"


def quantile(level: str, histogram: str, by: str = "le") -> str:
    """A quantile of a histogram, interpolated within its buckets."""
    return f"histogram_quantile({level}, {rate(histogram + '_bucket', by)})"


def experts_per_image(window: str = RATE) -> str:
    """The mean of the label `experts` over images; PromQL cannot read a label as a number, so each value has a term."""
    terms = (f'{n} * rate(ride_images_total{{experts="{n}"}}[{window}])' for n in range(1, MOST_EXPERTS + 1))
    return f"sum ({' or '.join(terms)}) / ({rate('ride_images_total', '', window)} > 0)"


def compute_saved(window: str = RATE) -> str:
    """The part of the multiply-accumulates of "always all experts" that was not spent, in 0..1."""
    saved, spent = rate("ride_macs_saved_total", "", window), rate("ride_macs_total", "", window)
    return f"{saved} / ({saved} + {spent} > 0)"


def query(expr: str, legend: str = "") -> Dataquery:
    """A query over the dashboard's time range."""
    return Dataquery().expr(expr).legend_format(legend).datasource(PROMETHEUS).range()


def latest(expr: str, legend: str = "") -> Dataquery:
    """A query for now alone: over a range, a number would stay for as long as its last value is on the page."""
    return Dataquery().expr(expr).legend_format(legend).datasource(PROMETHEUS).instant()


def switching(panel: stat.Panel, below_one: str, from_one: str) -> stat.Panel:
    """Gives a number one colour below 1 and another from 1 on."""
    steps = [Threshold(value=None, color=below_one), Threshold(value=1, color=from_one)]
    return panel.color_scheme(FieldColor().mode(FieldColorModeId.THRESHOLDS)).thresholds(
        ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)
    )


def coloured(panel: Any, colours: dict[str, str]) -> None:
    """Gives each series, known by its legend, the colour that it has on every panel."""
    for legend, colour in colours.items():
        panel.override_by_name(
            legend, [DynamicConfigValue(id_val="color", value={"mode": "fixed", "fixedColor": colour})]
        )


class Page:
    """The dashboard while it is being filled; gives every panel its number and its data source."""

    def __init__(self, dashboard: Dashboard) -> None:
        self.dashboard = dashboard
        self._panels = 0

    def row(self, title: str) -> None:
        """Begin a row; the panels added from now on are in it."""
        self._panels += 1
        self.dashboard.with_row(Row(title).id(self._panels))

    def add(self, panel: Any, title: str, says: str, width: int, height: int, *queries: Dataquery) -> Any:
        """Add a panel with its queries, at most six; `says` is its help text. Returns the panel."""
        assert len(queries) <= len(REF_IDS)
        self._panels += 1
        panel.id(self._panels).title(title).description(says).datasource(PROMETHEUS).span(width).height(height)
        for ref_id, target in zip(REF_IDS, queries, strict=False):
            panel.with_target(target.ref_id(ref_id))
        self.dashboard.with_panel(panel)
        return panel


def number(unit: str, decimals: int, colour: str = "text") -> stat.Panel:
    """One large number per series: the newest value."""
    return (
        stat.Panel()
        .unit(unit)
        .decimals(decimals)
        .no_value("no traffic")
        .color_scheme(FieldColor().mode(FieldColorModeId.FIXED).fixed_color(colour))
        .color_mode(options.BigValueColorMode.VALUE)
        .graph_mode(options.BigValueGraphMode.NONE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )


def lines(unit: str) -> timeseries.Panel:
    """Lines from zero upwards, one for each series; hovering lists all of them."""
    return (
        timeseries.Panel()
        .unit(unit)
        .min(0)
        .line_width(2)
        .show_points(options.VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .show_legend(True)
            .display_mode(options.LegendDisplayMode.LIST)
            .placement(options.LegendPlacement.BOTTOM)
        )
        .tooltip(common.VizTooltipOptions().mode(options.TooltipDisplayMode.MULTI).sort(options.SortOrder.DESCENDING))
    )


def stacked(unit: str, mode: options.StackingMode = options.StackingMode.NORMAL) -> timeseries.Panel:
    """Areas on top of each other: their sum, or with PERCENT their shares."""
    panel = lines(unit).fill_opacity(70).line_width(1).stacking(common.StackingConfig().mode(mode).group("A"))
    return panel.max(1) if mode == options.StackingMode.PERCENT else panel


def experts_row(page: Page) -> None:
    """The question that the dashboard is for, and what the answer is worth."""
    page.row("Which share of the traffic needed one, two or three experts?")
    by_experts = "{{experts}} used"

    panel = page.add(
        number("percentunit", 1).text_mode(options.BigValueTextMode.VALUE_AND_NAME),
        "Images by number of experts used",
        "Of the images answered in the last 5 minutes, the share that one, two, three ... experts answered.",
        10, 5,
        latest(share("ride_images_total", "experts", LATELY), by_experts),
    )  # fmt: skip
    coloured(panel, EXPERT_COLOURS)
    page.add(
        number("none", 2).text_mode(options.BigValueTextMode.VALUE_AND_NAME),
        "Experts per image",
        "The mean of the last 5 minutes, and what the calibration table expects at the thresholds in force. An alert "
        "(RideExpertUsageDrift) watches the distance between the two.",
        5, 5,
        latest(experts_per_image(LATELY), "now"),
        latest("avg (ride_calibrated_mean_experts)", "calibrated"),
    )  # fmt: skip
    page.add(
        number("percentunit", 0, "green"),
        "Compute saved",
        "Multiply-accumulates that early exit saved in the last 5 minutes, against running all experts on every image.",
        3, 5,
        latest(compute_saved(LATELY)),
    )  # fmt: skip
    page.add(
        number(IMAGES_PER_SECOND, 1),
        "Images per second",
        "Images answered, mean of the last minute.",
        3, 5,
        latest(rate("ride_images_total", "", "1m")),
    )  # fmt: skip
    page.add(
        switching(number("none", 0), "green", "red"),
        "Alerts firing",
        "Rules of docker/alerts.yml that are firing; Prometheus lists them under /alerts.",
        3, 5,
        latest('count (ALERTS{alertstate="firing"}) or vector(0)'),
    )  # fmt: skip
    panel = page.add(
        stacked("percentunit", options.StackingMode.PERCENT),
        "Share of images by experts used",
        "A growing red part: more images need all experts. Rarer classes, a changed camera, or lower thresholds.",
        12, 9,
        query(share("ride_images_total", "experts"), by_experts),
    )  # fmt: skip
    coloured(panel, EXPERT_COLOURS)
    panel = page.add(
        stacked(IMAGES_PER_SECOND),
        "Images per second by experts used",
        "The same images, counted: height is throughput.",
        12, 9,
        query(rate("ride_images_total", "experts"), by_experts),
    )  # fmt: skip
    coloured(panel, EXPERT_COLOURS)


def routing_row(page: Page) -> None:
    """Why images stopped where they did."""
    page.row("Routers and predictions")
    panel = page.add(
        lines("none").decimals(2),
        "Experts per image against calibration",
        "The dashed line is the calibration table's figure at the thresholds in force. Requests that bring their own "
        "threshold or max_experts move the solid one.",
        12, 8,
        query(experts_per_image(), "measured"),
        query("avg (ride_calibrated_mean_experts)", "calibrated"),
    )  # fmt: skip
    panel.override_by_name(
        "calibrated", [DynamicConfigValue(id_val="custom.lineStyle", value={"fill": "dash", "dash": [8, 8]})]
    )
    page.add(
        stacked(IMAGES_PER_SECOND),
        "Why images stopped, per second",
        "confident: a router was sure. last: all experts ran. budget: max_experts, of the request or of the operator.",
        12, 8,
        query(rate("ride_exits_total", "reason"), "{{reason}}"),
    )  # fmt: skip
    page.add(
        heatmap.Panel()
        .calculate(False)
        .y_axis(heatmap.YAxisConfig().unit("none").min(0).max(1))
        .color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges").steps(64).exponent(0.5).min(0))
        .cell_gap(1)
        .show_legend()
        .mode(options.TooltipDisplayMode.SINGLE)
        .show_y_histogram(),
        "Router scores",
        "How many images got which score, all routers together. From the threshold upwards the next expert runs; a "
        "bright band right at the threshold means that small changes of it move much traffic.",
        8, 8,
        query(f"sum by (le) (increase(ride_router_score_bucket[{RATE}]))", "{{le}}").format(PromQueryFormat.HEATMAP),
    )  # fmt: skip
    page.add(
        lines("none").decimals(2).max(1),
        "Mean score by router",
        "Router 0 decides after the first expert, router 1 after the second; under another rule, that rule.",
        8, 8,
        query(mean("ride_router_score", "router"), "router {{router}}"),
    )  # fmt: skip
    panel = page.add(
        stacked("percentunit", options.StackingMode.PERCENT),
        "Predictions by split",
        "Whether the most probable class had many, a medium number of, or few training images.",
        8, 8,
        query(share("ride_predictions_total", "split"), "{{split}}"),
    )  # fmt: skip
    coloured(panel, SPLIT_COLOURS)


def latency_row(page: Page) -> None:
    """How long a request takes, and where."""
    page.row("Latency")
    page.add(
        lines("s"),
        "Request",
        "From when a request is looked at to its answer, however many images it brought.",
        12, 8,
        *[query(quantile(level, "ride_request_seconds"), name) for level, name in LEVELS.items()],
    )  # fmt: skip
    page.add(
        lines("s"),
        "Stages, quantile $quantile",
        "decode: one image. trunk, expert_0 ...: one batch, the router included. queue: one image's wait.",
        12, 8,
        query(quantile("$quantile", "ride_stage_seconds", "stage, le"), "{{stage}}"),
        query(quantile("$quantile", "ride_queue_seconds"), "queue"),
    )  # fmt: skip


def traffic_row(page: Page) -> None:
    """What comes in, and what goes wrong."""
    page.row("Throughput and errors")
    page.add(
        lines("suffix:/s"),
        "Requests and images per second",
        "Requests answered with any status, and images answered with a prediction.",
        8, 8,
        query(rate("ride_requests_total"), "requests"),
        query(rate("ride_images_total"), "images"),
    )  # fmt: skip
    page.add(
        stacked("reqps"),
        "Requests per second by status",
        "429: refused, overloaded. 5xx: ours.",
        8, 8,
        query(rate("ride_requests_total", "code"), "{{code}}"),
    )  # fmt: skip
    page.add(
        stacked("suffix:/s"),
        "Refusals and errors per second by reason",
        "Images or requests that got an error instead of a prediction, by its code.",
        8, 8,
        query(rate("ride_refused_total", "reason"), "{{reason}}"),
    )  # fmt: skip


def queue_row(page: Page) -> None:
    """Whether there is room."""
    page.row("Queue and batches")
    panel = page.add(
        lines("suffix: images").fill_opacity(20),
        "Images waiting",
        "At the limit (RIDE_MAX_QUEUE) further images are refused with 429; each worker refuses at its own equal part.",
        8, 8,
        query("sum (ride_queue_images)", "waiting"),
        query("sum (ride_queue_limit_images)", "limit"),
    )  # fmt: skip
    panel.override_by_name(
        "limit",
        [
            DynamicConfigValue(id_val="color", value={"mode": "fixed", "fixedColor": "red"}),
            DynamicConfigValue(id_val="custom.fillOpacity", value=0),
            DynamicConfigValue(id_val="custom.lineStyle", value={"fill": "dash", "dash": [8, 8]}),
        ],
    )
    page.add(
        lines("s"),
        "Wait in the queue",
        "From an image's arrival in the queue until its batch closes.",
        8, 8,
        *[query(quantile(level, "ride_queue_seconds"), name) for level, name in LEVELS.items()],
    )  # fmt: skip
    page.add(
        lines("suffix: images").decimals(1),
        "Images per batch",
        "Mean rows of one run. Later experts see fewer: finished images have left.",
        8, 8,
        query(mean("ride_batch_images", "stage"), "{{stage}}"),
    )  # fmt: skip


def service_row(page: Page) -> None:
    """What is running."""
    page.row("Service")
    none = ValueMap(options={"0": ValueMappingResult(text="not ready", color="red", index=0)})
    some = RangeMap(DashboardRangeMapOptions(1, None, ValueMappingResult(text="ready", color="green", index=1)))
    page.add(
        switching(number("none", 0), "red", "green").mappings([none, some]).no_value("down"),
        "State",
        "Ready once every graph has been run; not while it drains.",
        4, 4,
        latest("min (ride_ready)"),
    )  # fmt: skip
    page.add(
        number("none", 0).text_mode(options.BigValueTextMode.NAME).no_value("down"),
        "Model",
        "Name, version, variant and execution provider of the bundle that is being served.",
        10, 4,
        latest("ride_model_info", "{{name}} {{version}}, {{variant}} on {{provider}}"),
    )  # fmt: skip
    page.add(
        number("none", 0).text_mode(options.BigValueTextMode.NAME).no_value("down"),
        "Software",
        "Versions of ride-serving, Python and onnxruntime.",
        10, 4,
        latest("ride_build_info", "ride-serving {{version}}, Python {{python}}, onnxruntime {{onnxruntime}}"),
    )  # fmt: skip
    page.add(
        lines("none").decimals(0),
        "Workers",
        "Processes that answer requests: how many are alive, and how many of them take work. They differ while one "
        "starts, or all of them drain.",
        12, 8,
        query("sum (ride_workers)", "alive"),
        query("sum (ride_ready)", "ready"),
    )  # fmt: skip
    page.add(
        lines("none").decimals(0).fill_opacity(20),
        "Workers restarted, in 15 minutes",
        "Each of them died with the requests that it was working on; its log line worker_died says of what. An alert "
        "(RideWorkersDie) watches this.",
        12, 8,
        query("sum (increase(ride_worker_restarts_total[15m]))", "restarts"),
    )  # fmt: skip


def dashboard_json() -> str:
    """The whole dashboard as Grafana reads it; the same bytes every time."""
    dashboard = (
        Dashboard("RIDE: expert usage")
        .uid("ride")
        .description("How many experts the traffic needs, what early exit saves, and whether the service keeps up.")
        .tags(["ride"])
        .time("now-30m", "now")
        .refresh("10s")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .readonly()
        .with_variable(
            CustomVariable("quantile")
            .label("Quantile of stages")
            .values(",".join(LEVELS))
            .options([VariableOption(text=level, value=level, selected=level == "0.95") for level in LEVELS])
            .current(VariableOption(text="0.95", value="0.95", selected=True))
        )
    )
    page = Page(dashboard)
    for fill in (experts_row, routing_row, latency_row, traffic_row, queue_row, service_row):
        fill(page)
    return JSONEncoder(indent=2, sort_keys=True).encode(dashboard.build()) + "\n"


if __name__ == "__main__":
    JSON_FILE.write_text(dashboard_json(), encoding="utf-8")
    print(JSON_FILE)
