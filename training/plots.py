"""Plots as PNG, in colours that colour-blind readers can tell apart (Okabe and Ito), with markers besides."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
)  # fmt: skip
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
LINE_STYLES = ("-", "--", ":")  # of lines without markers
MARKERS = "osD^vPX<>hpd"  # not the star, which says "routed"
SPLIT_STYLE = {"all": (BLACK, "o"), "many": (BLUE, "s"), "medium": (GREEN, "^"), "few": (VERMILION, "D")}
DPI = 120
LABEL_WIDTH = 34
LINE = 0.17  # inches
LEAST_LABELLED = 5  # percent; a narrower piece has no room for its number

Points = Sequence[tuple[float, float]]


def style(index: int) -> tuple[str, str]:
    """Colour and marker of the index-th method; 84 pass before a pair comes again."""
    return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]


def plot_accuracy(
    measured: Mapping[str, Mapping[str, tuple[float, float | None]]],
    published: Mapping[str, Mapping[str, float]],
    file: Path,
) -> None:
    """
    A line for each method, a point for each split.

    Args:
        measured: method to split to (mean, sample standard deviation over seeds), percent.
        published: method to split to percent; hollow markers.
    """
    names = [_wrapped(name) for name in measured]
    row_height = max(0.55, *(LINE * (name.count("\n") + 2) for name in names))
    figure = Figure(figsize=(8.5, 1.6 + row_height * len(measured)), layout="constrained")
    axes = figure.subplots()
    offsets = dict(zip(SPLIT_STYLE, (-0.27, -0.09, 0.09, 0.27), strict=True))
    shown = {}
    for row, (name, splits) in enumerate(measured.items()):
        for split, (mean, deviation) in splits.items():
            colour, marker = SPLIT_STYLE[split]
            shown[split] = axes.errorbar(mean, row + offsets[split], xerr=deviation, color=colour, marker=marker,
                                         markersize=6, capsize=3, linestyle="none")  # fmt: skip
        for split, value in published.get(name, {}).items():
            colour, marker = SPLIT_STYLE[split]
            axes.plot(value, row + offsets[split], color=colour, marker=marker, markersize=9, fillstyle="none",
                      linestyle="none", zorder=1)  # fmt: skip
    axes.set_yticks(range(len(measured)), names)
    axes.set_ylim(len(measured) - 0.5, -0.5)
    for row in range(len(measured) - 1):
        axes.axhline(row + 0.5, color="0.9", linewidth=0.8)
    axes.set_xlabel("accuracy on test images, % (mean of per-class accuracies)")
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    labels = [split for split in SPLIT_STYLE if split in shown]
    handles: list[Any] = [shown[split] for split in labels]
    if published:
        handles.append(axes.plot([], [], "o", color="0.4", fillstyle="none", markersize=9)[0])
        labels.append("published")
    figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False)
    figure.savefig(file, dpi=DPI)


def plot_cost(
    prefixes: Mapping[str, Points],
    routed: Mapping[str, tuple[float, float]],
    published: Mapping[str, tuple[float, float]],
    file: Path,
) -> None:
    """
    Accuracy over all classes against cost.

    Args:
        prefixes: method to (M multiply-accumulates, percent) with its first 1, 2, ... experts.
        routed: method to the same with routers: filled stars.
        published: method to the same as its paper has it: hollow markers.
    """
    height = 5 + 0.25 * (len(prefixes) // 2) + LINE * _more_lines(prefixes)
    figure = Figure(figsize=(8.5, height), layout="constrained")
    axes = figure.subplots()
    for index, (name, points) in enumerate(prefixes.items()):
        colour, marker = style(index)
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=_wrapped(name))
        if name in routed:
            axes.plot(*routed[name], color=colour, marker="*", markersize=15, markeredgecolor="white", linestyle="none")
        if name in published:
            axes.plot(*published[name], color=colour, marker=marker, markersize=11, fillstyle="none", linestyle="none")
    axes.set_xlabel("multiply-accumulates an image, millions")
    axes.set_ylabel("accuracy on test images, all classes, %")
    axes.grid(color="0.9")
    axes.margins(0.08)
    handles, labels = axes.get_legend_handles_labels()
    for shown, marker, label in ((routed, "*", "routed"), (published, "o", "published")):
        if shown:
            filling: Any = "full" if marker == "*" else "none"
            handles.append(axes.plot([], [], marker, color="0.4", markersize=11, fillstyle=filling)[0])
            labels.append(label)
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(file, dpi=DPI)


def plot_experts(used: Mapping[str, Points], file: Path) -> None:
    """
    Experts used against class frequency: a point for each class, a line of means over neighbouring classes.

    Args:
        used: method to (training images of the class, mean experts that its test images use).
    """
    figure = Figure(figsize=(8.5, 5 + LINE * _more_lines(used)), layout="constrained")
    axes = figure.subplots()
    for index, (name, points) in enumerate(used.items()):
        colour, marker = style(index)
        ordered = np.array(sorted(points, key=lambda point: point[0]))  # by frequency alone, or means would lean
        axes.plot(*ordered.T, color=colour, marker=marker, markersize=4, alpha=0.35, linestyle="none")
        smooth = smoothed(ordered[:, 1], _window(len(ordered)))
        counts, first = np.unique(ordered[:, 0], return_index=True)
        means = np.add.reduceat(smooth, first) / np.diff([*first, len(smooth)])  # one for classes of the same size
        dashes = LINE_STYLES[index // len(COLOURS) % len(LINE_STYLES)]
        axes.plot(counts, means, color=colour, linestyle=dashes, linewidth=2, label=_wrapped(name))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(LogFormatter(minor_thresholds=(3, 1)))
    axes.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(3, 1)))
    axes.set_xlabel("training images of the class")
    axes.set_ylabel("mean experts its test images use")
    axes.grid(color="0.9")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(file, dpi=DPI)


def plot_shares(shares: Mapping[str, Sequence[float]], file: Path) -> None:
    """
    A bar for each split, cut by the number of experts.

    Args:
        shares: split to the shares of its images that use 1, 2, ... experts.
    """
    figure = Figure(figsize=(7.5, 1.4 + 0.55 * len(shares)), layout="constrained")
    axes = figure.subplots()
    n_experts = len(next(iter(shares.values())))
    left = np.zeros(len(shares))
    for index in range(n_experts):
        widths = np.array([100 * values[index] for values in shares.values()])
        grey = 0.85 - 0.75 * index / max(n_experts - 1, 1)  # light to dark, told apart without colour
        colour = tuple(np.array([1.0, 1.0, 1.0]) * grey * (0.55, 0.85, 1.0))
        bars = axes.barh(range(len(shares)), widths, left=left, color=colour, edgecolor="white",
                         label=f"{index + 1} expert{'s' * (index > 0)}")  # fmt: skip
        shown = [f"{width:.0f}" if width >= LEAST_LABELLED else "" for width in widths]
        axes.bar_label(bars, shown, label_type="center", color="black" if grey > 0.5 else "white")
        left += widths
    axes.set_yticks(range(len(shares)), list(shares))
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of test images, %")
    figure.legend(loc="outside upper center", ncols=n_experts, frameon=False)
    figure.savefig(file, dpi=DPI)


def plot_curve(panels: Mapping[str, tuple[Mapping[str, Points], Mapping[str, Points]]], file: Path) -> None:
    """
    Accuracy against cost, a panel for each split.

    Args:
        panels: split to lines and marks; both are name to (M multiply-accumulates, percent).
    """
    columns = 2
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(10, 1 + 3.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (split, (lines, marks)) in zip(grid, panels.items(), strict=False):
        for index, (name, points) in enumerate(lines.items()):
            axes.plot(*zip(*points, strict=True), color=COLOURS[index], linestyle=("-", "--")[index % 2], linewidth=2,
                      marker=".", label=name)  # fmt: skip
        for index, (name, points) in enumerate(marks.items(), start=len(lines)):
            axes.plot(*zip(*points, strict=True), color=COLOURS[index], marker=("s", "*", "D")[index - len(lines)],
                      markersize=(7, 14, 8)[index - len(lines)], linestyle="none", label=name)  # fmt: skip
        axes.set_title(split, fontsize=10)
        axes.set_xlabel("mean multiply-accumulates an image, millions")
        axes.set_ylabel("accuracy on test images, %")
        axes.grid(color="0.9")
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(file, dpi=DPI)


def plot_bias_variance(
    methods: Sequence[str],
    titles: Mapping[str, str],
    per_class: Mapping[tuple[str, str, str], np.ndarray],
    splits: Sequence[str],
    file: Path,
) -> None:
    """
    Bias and variance over the classes, smoothed; a row for each decomposition.

    Args:
        titles: decomposition to what to call it.
        per_class: (method, decomposition, "bias" or "variance") to (C,).
        splits: (C,), of each class.
    """
    figure = Figure(figsize=(10, 3.6 * len(titles)), layout="constrained")
    window = _window(len(splits))
    bounds = [label - 0.5 for label in range(1, len(splits)) if splits[label] != splits[label - 1]]
    for row, (kind, title) in zip(figure.subplots(len(titles), 2, squeeze=False), titles.items(), strict=True):
        for axes, part in zip(row, ("bias", "variance"), strict=True):
            for index, method in enumerate(methods):
                colour, marker = style(index)
                values = smoothed(per_class[method, kind, part], window)
                axes.plot(values, color=colour, marker=marker, markevery=max(len(splits) // 8, 1), label=method)
            for bound in bounds:
                axes.axvline(bound, color="0.6", linewidth=1, linestyle=":")
            axes.set_title(f"{part}, {title}", fontsize=10)
            axes.set_xlabel("class, most frequent first (dotted: splits)")
            axes.set_ylabel(f"{part}, mean of {window} classes" if window > 1 else part)
            axes.grid(color="0.9")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(file, dpi=DPI)


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """(N,): means over `window` neighbours, an odd number; fewer at both ends and beside NaN, which has no value."""
    kernel, known = np.ones(window), np.isfinite(values)
    with np.errstate(invalid="ignore"):  # where no neighbour has one
        return np.convolve(np.where(known, values, 0), kernel, "same") / np.convolve(known, kernel, "same")


def _window(count: int) -> int:
    """About a tenth of `count`, odd."""
    return max(count // 10, 1) | 1


def _more_lines(names: Iterable[str]) -> int:
    """By how many lines wrapped names make a legend of two columns longer."""
    more = [_wrapped(name).count("\n") for name in names]
    half = (len(more) + 1) // 2
    return max(sum(more[:half]), sum(more[half:]))


def _wrapped(name: str) -> str:
    return textwrap.fill(name, LABEL_WIDTH)
