"""Figures: real files, and the data that is drawn is the data that was given."""

import math
import os
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from scipy.stats import binom, norm

from src.certification.intervals import accuracy_interval
from src.records.rows import write_rows
from src.reports import plotting
from src.reports.plotting import (
    plot_accuracy_against_epsilon,
    plot_certified_accuracy,
    plot_gallery,
    plot_held_out_robustness,
    plot_p_lower,
    plot_training,
)

HISTORY = {
    "step_loss": [2.0, 1.0, 0.5, 0.25, 0.2, 0.1],
    "step_accuracy": [0.1, 0.5, 0.9, 0.9, 1.0, 1.0],
    "epochs": [
        {"epoch": 1, "clean": 0.80, "single_step": 0.50, "pgd": 0.45},
        {"epoch": 2, "clean": 0.90, "single_step": 0.95, "pgd": 0.00},
        {"epoch": 3, "clean": 0.95, "single_step": 0.70, "pgd": 0.60},
    ],
    "best_epoch": 3,
}
# Ties at 0.25 and 0.5, an abstention and a wrong prediction with the largest radius but one.
RADII = [0.25, 0.25, 0.5, 0.5, 0.5, 1.0, 0.0, 0.9]
CORRECT = [1, 1, 1, 0, 1, 1, 0, 0]
ROWS = [
    {"radius": r, "correct": c, "p_lower": 0.4 + r / 2} for r, c in zip(RADII, CORRECT, strict=True)
]


