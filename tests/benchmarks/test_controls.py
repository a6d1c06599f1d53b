"""The table of trainings with and without thresholds: what it takes out of the rows."""

import torch

from benchmarks import controls
from src.records.rows import write_rows


def row(training, thresholds, norm, *standing):
    names = ("clean", "pgd", "autoattack", "worst")
    of = {"training": training, "thresholds": thresholds, "norm": norm, "images": 200}
    return of | dict(zip(names, standing, strict=True))


def test_a_network_has_one_line_with_both_balls():
    rows = [
        row("single step", "none", "linf", 198, 160, 150, 149),
        row("single step", "none", "l2", 198, 100, 90, 90),
        row("single step", "0.4, 0.6", "linf", 197, 190, 188, 188),
        row("single step", "0.4, 0.6", "l2", 197, 180, 120, 4),
    ]
    header, _, plain, cut = controls.control_lines(rows).split("\n")
    assert header.split("  ")[0] == "training"
    shares = ["99.0", "80.0", "75.0", "74.5", "50.0", "45.0", "45.0"]
    assert plain.split() == ["single", "step", "none", *shares]
    assert cut.split()[2:4] == ["0.4,", "0.6"]
    assert cut.split()[-3:] == ["90.0", "60.0", "2.0"]


def test_a_ball_that_was_judged_again_last_stays_in_its_columns():
    rows = [
        row("single step", "none", "linf", 198, 160, 150, 149),
        row("single step", "none", "l2", 198, 100, 90, 90),
    ]
    assert controls.control_lines(rows[::-1]) == controls.control_lines(rows)


def test_an_image_stands_only_if_no_attack_broke_it(tmp_path, monkeypatch):
    # Of five images the referee breaks the second, PGD the next two, our strongest the last.
    monkeypatch.setattr(controls, "REFERENCE", tmp_path)
    (tmp_path / "results").mkdir()
    judged = [
        {"index": k, "clean": 1, "square": int(k != 1), "robust": int(k != 1)} for k in range(5)
    ]
    write_rows(tmp_path / "results" / "autoattack_some.csv", judged)
    monkeypatch.setattr(controls, "load_checkpoint", lambda *_: None)
    monkeypatch.setattr(controls, "load_mnist", lambda *_: None)
    monkeypatch.setattr(controls, "subset", lambda *_: None)
    under_pgd = torch.tensor([True, True, False, False, True])
    verdicts = iter([under_pgd, torch.arange(5) < 4])
    monkeypatch.setattr(controls, "correct", lambda *_, **__: next(verdicts))
    found = controls.judged("some", "linf", tmp_path, "cpu")
    assert found == {"clean": 5, "pgd": 3, "autoattack": 4, "worst": 1, "images": 5}
