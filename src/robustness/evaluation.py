"""One model under attack: all that is measured, for the scripts that report it."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from src.robustness.checklist import evaluation_warnings, other_attacks
from src.robustness.few_pixels import few_pixels_lengths
from src.robustness.fixed_radii import RADII, WORST_KNOWN, attack_hits, multi_step_name, table_rows
from src.robustness.smallest_epsilon import CURVE_EPSILONS, LARGEST, epsilon_curves, epsilon_rows
from src.robustness.strongest import removable_thresholds
from src.robustness.thresholds import thresholds_attack
from src.training_and_evaluation import correct
from src.utils import subset
from src.verdicts import with_gradients

# Options of `thresholds_attack` per norm. Of 500 images, network adversarial_single_step.pt, at l2
# 2: PGD left 448 standing, a few pixels 164, then this attack 48 (with 20 steps 90 in half the
# time, on the margin 57). At linf 0.3: PGD 471, this attack 469, with 40 steps 468.
THRESHOLDS_OPTIONS = {"linf": {"steps": 20}, "l2": {"steps": 40, "loss": "cross_entropy"}}


@with_gradients()
def attack_evaluation(
    model: nn.Module,
    test: TensorDataset,
    indices: Sequence[int],
    curve_indices: Sequence[int],
    *,
    steps: int,
    radii: Sequence[tuple[str, float]] = RADII,
    finer: int = 1,
) -> dict[str, list[dict]]:
    """Attack a model at fixed radii, look for the smallest radii, go through the checklist.

    Beside the results of PGD alone stand those of all attacks together, called WORST_KNOWN: an
    image that any attack broke counts as broken at that radius and at all larger ones.

    Args:
        model: images -> logits (B, classes).
        test: images (N, C, H, W) in [0, 1] and int64 labels (N,).
        indices: numbers of the images that are attacked at fixed radii.
        curve_indices: numbers of those whose smallest epsilon is looked for.
        steps: of PGD at fixed radii; the search for the smallest epsilon takes half as many.
        radii: pairs of norm and epsilon.
        finer: as for `smallest_epsilons`.

    Returns:
        Lists of rows by name: `table` as of `table_rows`, `smallest_epsilons` as of
        `epsilon_rows`, `curve` as of `epsilon_curves`, `warnings` as of `evaluation_warnings`.
    """
    dataset, indices = subset(test, indices), np.asarray(indices)
    standing = attack_hits(model, dataset, steps=steps, radii=radii)
    alone = epsilon_rows(model, test, curve_indices, steps=max(steps // 2, 1), finer=finer)
    others = other_attacks(model, dataset, standing)
    broken = {key: ~still for key, still in standing.items()}
    broken |= {key: tried.broken for key, tried in others.items()}
    known = _smallest_known(model, test, indices, broken, alone, radii)
    table = {}
    for (attack, norm, epsilon), still in standing.items():
        table[attack, norm, epsilon] = still
        if attack == multi_step_name(steps):
            table[WORST_KNOWN, norm, epsilon] = torch.tensor(known[norm][indices] > epsilon)
    worst = [
        row | {"attack": WORST_KNOWN, "smallest_epsilon": float(known[row["norm"]][row["index"]])}
        for row in alone
    ]
    warnings = evaluation_warnings(model, dataset, standing, epsilon_curves(alone), others=others)
    return {
        "table": table_rows(table),
        "smallest_epsilons": alone + worst,
        "curve": epsilon_curves(alone + worst),
        "warnings": warnings,
    }


def _smallest_known(model, test, indices, broken, rows, radii) -> dict[str, np.ndarray]:
    """Norm -> per image of `test`, the smallest radius at which any attack broke it, or inf.

    `broken` says which of the images `indices` fell: (name, norm, epsilon) -> bool, as many as
    `indices`. `rows` are those of `epsilon_rows`.
    """
    known = {norm: np.full(len(test), np.inf) for norm in LARGEST}
    for row in rows:
        known[row["norm"]][row["index"]] = row["smallest_epsilon"]
    for (_, norm, epsilon), fallen in broken.items():
        chosen = indices[fallen.numpy()]
        # What the model gets wrong without an attack is broken in both norms.
        for values in [known[norm]] if norm else known.values():
            values[chosen] = np.minimum(values[chosen], epsilon)
    images = np.unique([*indices, *(row["index"] for row in rows)])
    attacked = {norm: values[images] for norm, values in known.items()}
    _search_further(model, subset(test, images), attacked, radii)
    for norm, values in attacked.items():
        known[norm][images] = values
    return known


def _search_further(model, dataset: TensorDataset, known: dict[str, np.ndarray], radii) -> None:
    """Lower `known` by attacks that are stronger than PGD on some models."""
    images, labels = dataset.tensors
    _share(known, images[0].numel())
    limits = torch.from_numpy(known["l2"]).clamp(max=LARGEST["l2"])
    lengths = few_pixels_lengths(model, images, labels, limits).numpy()
    np.minimum(known["l2"], lengths, out=known["l2"])
    balls = {*radii, *((norm, e) for norm, some in CURVE_EPSILONS.items() for e in some[1:])}
    device = next(model.parameters(), images).device
    has_thresholds = removable_thresholds(model, images[:4].to(device))
    # From small radii to large ones: an image that broke is not attacked again.
    for norm, epsilon in sorted(balls) if has_thresholds else ():
        chosen = np.flatnonzero(known[norm] > epsilon)
        options = {"epsilon": epsilon, "norm": norm, **THRESHOLDS_OPTIONS[norm]}
        attack = partial(thresholds_attack, **options)
        if len(chosen):
            standing = correct(model, subset(dataset, chosen), attack=attack).numpy()
            known[norm][chosen[~standing]] = epsilon
    _share(known, images[0].numel())


def _share(known: dict[str, np.ndarray], pixels: int) -> None:
    """Let what broke an image in one norm count in the other.

    An l2 ball lies in the linf ball of its radius, and that in an l2 ball sqrt(pixels) as wide.
    """
    np.minimum(known["linf"], known["l2"], out=known["linf"])
    np.minimum(known["l2"], known["linf"] * pixels**0.5, out=known["l2"])
