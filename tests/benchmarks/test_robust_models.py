"""The table of reference models under attack: what it takes out of the rows."""

import pytest

from benchmarks import robust_models
from src.files import write_json
from src.records.rows import read_rows, write_rows


@pytest.fixture
def results(tmp_path):
    """Two seeds of one recipe: 10 images, of which AutoAttack leaves 8 and 6, ours 7 and 5."""
    for seed, (stem, left, clean) in enumerate((("", 8, 0.99), ("_seed1", 6, 0.97))):
        name = f"adversarial_single_step{stem}"
        attacks = {"part": "table", "norm": "linf", "epsilon": 0.3, "images": 10}
        write_rows(
            tmp_path / f"{name}_attacks.csv",
            [
                attacks | {"attack": "single step", "accuracy": 0.95},
                attacks | {"attack": "2x PGD-40", "accuracy": 0.9},
                attacks | {"attack": "2x PGD-40", "accuracy": 0.1, "norm": "l2"},
                attacks | {"attack": "2x PGD-40", "accuracy": 0.2, "part": "curve"},
            ],
        )
        facts = {"options": {"seed": seed}, "seconds": 90, "commit": "abc"}
        write_json(tmp_path / f"{name}_attacks.json", facts | {"test_accuracy": clean})
        rows = [
            {"index": k, "square": int(k < left), "robust": int(k < left - 1)} for k in range(10)
        ]
        write_rows(tmp_path / f"autoattack_{name}.csv", rows)
    return tmp_path


def test_each_seed_and_their_mean_beside_the_published(results):
    lines = robust_models.model_lines("linf", 0.3, results).split("\n")
    _, _, first, second, mean, published, *_ = lines
    assert first.split("  ", 1)[0] == "single step, seed 0"
    assert first.split()[4:9] == ["abc", "1.5", "99.00", "90.0", "80.0"]
    # 7 of 10, with the interval of Clopper and Pearson.
    assert first.split()[9:] == ["70.0", "[34.8,", "93.3]", "10"]
    assert second.split()[8:10] == ["60.0", "50.0"]
    assert mean.split("mean ± sd")[1].split() == [
        *("1.5", "98.00", "±", "1.41", "90.0", "±", "0.0"),
        *("70.0", "±", "14.1", "60.0", "±", "14.1", "10"),
    ]
    assert published.split()[-1] == "82.93"


def test_a_mean_over_seeds_takes_the_images_that_all_were_judged_on(results):
    path = results / "autoattack_adversarial_single_step.csv"
    write_rows(path, [row for row in read_rows(path) if int(row["index"]) >= 4])
    lines = robust_models.model_lines("linf", 0.3, results).split("\n")
    # 3 of the images from 4 on of the first seed, 1 of the second.
    assert lines[2].split()[9] == "50.0"
    assert lines[3].split()[9] == "50.0"
    assert lines[4].split()[-4:] == ["33.3", "±", "23.6", "6"]


def test_a_model_that_was_not_judged_is_left_out(results):
    (results / "autoattack_adversarial_single_step_seed1.csv").unlink()
    lines = robust_models.model_lines("linf", 0.3, results)
    assert "seed 0" in lines
    assert "seed 1" not in lines
    assert "mean" not in lines
    assert len(robust_models.model_lines("l2", 2.0, results).split("\n")) == 2