def proportions(hits, images=20):
    """Rows of both norms; accuracies in linf given, in l2 the same halved."""
    return [
        {"norm": norm, "epsilon": scale * k, "correct": count // share, "images": images}
        for norm, scale, share in (("linf", 0.1, 1), ("l2", 1.0, 2))
        for k, count in enumerate(hits)
    ]


CURVES = {"A": proportions([20, 10, 0]), "B": proportions([18, 12, 4])}
DIGIT = np.linspace(0, 1, 784).reshape(28, 28)
GALLERY = [[(DIGIT, "3 (99 %)", "black"), (1 - DIGIT, "8", "red")], [(DIGIT / 2, "1", "blue")]]
PLOTS = {
    "training": lambda path: plot_training(HISTORY, path, "title"),
    "held out": lambda path: plot_held_out_robustness(HISTORY, path, "title", [2]),
    "epsilon": lambda path: plot_accuracy_against_epsilon(CURVES, path, "title"),
    "certified": lambda path: plot_certified_accuracy({"A": ROWS, "B": ROWS[:3]}, path, "title"),
    "p_lower": lambda path: plot_p_lower({"A": ROWS, "B": ROWS[:3]}, path, "title"),
    "gallery": lambda path: plot_gallery(GALLERY, ["first", "second"], path, "title"),
}


@pytest.fixture
def drawn(monkeypatch):
    """The figure that a plot function of PLOTS would save."""
    figures = []
    monkeypatch.setattr(plotting, "_save", lambda figure, path: figures.append(figure))

    def draw(name):
        PLOTS[name]("unused.png")
        return figures.pop()

    return draw


def line_of(axes, label):
    (found,) = [line for line in axes.get_lines() if line.get_label() == label]
    return found


def line(axes, label):
    found = line_of(axes, label)
    return np.asarray(found.get_xdata(), float), np.asarray(found.get_ydata(), float)


def band(collection):
    """Lower and upper edge of a fill_between at each x, by x."""
    vertices = collection.get_paths()[0].vertices
    return {
        x: (vertices[vertices[:, 0] == x, 1].min(), vertices[vertices[:, 0] == x, 1].max())
        for x in np.unique(vertices[:, 0])
    }


@pytest.mark.parametrize("name", PLOTS)
def test_every_plot_writes_a_picture_and_changes_no_settings(tmp_path, name):
    before = dict(mpl.rcParams)
    PLOTS[name](tmp_path / "new" / "figure.png")
    assert (tmp_path / "new" / "figure.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = mpl.image.imread(tmp_path / "new" / "figure.png")
    assert min(pixels.shape[:2]) > 200
    # Not blank: ink on a white page.
    assert pixels[..., :3].std() > 0.01
    assert len(list((tmp_path / "new").iterdir())) == 1
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("name", PLOTS)
def test_every_plot_has_its_title_and_named_axes(drawn, name):
    figure = drawn(name)
    titles = [figure.get_suptitle(), *(axes.get_title() for axes in figure.axes)]
    assert "title" in titles
    for axes in figure.axes if name != "gallery" else []:
        assert axes.get_xlabel()
        # Panels side by side share the label on the left.
        assert axes.get_ylabel() or axes is not figure.axes[0]


@pytest.fixture
def figures(monkeypatch):
    """The figures that plot functions would save."""
    found = []
    monkeypatch.setattr(plotting, "_save", lambda figure, path: found.append(figure))
    return found


def test_pgd_alone_is_dashed_where_a_stronger_attack_is_known(figures):
    # In linf nothing is stronger, so one curve tells all; rows from a file are strings.
    pgd = [row | {"attack": "PGD, 2 steps"} for row in proportions([20, 16, 8])]
    worst = [
        row
        | {"attack": "worst known"}
        | ({"correct": row["correct"] - 3} if row["norm"] == "l2" else {})
        for row in pgd
    ]
    rows = [{key: str(value) for key, value in row.items()} for row in pgd + worst]
    plot_accuracy_against_epsilon({"A": rows, "B": pgd}, "unused.png", "title")
    (figure,) = figures
    linf, l2 = (
        [one for one in axes.get_lines() if len(one.get_xdata()) == 3] for axes in figure.axes
    )
    assert [(one.get_linestyle(), one.get_label()) for one in linf] == [("-", "A"), ("-", "B")]
    solid, dashed, other = l2
    assert [one.get_linestyle() for one in l2] == ["-", "--", "-"]
    assert solid.get_color() == dashed.get_color() != other.get_color()
    assert (20 * solid.get_ydata()).tolist() == pytest.approx([7, 5, 1])
    assert (20 * dashed.get_ydata()).tolist() == pytest.approx([10, 8, 4])
    # Only the worst known has a band.
    assert len(figure.axes[1].collections) == 2
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["A", "B", "worst known", "PGD, 2 steps"]


@pytest.mark.parametrize("count", [0, 1, 9])
def test_warnings_are_written_in_red_and_cover_nothing(monkeypatch, count):
    figures = []
    monkeypatch.setattr(plotting, "_save", lambda figure, path: figures.append(figure))
    warnings = [f"model {k}, gradient-free stronger at linf 0.1: 7 of 200 images" for k in range(9)]
    plot_accuracy_against_epsilon(CURVES, "unused.png", "title", warnings=warnings[:count])
    (figure,) = figures
    figure.draw_without_rendering()
    title = figure.legends[0].get_title()
    text = title.get_text().replace("\n", " ")
    assert text == ("warning: " + "; ".join(warnings[:count]) if count else "")
    if count:
        assert title.get_color() == plotting.ALARM
        written = title.get_window_extent()
        page = figure.bbox
        assert page.x0 <= written.x0 <= written.x1 <= page.x1
        assert page.y0 <= written.y0
        others = [axes.get_tightbbox() for axes in figure.axes]
        others += [label.get_window_extent() for label in figure.legends[0].get_texts()]
        assert not any(written.overlaps(other) for other in others)


@pytest.mark.parametrize(("name", "rows"), [("A", ROWS), ("B", ROWS[:3])])
def test_certified_accuracy_is_the_share_at_or_above_each_radius(drawn, name, rows):
    (axes,) = drawn("certified").axes
    at, share = line(axes, name)
    assert at[0] == 0
    assert at[-1] > 1.0
    expected = [sum(r["correct"] and r["radius"] >= x for r in rows) / len(rows) for x in at]
    assert share == pytest.approx(expected, abs=1e-15)
    assert share[0] == sum(r["correct"] for r in rows) / len(rows)
    if name == "A":
        assert share[-1] == 0


def test_certified_accuracy_counts_an_image_at_exactly_its_radius(monkeypatch, drawn):
    # The drawn grid seldom meets a radius; a grid of radii makes every point a tie.
    grid = np.array([0.0, 0.25, 0.5, math.nextafter(0.5, 1), 0.9, 1.0])
    monkeypatch.setattr(plotting.np, "linspace", lambda *arguments: grid)
    (axes,) = drawn("certified").axes
    assert line(axes, "A")[1] == pytest.approx(np.array([5, 5, 3, 1, 1, 1]) / 8)
    assert line(axes, "B")[1] == pytest.approx(np.array([3, 3, 1, 0, 0, 0]) / 3)


def test_band_of_certified_accuracy_holds_the_line(drawn):
    (axes,) = drawn("certified").axes
    for (name, rows), collection in zip(
        (("A", ROWS), ("B", ROWS[:3])), axes.collections, strict=True
    ):
        edges = band(collection)
        for x, share in zip(*line(axes, name), strict=True):
            low, high = edges[x]
            assert low <= share <= high
            hits = round(share * len(rows))
            if hits:
                assert binom.sf(hits - 1, len(rows), low) == pytest.approx(0.025)
            assert high - low > 0.2


def test_certified_accuracy_shows_the_clean_one_and_the_largest_radius(figures):
    made = [row | {"sigma": 0.5, "n": 1000, "alpha": 0.001} for row in ROWS]
    read = [{key: str(value) for key, value in row.items()} for row in made]
    wide = [row | {"sigma": "1.0"} for row in read]
    for rows in ({"A": made}, {"A": read}, {"A": read, "B": wide, "C": ROWS}):
        plot_certified_accuracy(rows, "unused.png", clean={"A": 0.97})
    # Phi^-1 of alpha^(1/n), the bound of a vote without dissent.
    cap = 0.5 * norm.ppf(0.001 ** (1 / 1000))
    for figure, caps in zip(figures, ([cap], [cap], [cap, 2 * cap]), strict=True):
        (axes,) = figure.axes
        dotted = [one for one in axes.get_lines() if one.get_linestyle() == ":"]
        level = [one for one in dotted if one.get_ydata() == pytest.approx([0.97, 0.97])]
        assert [one.get_color() for one in level] == [line_of(axes, "A").get_color()]
        found = [one.get_xdata()[0] for one in dotted if one not in level]
        assert found == pytest.approx(caps)
        assert axes.get_xlim()[1] > caps[-1]
        assert [text.get_text().strip() for text in axes.texts] == ["clean, no noise"] + len(
            caps
        ) * ["largest possible"]
        assert axes.get_title() == ""


@pytest.mark.parametrize("rows", [[], [0.0], [0.0, 0.0, 0.0]])
def test_models_that_certify_nothing_are_drawn_too(tmp_path, rows):
    nothing = [{"radius": r, "correct": 0, "p_lower": 0.3} for r in rows or [0.0]]
    plot_certified_accuracy({"A": nothing, "B": ROWS}, tmp_path / "a.png", "title")
    plot_certified_accuracy({"A": nothing}, tmp_path / "b.png", "title")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("scale", [1, 0.5])
def test_epsilon_panels_show_their_norm_with_its_interval(drawn, scale):
    axes = drawn("epsilon").axes[0 if scale == 1 else 1]
    for (name, hits), collection in zip(
        (("A", [20, 10, 0]), ("B", [18, 12, 4])), axes.collections, strict=True
    ):
        x, y = line(axes, name)
        assert x == pytest.approx(np.arange(3) * (0.1 if scale == 1 else 1.0))
        assert y == pytest.approx(np.array(hits) * scale / 20)
        edges = band(collection)
        for epsilon, count in zip(x, hits, strict=True):
            assert edges[epsilon] == pytest.approx(accuracy_interval(int(count * scale), 20))
    styles = {line.get_color() for line in axes.get_lines() if line.get_label() in CURVES}
    # Models are told apart by colour.
    assert len(styles) == 2


def test_training_curves_show_every_update_and_epoch(drawn):
    left, right = drawn("training").axes
    assert line(left, "one update")[1].tolist() == HISTORY["step_loss"]
    assert line(right, "one update")[1].tolist() == HISTORY["step_accuracy"]
    # Six updates are fewer than the window: the mean is over all so far.
    means = np.cumsum(HISTORY["step_loss"]) / np.arange(1, 7)
    assert line(left, "running mean")[1] == pytest.approx(means)
    # Held-out figures stand at the end of their epochs, two updates each.
    x, y = line(right, "held out")
    assert x.tolist() == [2, 4, 6]
    assert y.tolist() == [0.8, 0.9, 0.95]


def test_running_mean_forgets():
    values = np.random.default_rng(0).random(120)
    expected = [values[max(0, k - 49) : k + 1].mean() for k in range(120)]
    assert plotting._smoothed(values) == pytest.approx(expected)


def test_held_out_curves_mark_the_collapse_and_the_epoch_kept(drawn):
    (axes,) = drawn("held out").axes
    for label, key in (("clean", "clean"), ("single step", "single_step"), ("PGD", "pgd")):
        x, y = line(axes, label)
        assert x.tolist() == [1, 2, 3]
        assert y.tolist() == [row[key] for row in HISTORY["epochs"]]
    (shade,) = axes.patches
    assert (shade.get_x(), shade.get_width()) == (1.5, 1.0)
    assert line(axes, "epoch kept")[0].tolist() == [3, 3]


def test_p_lower_steps_up_at_every_image(drawn):
    (axes,) = drawn("p_lower").axes
    x, y = line(axes, "A")
    # In units of sigma; at or below one half there is no radius.
    expected = sorted(max(norm.ppf(row["p_lower"]), 0) for row in ROWS)
    assert x == pytest.approx(expected)
    assert y == pytest.approx(np.arange(1, 9) / 8)
    dots = [one.get_xydata().tolist() for one in axes.get_lines() if one.get_marker() == "o"]
    assert [dot for dot in dots if dot] == [[[0, 1 / 8]], [[0, 0]]]
    # "At or below": the step is at the value, the line flat after it.
    (curve,) = [one for one in axes.get_lines() if one.get_label() == "A"]
    assert curve.get_drawstyle() == "steps-post"


def test_p_lower_shows_the_largest_possible_value(figures):
    rows = [row | {"sigma": "0.5", "n": "1000", "alpha": "0.001"} for row in ROWS]
    plot_p_lower({"A": rows, "B": [row | {"sigma": "0.25"} for row in rows]}, "unused.png", "")
    (axes,) = figures[0].axes
    (cap,) = [one.get_xdata()[0] for one in axes.get_lines() if one.get_linestyle() == ":"]
    # One for both: the axis is in units of sigma.
    assert cap == pytest.approx(norm.ppf(0.001 ** (1 / 1000)))
    assert axes.get_xlim()[1] > cap


def test_gallery_shows_the_digits_with_their_captions(drawn):
    grid = np.array(drawn("gallery").axes).reshape(2, 2)
    for cells, row in zip(grid, GALLERY, strict=True):
        for axes, (image, caption, color) in zip(cells, row, strict=False):
            (shown,) = axes.get_images()
            assert np.array_equal(shown.get_array(), image)
            assert shown.get_clim() == (0, 1)
            assert (axes.get_xlabel(), axes.xaxis.label.get_color()) == (caption, color)
    assert not grid[1, 1].get_images()
    assert [cells[0].get_ylabel() for cells in grid] == ["first", "second"]


def test_rows_and_figures_need_no_torch():
    # The pages of results are drawn on machines without it.
    code = "import sys, src.reports.plotting, src.certification, src.records, src.reports.tables\n"
    code += "assert 'matplotlib.pyplot' not in sys.modules, 'global state'\n"
    code += "sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "svg", ""])
def test_files_need_no_backend_and_the_setting_stays(backend, tmp_path):
    # The first is what a notebook's terminal inherits, here as if that package were not there.
    code = f"""
import os, sys
sys.modules["matplotlib_inline"] = None
import src.reports.plotting, matplotlib
src.reports.plotting.Figure().savefig({str(tmp_path / "figure.png")!r})
assert os.environ["MPLBACKEND"] == {backend!r}
assert {backend!r} != "svg" or matplotlib.rcParams["backend"] == "svg"
"""
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"MPLBACKEND": backend}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, cwd=root)
    assert (tmp_path / "figure.png").exists()


