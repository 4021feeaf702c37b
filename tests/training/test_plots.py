"""That plots can be read."""

import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from training import plots

SETTINGS = ", ".join(f"retrain_{name}=0.1" for name in ("lr", "epochs", "batch_size", "warmup_epochs", "weight_decay"))
NAMES = [f"{name}-cifar100, data=path/to/a/folder/of/images, {SETTINGS}" for name in ("ce", "crt", "ride", "sade")]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures = []

    class Kept(plots.Figure):
        def savefig(self, *arguments, **options):
            super().savefig(*arguments, **options)
            FigureCanvasAgg(self).draw()
            figures.append(self)

    monkeypatch.setattr(plots, "Figure", Kept)
    return figures


def boxes(figure, texts):
    """Where texts are in a figure: (left, bottom, right, top), in pixels."""
    return [text.get_window_extent(figure.canvas.get_renderer()).extents for text in texts]


def test_long_names_of_methods_do_not_overlap(drawn, tmp_path):
    """A sweep with several --set has them."""
    splits = {"all": (50.0, 1.0), "few": (30.0, None)}
    plots.plot_accuracy(dict.fromkeys(NAMES, splits), {}, tmp_path / "plot.png")
    found = sorted(boxes(drawn[0], drawn[0].axes[0].get_yticklabels()), key=lambda box: box[1])

    assert len(found) == len(NAMES)
    assert all(upper[1] >= lower[3] for lower, upper in itertools.pairwise(found))


@pytest.mark.parametrize("plot", ["cost", "experts"])
def test_long_names_leave_room_for_the_axes(plot, drawn, tmp_path):
    """The legend pushes no label of an axis out of the picture."""
    points = [(10.0, 1.5), (100.0, 2.5)]
    if plot == "cost":
        plots.plot_cost(dict.fromkeys(NAMES, points), {}, {}, tmp_path / "plot.png")
    else:
        plots.plot_experts(dict.fromkeys(NAMES, points), tmp_path / "plot.png")
    figure = drawn[0]
    axes = figure.axes[0]
    width, height = figure.canvas.get_width_height()
    for left, bottom, right, top in boxes(figure, [axes.xaxis.label, axes.yaxis.label, *figure.legends]):
        assert min(left, bottom) >= 0
        assert right <= width
        assert top <= height


def test_every_split_is_in_the_legend(drawn, tmp_path):
    """In their order, also where the first method has no class in one."""
    few, many = {"all": (40.0, None), "few": (30.0, None)}, {"all": (50.0, None), "many": (60.0, None)}
    plots.plot_accuracy({"a": few, "b": many}, {}, tmp_path / "plot.png")

    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["all", "many", "few"]


def test_lines_of_a_legend_can_be_told_apart(drawn, tmp_path):
    """Those of many methods, too."""
    plots.plot_experts({f"method {index}": [(10.0, 1.5), (100.0, 2.5)] for index in range(20)}, tmp_path / "plot.png")

    lines = drawn[0].legends[0].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(lines) == 20


def test_a_class_without_images_blanks_no_neighbour():
    """Means are over those that have a value; only where none has is there none."""
    nan = np.nan
    assert plots.smoothed(np.array([1.0, 2, 3, 4]), 3).tolist() == [1.5, 2, 3, 3.5]
    np.testing.assert_array_equal(plots.smoothed(np.array([1.0, nan, 3, nan, nan, nan]), 3), [1, 2, 3, 3, nan, nan])
