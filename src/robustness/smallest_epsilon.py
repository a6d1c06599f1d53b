"""The smallest epsilon that breaks each image: one search gives the accuracy at every radius."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from src.checks import check_ball, check_count, check_dataset, check_function
from src.engine.untouched import evaluation_form
from src.robustness.fixed_radii import accuracy_row, attacks, multi_step_name
from src.training_and_evaluation import correct
from src.utils import progress_bar, subset
from src.verdicts import batches, stands, with_gradients

# The radii of the curves: far enough that a working attack brings every model down to chance.
CURVE_EPSILONS = {
    "linf": (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5),
    "l2": (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0),
}
LARGEST = {norm: epsilons[-1] for norm, epsilons in CURVE_EPSILONS.items()}
# The search tries whole multiples of 1 / GRID, so that images can share calls of the attack.
GRID = {"linf": 200, "l2": 20}


@with_gradients()
def smallest_epsilons(
    model: nn.Module,
    dataset: TensorDataset,
    norm: str,
    *,
    steps: int = 20,
    batch_size: int = 1000,
    finer: int = 1,
    progress: bool = True,
) -> np.ndarray:
    """The norm of the smallest perturbation found that breaks each image.

    Bisects the radius of PGD per image, to 0.005 in linf and 0.05 in l2 (divided by `finer`). The
    result is the norm of a perturbation that was seen to work. So it is an upper bound on the true
    robustness of the image, whatever the attack may have missed.

    Args:
        model: images -> logits (B, classes).
        dataset: images (N, C, H, W) in [0, 1] and int64 labels (N,).
        norm: "linf" or "l2".
        steps: of PGD, from two starts.
        batch_size: images per call.
        finer: how many times as fine the search is; images then share fewer calls.
        progress: show a progress bar.

    Returns:
        float64 (N,), pixel units: 0 if the clean image is misclassified, inf if nothing was
        found within LARGEST[norm].
    """
    check_ball(0, norm)
    check_dataset(dataset)
    check_count("finer", finer)
    grid = GRID[norm] * finer
    device = next(model.parameters(), dataset.tensors[0]).device
    check_function(model, dataset.tensors[0][:4].to(device))
    smallest = np.where(correct(model, dataset, batch_size=batch_size).numpy(), np.inf, 0.0)
    # In multiples of 1 / grid: the attack failed at `low` and succeeded within `high`.
    low, high = np.zeros(len(smallest), dtype=int), np.zeros(len(smallest), dtype=int)
    attack = attacks(steps)[multi_step_name(steps)]
    bar = progress_bar(progress, total=len(smallest), desc=f"smallest epsilons, {norm}")
    with bar, evaluation_form(model, probe=True) as network:

        def narrow(chosen: np.ndarray, multiple: int) -> None:
            """Attack the chosen images at one radius, and write down what it shows."""
            ball = partial(attack, epsilon=multiple / grid, norm=norm)
            for part in np.split(chosen, range(batch_size, len(chosen), batch_size)):
                found = _broken_lengths(network, subset(dataset, part), ball, norm)
                broken = np.isfinite(found)
                smallest[part] = np.minimum(smallest[part], found)
                reached = np.ceil(found[broken] * grid).astype(int)
                high[part[broken]] = np.minimum(reached, multiple)
                low[part[~broken]] = multiple

        largest = round(LARGEST[norm] * grid)
        # What fails in the largest ball may work in a smaller one: long steps leap over errors.
        for multiple in (largest, largest // 2, largest // 4):
            narrow(np.flatnonzero(np.isinf(smallest)), multiple)
        low[:] = 0
        while len(wide := np.flatnonzero(high - low > 1)):
            bar.update(len(smallest) - len(wide) - bar.n)
            middle = (low + high)[wide] // 2
            for multiple in np.unique(middle):
                narrow(wide[middle == multiple], int(multiple))
        bar.update(len(smallest) - bar.n)
    return smallest


def _broken_lengths(network, dataset: TensorDataset, attack: Callable, norm: str) -> np.ndarray:
    """Norm of the perturbation that breaks each image, inf where `attack` found none."""
    if not len(dataset):
        return np.zeros(0)
    ((images, labels),) = batches(network, *dataset.tensors, batch_size=len(dataset))
    attacked = attack(network, images, labels)
    change = (attacked.cpu().double() - images.cpu().double()).flatten(1)
    lengths = torch.linalg.vector_norm(change, torch.inf if norm == "linf" else 2, dim=1)
    return lengths.masked_fill(stands(network, attacked, labels).cpu(), torch.inf).numpy()


def epsilon_rows(
    model: nn.Module,
    test: TensorDataset,
    indices: Sequence[int],
    *,
    steps: int = 20,
    finer: int = 1,
    progress: bool = True,
) -> list[dict]:
    """One row per image and norm: `index`, `label`, `attack`, `norm`, `smallest_epsilon`.

    Args:
        model: images -> logits (B, classes).
        test: the data set from which the images are taken.
        indices: their numbers in it.
        steps: of PGD.
        finer: as for `smallest_epsilons`.
        progress: show a progress bar.
    """
    dataset, rows = subset(test, indices), []
    options = {"steps": steps, "finer": finer, "progress": progress}
    labels = dataset.tensors[1].tolist()
    for norm in LARGEST:
        values = smallest_epsilons(model, dataset, norm, **options)
        attack = {"attack": multi_step_name(steps), "norm": norm}
        rows += [
            {"index": int(index), "label": label, **attack, "smallest_epsilon": float(value)}
            for index, label, value in zip(indices, labels, values, strict=True)
        ]
    return rows


def epsilon_curves(
    rows: Sequence[Mapping], epsilons: Mapping[str, Sequence[float]] = CURVE_EPSILONS
) -> list[dict]:
    """Accuracy against the radius: how many images have no smaller epsilon.

    The bisection tries these very radii, so its precision shows in no point of the curve. The
    curve never rises, because each ball contains the smaller ones.

    Args:
        rows: those of `epsilon_rows` for one model, fresh or read from a file.
        epsilons: norm -> the radii.

    Returns:
        Rows as of `accuracy_row` for each attack, for both norms at these radii.
    """
    smallest: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        values = smallest.setdefault((row["attack"], row["norm"]), [])
        values.append(float(row["smallest_epsilon"]))
    return [
        accuracy_row(attack, norm, epsilon, torch.tensor(values, dtype=torch.float64) > epsilon)
        for (attack, norm), values in smallest.items()
        for epsilon in epsilons[norm]
    ]
