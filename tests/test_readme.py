"""The numbers in the README are those of the committed rows."""

from pathlib import Path

import pytest

from src.certificates import read_rows, verify
from src.comparison import MODELS
from src.tables import attack_comparison, certificate_lines, population_lines

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "reference" / "results"
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def certificates():
    return {name: read_rows(RESULTS / f"certificates_{name}.csv") for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_committed_certificates_verify(name):
    assert verify(RESULTS / f"certificates_{name}.csv") == []


def test_attack_table_is_that_of_the_rows():
    rows = read_rows(RESULTS / "comparison_attacks.csv")
    numbers = ("epsilon", "accuracy", "low", "high")
    tables = {
        name: [
            row | {key: float(row[key]) for key in numbers}
            for row in rows
            if (row["part"], row["model"]) == ("table", name)
        ]
        for name in MODELS
    }
    assert attack_comparison(tables) in README


def test_certificate_tables_are_those_of_the_rows(certificates):
    radii = [0.25 * step for step in range(7)]
    assert certificate_lines(certificates, radii) in README
    assert population_lines(certificates, radii[2::2]) in README


def test_figure_of_the_readme_is_there():
    assert (ROOT / "reference/figures/comparison_certified_accuracy.png").exists()
