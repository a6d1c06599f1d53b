"""The smallest epsilon that breaks each image: accuracy at every radius out of one search."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from src.checks import check_ball, check_dataset, check_function
from src.engine.untouched import evaluation_form
from src.robustness.fixed_radii import accuracy_row, attacks, multi_step_name
from src.training_and_evaluation import correct
from src.utils import progress_bar, subset
from src.verdicts import right, with_gradients

# The radii of the curves: far enough that a working attack brings every model down to chance.
CURVE_EPSILONS = {
    "linf": (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5),
    "l2": (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0),
}
LARGEST = {norm: epsilons[-1] for norm, epsilons in CURVE_EPSILONS.items()}
# Radii tried are whole multiples of 1 / GRID; a grid lets images share calls of the attack.
GRID = {"linf": 200, "l2": 20}


@with_gradients()
def smallest_epsilons(
    model: nn.Module,
    dataset: TensorDataset,
    norm: str,
    *,
    steps: int = 20,
    batch_size: int = 1000,
    progress: bool = True,
) -> np.ndarray:
    """The norm of the smallest perturbation found that breaks each image.

    Bisects the radius of PGD image by image, to 0.005 in linf and 0.05 in l2. What is returned
    is the norm of a perturbation that was seen to work, so it bounds the image's true
    robustness from above, whatever the attack may have missed.

    Args:
        model: images -> logits (B, classes).
        dataset: images (N, 1, 28, 28) in [0, 1] and int64 labels (N,).
        norm: "linf" or "l2".
        steps: of PGD, from two starts.
        batch_size: images a call.
        progress: show a progress bar.

    Returns:
        float64 (N,), pixel units: 0 if the clean image is misclassified, inf if nothing was
        found within LARGEST[norm].
    """
    check_ball(0, norm)
    check_dataset(dataset)
    device = next(model.parameters(), dataset.tensors[0]).device
    check_function(model, dataset.tensors[0][:4].to(device))
    smallest = np.where(correct(model, dataset, batch_size=batch_size).numpy(), np.inf, 0.0)
    # In multiples of 1 / GRID: the attack failed at `low` and succeeded within `high`.
    low, high = np.zeros(len(smallest), dtype=int), np.zeros(len(smallest), dtype=int)
    largest = round(LARGEST[norm] * GRID[norm])
    bar = progress_bar(progress, total=len(smallest), desc=f"smallest epsilons, {norm}")
    with bar, evaluation_form(model, probe=True) as network:

        def attack(chosen: np.ndarray, multiple: int) -> None:
            epsilon = multiple / GRID[norm]
            for part in np.split(chosen, range(batch_size, len(chosen), batch_size)):
                found = _broken_at(network, subset(dataset, part), epsilon, norm, steps)
                broken = np.isfinite(found)
                smallest[part] = np.minimum(smallest[part], found)
                reached = np.ceil(found[broken] * GRID[norm]).astype(int)
                high[part[broken]] = np.minimum(reached, multiple)
                low[part[~broken]] = multiple

        # What fails in the largest ball may work in a smaller one: long steps leap over errors.
        for multiple in (largest, largest // 2, largest // 4):
            attack(np.flatnonzero(np.isinf(smallest)), multiple)
        low[:] = 0
        while len(wide := np.flatnonzero(high - low > 1)):
            bar.update(len(smallest) - len(wide) - bar.n)
            middle = (low + high)[wide] // 2
            for multiple in np.unique(middle):
                attack(wide[middle == multiple], int(multiple))
        bar.update(len(smallest) - bar.n)
    return smallest


def _broken_at(
    network: nn.Module, dataset: TensorDataset, epsilon: float, norm: str, steps: int
) -> np.ndarray:
    """Norms of the perturbations that break images within `epsilon`, inf where none was found."""
    device = next(network.parameters(), dataset.tensors[0]).device
    images, labels = (tensor.to(device) for tensor in dataset.tensors)
    if not len(images):
        return np.zeros(0)
    attacked = attacks(steps)[multi_step_name(steps)](network, images, labels, epsilon, norm)
    broken = ~right(network, attacked, labels).cpu()
    return torch.where(broken, lengths(attacked, images, norm), torch.inf).numpy()


def lengths(attacked: Tensor, images: Tensor, norm: str) -> Tensor:
    """Norm of each image's perturbation, float64 (B,) on the CPU."""
    change = attacked.cpu().double() - images.cpu().double()
    return torch.linalg.vector_norm(change.flatten(1), torch.inf if norm == "linf" else 2, dim=1)


def epsilon_rows(
    model: nn.Module,
    test: TensorDataset,
    indices: Sequence[int],
    *,
    steps: int = 20,
    progress: bool = True,
) -> list[dict]:
    """One row an image and norm: `index`, `label`, `attack`, `norm`, `smallest_epsilon`.

    Args:
        model: images -> logits (B, classes).
        test: the data set from which the images are taken.
        indices: their numbers in it.
        steps: of PGD.
        progress: show a progress bar.
    """
    dataset, rows = subset(test, indices), []
    for norm in LARGEST:
        values = smallest_epsilons(model, dataset, norm, steps=steps, progress=progress)
        rows += [
            {
                "index": int(index),
                "label": label,
                "attack": multi_step_name(steps),
                "norm": norm,
                "smallest_epsilon": float(value),
            }
            for index, label, value in zip(
                indices, dataset.tensors[1].tolist(), values, strict=True
            )
        ]
    return rows


def epsilon_curves(rows: Sequence[Mapping]) -> list[dict]:
    """Accuracy against the radius: how many images have no smaller epsilon.

    The radii are among those that the bisection tries, so no point of the curve suffers from
    its precision. The curve never rises, because each ball contains the smaller ones.

    Args:
        rows: those of `epsilon_rows` for one model, read from a file or not.

    Returns:
        Rows as of `accuracy_row` for each attack, for both norms at CURVE_EPSILONS.
    """
    smallest: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        values = smallest.setdefault((row["attack"], row["norm"]), [])
        values.append(float(row["smallest_epsilon"]))
    return [
        accuracy_row(attack, norm, epsilon, torch.tensor(values, dtype=torch.float64) > epsilon)
        for (attack, norm), values in smallest.items()
        for epsilon in CURVE_EPSILONS[norm]
    ]
