"""One model under attack: all that is measured, for the scripts that report it."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from src.engine.untouched import unwrapped
from src.robustness.checklist import evaluation_warnings, other_attacks
from src.robustness.few_pixels import few_pixels_lengths
from src.robustness.fixed_radii import RADII, WORST_KNOWN, attack_hits, multi_step_name, table_rows
from src.robustness.smallest_epsilon import CURVE_EPSILONS, LARGEST, epsilon_curves, epsilon_rows
from src.robustness.thresholds import thresholds_attack
from src.training_and_evaluation import correct
from src.utils import subset
from src.verdicts import with_gradients

# The attack behind a ramp in each norm, by strength for the time. Of 500 images, network
# adversarial_single_step.pt, at l2 2: PGD left 448 standing, a few pixels 164, then this one 48,
# with 20 steps 90 in half the time, on the margin 57. At linf 0.3: PGD 471, this 469, 40 steps 468.
RAMP = {"linf": {"steps": 20}, "l2": {"steps": 40, "loss": "cross_entropy"}}


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

    What any of these attacks found is counted wherever it holds: as WORST_KNOWN, beside PGD alone.

    Args:
        model: images -> logits (B, classes).
        test: the test set.
        indices: the images in it that are attacked at fixed radii.
        curve_indices: those whose smallest epsilon is looked for.
        steps: of PGD at fixed radii; the search takes half as many.
        radii: pairs of norm and epsilon.

    Returns:
        Lists of rows by name: `table` as of `table_rows`, `smallest_epsilons` as of
        `epsilon_rows`, `curve` as of `epsilon_curves`, `warnings` as of `evaluation_warnings`.
    """
    dataset = subset(test, indices)
    hits = attack_hits(model, dataset, steps=steps, radii=radii)
    alone = epsilon_rows(model, test, curve_indices, steps=max(steps // 2, 1))
    others = other_attacks(model, dataset, hits)
    known = _smallest_known(model, test, indices, hits, others, alone, radii)
    table = {}
    for (attack, norm, epsilon), right in hits.items():
        table[attack, norm, epsilon] = right
        if attack == multi_step_name(steps):
            standing = [known[norm][index] > epsilon for index in indices]
            table[WORST_KNOWN, norm, epsilon] = torch.tensor(standing)
    worst = [
        row | {"attack": WORST_KNOWN, "smallest_epsilon": float(known[row["norm"]][row["index"]])}
        for row in alone
    ]
    return {
        "table": table_rows(table),
        "smallest_epsilons": alone + worst,
        "curve": epsilon_curves(alone + worst),
        "warnings": evaluation_warnings(model, dataset, hits, epsilon_curves(alone), others=others),
    }


def _smallest_known(
    model, test: TensorDataset, indices, hits, others, rows: Sequence[Mapping], radii
) -> dict[str, np.ndarray]:
    """Per norm and number of a test image, the smallest radius at which any attack broke it.

    Args:
        model, test, indices, radii: as for `attack_evaluation`.
        hits, others: what attacks at fixed radii left and broke of the images of `indices`.
        rows: those of `epsilon_rows`.
    """
    known = {norm: np.full(len(test), np.inf) for norm in LARGEST}
    for row in rows:
        known[row["norm"]][row["index"]] = row["smallest_epsilon"]
    broken = {key: ~right for key, right in hits.items()}
    broken |= {key: fallen for key, (_, fallen) in others.items()}
    for (_, norm, epsilon), fallen in broken.items():
        for values in [known[norm]] if norm else known.values():
            chosen = np.asarray(indices)[fallen.numpy()]
            values[chosen] = np.minimum(values[chosen], epsilon)
    images = np.unique([*indices, *(row["index"] for row in rows)])
    attacked = {norm: values[images] for norm, values in known.items()}
    _search_further(model, subset(test, images), attacked, radii)
    for norm, values in attacked.items():
        known[norm][images] = values
    return known


def _search_further(model, dataset: TensorDataset, known: dict[str, np.ndarray], radii) -> None:
    """Lower `known` by attacks that PGD is no match for, and by what each norm says of both."""
    images, labels = dataset.tensors
    _share(known, images[0].numel())
    limits = torch.from_numpy(known["l2"]).clamp(max=LARGEST["l2"])
    lengths = few_pixels_lengths(model, images, labels, limits).numpy()
    np.minimum(known["l2"], lengths, out=known["l2"])
    balls = {*radii, *((norm, at) for norm, some in CURVE_EPSILONS.items() for at in some[1:])}
    # Upwards: an image that broke is not attacked again.
    cuts = getattr(unwrapped(model), "thresholds", None) is not None
    for norm, epsilon in sorted(balls) if cuts else ():
        standing = np.flatnonzero(known[norm] > epsilon)
        attack = partial(thresholds_attack, epsilon=epsilon, norm=norm, **RAMP[norm])
        if len(standing):
            right = correct(model, subset(dataset, standing), attack=attack).numpy()
            known[norm][standing[~right]] = epsilon
    _share(known, images[0].numel())


def _share(known: dict[str, np.ndarray], pixels: int) -> None:
    """An l2 ball lies in the linf ball of its radius, and that in an l2 ball sqrt(pixels) as wide.

    So what broke an image in one norm broke it in the other.
    """
    np.minimum(known["linf"], known["l2"], out=known["linf"])
    np.minimum(known["l2"], known["linf"] * pixels**0.5, out=known["l2"])


def attack_rows(evaluation: Mapping[str, Sequence[Mapping]], **columns) -> list[dict]:
    """Table and curve as rows of one file; `columns` go after `part` in each."""
    return [
        {"part": part, **columns, **row} for part in ("table", "curve") for row in evaluation[part]
    ]
