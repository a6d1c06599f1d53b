"""One model under attack: all that is measured, for the scripts that report it."""

from collections.abc import Mapping, Sequence

from torch import nn
from torch.utils.data import TensorDataset

from src.robustness.checklist import evaluation_warnings
from src.robustness.fixed_radii import RADII, attack_hits, table_rows
from src.robustness.smallest_epsilon import epsilon_curves, epsilon_rows
from src.utils import subset
from src.verdicts import with_gradients


@with_gradients()
def attack_evaluation(
    model: nn.Module,
    test: TensorDataset,
    indices: Sequence[int],
    curve_indices: Sequence[int],
    *,
    steps: int,
    radii: Sequence[tuple[str, float]] = RADII,
) -> dict[str, list[dict]]:
    """Attack a model at fixed radii, look for the smallest radii, go through the checklist.

    Args:
        model: images -> logits (B, classes).
        test: the test set.
        indices: the images in it that are attacked at fixed radii.
        curve_indices: those whose smallest epsilon is looked for.
        steps: of PGD at fixed radii; the search takes half as many.
        radii: pairs of norm and epsilon.

    Returns:
        Lists of rows by name: `table` as of `attack_table`, `smallest_epsilons` as of
        `epsilon_rows`, `curve` as of `epsilon_curves`, `warnings` as of `evaluation_warnings`.
    """
    dataset = subset(test, indices)
    hits = attack_hits(model, dataset, steps=steps, radii=radii)
    smallest = epsilon_rows(model, test, curve_indices, steps=max(steps // 2, 1))
    curve = epsilon_curves(smallest)
    return {
        "table": table_rows(hits),
        "smallest_epsilons": smallest,
        "curve": curve,
        "warnings": evaluation_warnings(model, dataset, hits, curve),
    }


def attack_rows(evaluation: Mapping[str, Sequence[Mapping]], **columns) -> list[dict]:
    """Table and curve as rows of one file; `columns` go after `part` in each."""
    return [
        {"part": part, **columns, **row} for part in ("table", "curve") for row in evaluation[part]
    ]