def test_certified_accuracy_is_drawn_from_files_too(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plotting, "_save", lambda figure, path: figures.append(figure))
    write_rows(tmp_path / "rows.csv", ROWS)
    for rows in (ROWS, tmp_path / "rows.csv", str(tmp_path / "rows.csv")):
        plot_certified_accuracy({"A": rows}, "unused.png")
    lines = [line_of(figure.axes[0], "A").get_ydata() for figure in figures]
    assert np.array_equal(lines[0], lines[1])
    assert np.array_equal(lines[0], lines[2])
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other\.csv has no certificates"):
        plot_certified_accuracy({"A": tmp_path / "other.csv"}, "unused.png")
    with pytest.raises(ValueError, match="'A' has no certificates"):
        plot_certified_accuracy({"A": []}, "unused.png")
    with pytest.raises(FileNotFoundError, match="no file"):
        plot_certified_accuracy({"A": tmp_path / "absent.csv"}, "unused.png")


@pytest.mark.parametrize("count", [1, 4, 8, 20])
def test_every_one_of_many_curves_has_its_own_look_and_label(count, monkeypatch):
    figures = []
    monkeypatch.setattr(plotting, "_save", lambda figure, path: figures.append(figure))
    names = ["_a", "$b$", *map(str, range(count))][:count]
    for plot in (plot_certified_accuracy, plot_p_lower):
        plot(dict.fromkeys(names, ROWS), "unused.png", "title")
        (figure,) = figures[-1:]
        axes = figure.axes[0]
        lines = [line_of(axes, plotting.plain_text(name)) for name in names]
        assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == count
        legend = axes.get_legend() or figure.legends[0]
        shown = [text.get_text() for text in legend.get_texts()]
        assert shown[:count] == [plotting.plain_text(name) for name in names]
