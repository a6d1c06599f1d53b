"""The picture that explains both halves."""

import matplotlib as mpl
import numpy as np

from benchmarks.teaser import plot_how_it_works
from src.reports import plotting

DIGIT = np.linspace(0, 1, 784).reshape(28, 28)
VOTES = [0, 12, 0, 0, 0, 88, 0, 0, 0, 0]


def test_picture_of_both_halves_says_what_was_computed(tmp_path, monkeypatch):
    settings = {
        "label": 5,
        "image": DIGIT,
        "attacked": np.clip(DIGIT + 0.01, 0, 1),
        "readings": [(5, 0.997), (3, 0.9991)],
        "copies": [(DIGIT, 5 if k else 3) for k in range(8)],
        "votes": VOTES,
        "radius": 0.9399,
    }
    figures = []
    monkeypatch.setattr(plotting, "_save", lambda figure, path: figures.append(figure))
    plot_how_it_works("unused.png", **settings)
    (figure,) = figures
    written = [axes.get_xlabel() for axes in figure.axes]
    assert written[:3] == [
        "reads 5, 99.7% sure",
        "change (red: more ink), x 100",
        "reads 3, 99.9% sure",
    ]
    assert written[4:12] == ["3", *7 * ["5"]]
    bars = figure.axes[-1]
    assert [bar.get_height() for bar in bars.patches] == [88, 12]
    assert [label.get_text() for label in bars.get_xticklabels()] == ["5", "1"]
    said = " ".join(text.get_text() for part in figure.subfigs for text in part.texts)
    # Never more than was certified.
    assert "distance 0.93" in said
    assert "100 noisy copies" in said
    assert "length 0.28" in said
    monkeypatch.undo()
    plot_how_it_works(tmp_path / "a.png", **settings)
    assert mpl.image.imread(tmp_path / "a.png").shape[1] == 1800
