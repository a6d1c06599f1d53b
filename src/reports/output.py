"""Where reports go, and what the reports of one model and of several have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from src.files import write_json
from src.records.rows import write_rows
from src.reports.plotting import plain_text, plot_accuracy_against_epsilon
from src.reports.tables import median_lines
from src.robustness.checklist import short_warnings


@dataclass(frozen=True)
class Output:
    """Where a report is written, and what it says of the run that it is about.

    `name` begins the file names, `title` heads tables and figures, `facts` (JSON values) say what
    made the result.
    """

    name: str
    title: str
    facts: Mapping
    results: str | Path
    figures: str | Path

    def rows(self, ending: str) -> Path:
        """The path of a file of result rows, or of its JSON."""
        return Path(self.results) / f"{self.name}_{ending}"

    def figure(self, ending: str) -> Path:
        """The path of a figure."""
        return Path(self.figures) / f"{self.name}_{ending}.png"


def figure_title(name: str, words: str, default: str) -> str:
    """The title of a run: `words` if its name is the `default` one, else the name."""
    return words if name == default else plain_text(name)


def save_attacks(
    evaluations: Mapping[str, Mapping[str, list[dict]]],
    output: Output,
    facts: Mapping,
    *,
    chance: float = 0.1,
) -> None:
    """Print the medians of evaluations under attack, write their rows and draw their curves.

    Args:
        evaluations: model -> `attack_evaluation`. Rows of several models have a column `model`.
        output: where the results go.
        facts: further facts for the JSON beside the rows.
        chance: accuracy that no attack needs to go below, for the figure.
    """
    several, rows, smallest, short = len(evaluations) > 1, [], [], []
    for name, found in evaluations.items():
        column = {"model": name} if several else {}
        rows += attack_rows(found, **column)
        smallest += [column | row for row in found["smallest_epsilons"]]
        prefix = f"{plain_text(name)}, " if several else ""
        short += [prefix + text for text in short_warnings(found["warnings"])]
    smallest_by_model = {name: found["smallest_epsilons"] for name, found in evaluations.items()}
    print("\n" + median_lines(smallest_by_model))
    write_rows(output.rows("attacks.csv"), rows)
    warnings = {name: found["warnings"] for name, found in evaluations.items()}
    facts = {**output.facts, **facts, "warnings": warnings if several else found["warnings"]}
    write_json(output.rows("attacks.json"), facts)
    write_rows(output.rows("smallest_epsilons.csv"), smallest)
    curves = {name: found["curve"] for name, found in evaluations.items()}
    title = "Accuracy under the worst attack known" if several else f"{output.title} under attack"
    path = output.figure("accuracy_against_epsilon")
    plot_accuracy_against_epsilon(curves, path, title, warnings=short, chance=chance)


def attack_rows(evaluation: Mapping[str, Sequence[Mapping]], **columns) -> list[dict]:
    """Table and curve as rows of one file; `columns` go after `part` in each."""
    return [
        {"part": part, **columns, **row} for part in ("table", "curve") for row in evaluation[part]
    ]
