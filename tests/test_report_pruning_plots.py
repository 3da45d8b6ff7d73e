"""The plots of a pruning search hold what its data says."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from support.report_cases import large_search_data, search_data

from swincompress_pl.report.plots.drawing import inline_svg, to_rgb
from swincompress_pl.report.plots.pruning import (
    _short_names,
    accuracy_against_size,
    pruning_figures,
    sensitivity_curves,
    sparsity_by_round,
)
from swincompress_pl.report.search import read_search, sparsities_by_round, times_fewer_forwards, times_fewer_images


def texts(figure: Figure | None) -> list[str]:
    assert figure is not None
    return [text.get_text() for text in figure.findobj(Text) if text.get_visible()]  # type: ignore[attr-defined]


def lines(ax: Any, mark: str) -> list[Any]:
    return [line for line in ax.lines if line.get_marker() == mark]


def test_sparsity_follows_the_kept_steps() -> None:
    gone = sparsities_by_round(read_search(search_data()))
    np.testing.assert_array_equal(gone, [[0.25, 0.25], [0.25, 0.5]])


def test_the_last_round_is_what_the_targets_say() -> None:
    data = search_data()
    data["targets"]["blocks.0.heads"]["units"] = 4  # rolled back when the round was over
    np.testing.assert_array_equal(sparsities_by_round(read_search(data))[0], [0.25, 0.0])


def test_a_round_that_is_not_over_is_shown() -> None:
    assert sparsities_by_round(read_search(search_data() | {"rounds": 1})).shape == (2, 2)


def test_the_heat_map_has_a_row_a_target_and_a_column_a_round() -> None:
    figure = sparsity_by_round(search_data())
    assert figure is not None
    image = figure.axes[0].images[0]
    cells = np.ma.filled(image.get_array(), -1.0)  # a kind's title has no cells
    np.testing.assert_allclose(cells, [[-1, -1], [25, 25], [-1, -1], [25, 50]])
    shown = texts(figure)
    for expected in ("Attention heads", "block 1, heads", "MLP channels", "block 2, MLP", "50 %", "round"):
        assert expected in shown


def test_many_targets_are_all_named_in_columns() -> None:
    figure = sparsity_by_round(large_search_data(224, 3))
    assert figure is not None
    heat_maps = [ax for ax in figure.axes if ax.images]
    names = [label.get_text() for ax in heat_maps for label in ax.get_yticklabels()]
    assert len(heat_maps) == 2
    assert names == [f"stage {i // 48 + 1}, block {i // 4 % 12 + 1}, MLP fc{i % 4}" for i in range(224)]
    for ax in heat_maps:
        boxes = [label.get_window_extent() for label in ax.get_yticklabels()]
        assert all(upper.y0 >= lower.y1 - 1 for upper, lower in pairwise(boxes))


def test_accuracy_against_size_marks_every_step() -> None:
    figure = accuracy_against_size(search_data(), tolerance=2.0)
    assert figure is not None
    parameters, macs = figure.axes[:2]
    for ax, sizes in ((parameters, (1.0, 0.9, 0.8, 0.7)), (macs, (8.0, 7.5, 7.0, 6.5))):
        (line,) = [line for line in ax.lines if line.get_linestyle() == "-" and len(line.get_xdata()) > 2]
        np.testing.assert_allclose(line.get_xdata(), sizes)
        np.testing.assert_allclose(line.get_ydata(), (75.0, 74.5, 74.0, 73.5))
        kept, undone = lines(ax, "o")
        assert len(kept.get_xdata()) == 3
        assert undone.get_markerfacecolor() == "none"
        np.testing.assert_allclose(undone.get_ydata(), [70.0])
        (below,) = lines(ax, "v")
        assert below.get_ydata()[0] == ax.get_ylim()[0] > 12.0  # one bad step does not flatten the others
        (limit,) = [line for line in ax.lines if line.get_linestyle() == "--"]
        assert set(limit.get_ydata()) == {73.0}
        assert ax.get_xlim()[0] > ax.get_xlim()[1]
    shown = texts(figure)
    for expected in ("kept (3)", "undone (1)", "undone, below the axis (1)", "tolerance, 2 points"):
        assert expected in shown


def test_the_tolerance_may_come_with_the_data_or_be_unknown() -> None:
    assert "tolerance, 1.5 points" in texts(accuracy_against_size(search_data() | {"tolerance": 1.5}))
    assert not any("tolerance" in text for text in texts(accuracy_against_size(search_data())))


@pytest.mark.parametrize("macs", [None, 8000])
def test_macs_have_a_panel_only_where_they_change(macs: int | None) -> None:
    data = search_data() | {"baseline_macs": macs}
    for step in data["steps"]:
        step["macs"] = macs
    figure = accuracy_against_size(data)
    assert figure is not None
    assert len(figure.axes) == 1


def test_sensitivity_has_a_line_a_target_and_a_panel_a_kind() -> None:
    figure = sensitivity_curves(search_data())
    assert figure is not None
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["Attention heads (1)", "MLP channels (1)"]
    curve = figure.axes[1].lines[1]
    np.testing.assert_allclose(curve.get_xdata(), [0, 50, 75])  # sorted, in percent
    np.testing.assert_allclose(curve.get_ydata(), [75, 74, 70])


def test_of_many_curves_the_most_sensitive_are_named() -> None:
    figure = sensitivity_curves(large_search_data(40, 1))
    assert figure is not None
    (ax,) = figure.axes
    assert len(ax.lines) == 41  # and the line of the baseline
    legend = ax.get_legend()
    assert legend is not None
    named = [text.get_text() for text in legend.get_texts()]
    assert named == ["before pruning", *(f"stage 1, block 10, MLP fc{i}" for i in (3, 2, 1))]


def test_nothing_is_drawn_without_data() -> None:
    data = search_data() | {"rounds": 0, "steps": [], "sensitivity": {}}
    assert sparsity_by_round(data) is None
    assert accuracy_against_size(data) is None
    assert sensitivity_curves(data) is None
    assert pruning_figures(data) == {}


@pytest.mark.parametrize("data", [search_data(), large_search_data(4, 1), large_search_data(70, 4)])
def test_nothing_is_cut_by_the_edge(data: dict[str, Any]) -> None:
    figures = pruning_figures(data, tolerance=2.0)
    assert list(figures) == ["sparsity", "accuracy_size", "sensitivity"]
    for name, figure in figures.items():
        drawn = figure.get_tightbbox()  # in inches, of all that is drawn
        width, height = figure.get_size_inches()
        assert min(drawn.x0, drawn.y0) >= -0.01, name
        assert drawn.x1 <= width + 0.01, name
        assert drawn.y1 <= height + 0.01, name


def test_no_pyplot_figure_is_left_behind() -> None:
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    pruning_figures(search_data())
    assert pyplot.get_fignums() == before


def test_a_figure_becomes_pixels_and_an_element_without_links() -> None:
    figure = sensitivity_curves(search_data())
    assert figure is not None
    pixels = to_rgb(figure)
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3
    assert pixels.std() > 0
    svg = inline_svg(figure, name="curves", label="<Sensitivity>")
    assert svg.startswith("<svg ")
    assert "http" not in svg
    assert 'aria-label="&lt;Sensitivity&gt;"' in svg
    assert 'id="curves-' in svg
    assert "var(--ink)" in svg
    assert "block 2, MLP" in svg
    assert svg == inline_svg(figure, name="curves", label="<Sensitivity>")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, "version 2 is expected, not 1"),
        ({"version": None}, "version 2 is expected, not None"),
        ({"steps": [{"round": 1}]}, r"search.steps\[0\]: target, kind, .* missing"),
        ({"targets": {}}, "step 1 is of 'blocks.0.heads', which is not a target"),
        ({"scoring": {"images_scored": 9, "image_forwards": 1.0}}, "scoring has no decisions, naive_images"),
        ({"sensitivity": {"other": [[0.0, 1.0]]}}, "sensitivity of 'other'"),
        ({"targets": {"a": {"kind": "mlp", "initial_units": 0, "units": 0, "step": 0.1}}}, "target a: 0 of 0 units"),
    ],
)
def test_bad_data_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_search(search_data() | change)


def test_a_score_that_is_no_number_is_named() -> None:
    data = search_data()
    data["steps"][2]["score"] = float("nan")
    with pytest.raises(ValueError, match=r"search.steps\[2\].score=nan: it has to be a finite number"):
        read_search(data)


def test_what_is_no_data_is_named() -> None:
    with pytest.raises(ValueError, match="not 'list'"):
        read_search([])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["a"], ["a"]),
        (["blocks.0.fc1.weight", "blocks.1.fc1.weight"], ["block 1", "block 2"]),
        (["a.weight", "b.c.weight"], ["a", "b c"]),
        (["weight", "b.weight"], ["weight", "b weight"]),
        (["a_long_name.of_a_network.net.0.mlp", "a_long_name.of_a_network.net.1.attn"], ["0.mlp", "1.attn"]),
    ],
)
def test_names_lose_what_they_share(names: list[str], short: list[str]) -> None:
    assert _short_names(names) == short


def test_costs_against_the_naive_loop() -> None:
    scoring = read_search(search_data()).scoring
    assert times_fewer_images(scoring) == 5.0
    assert times_fewer_forwards(scoring) == 20.0
    assert times_fewer_images({}) is times_fewer_forwards({}) is None
