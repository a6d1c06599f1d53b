"""A model in one ball: the strongest attack by stages, and beside it the whole evaluation."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from src.robustness.evaluation import attack_evaluation
from src.robustness.fixed_radii import WORST_KNOWN, accuracy_row
from src.robustness.smallest_epsilon import GRID, LARGEST, epsilon_curves
from src.robustness.strongest import attack_by_stage
from src.utils import subset

# Radii of a curve: its shape shows, whatever the scale of the model's robustness.
POINTS = 26
# The search for smallest epsilons is at most this much finer: its calls are then for single images.
FINEST = 20


def evaluate_in_ball(
    model: nn.Module,
    test: TensorDataset,
    indices: Sequence[int],
    epsilon: float,
    norm: str = "linf",
    *,
    steps: int = 100,
    queries: int = 5000,
    thorough: bool = False,
    seed: int = 0,
) -> tuple[dict[str, list[dict]], Tensor, Tensor]:
    """`attack_evaluation` in one ball, in which the strongest attack counts too.

    Args:
        model: images -> logits (B, classes).
        test: images (N, C, H, W) in [0, 1] and int64 labels (N,).
        indices: numbers of the images that are attacked.
        epsilon, norm: the ball.
        steps, queries, thorough: of the strongest attack; PGD takes half the steps.
        seed: of the strongest attack.

    Returns:
        Lists of rows by name, as of `attack_evaluation`, and `stages`: per stage of the strongest
        attack, as of `accuracy_row`, with how many images it has `broken`; the last row is what
        all attacks together leave. Then the images that the strongest attack ends with, and the
        classes int64 that the model gives them, on the CPU.
    """
    few, ball = subset(test, indices), {"norm": norm, "epsilon": epsilon}
    generator = torch.Generator().manual_seed(seed)
    options = {"steps": steps, "queries": queries, "thorough": thorough, "generator": generator}
    hits, attacked, classes = attack_by_stage(model, few, **ball, **options)
    # A radius of the grid must be small beside the ball.
    finer = min(max(math.ceil(8 / (epsilon * GRID[norm])), 1), FINEST) if epsilon else 1
    options = {"steps": max(steps // 2, 1), "radii": [(norm, epsilon)], "finer": finer}
    found = attack_evaluation(model, test, indices, indices, **options)
    lengths = _lengths(attacked - few.tensors[0].cpu(), ~list(hits.values())[-1])
    rows = _with_strongest(found["smallest_epsilons"], lengths)
    worst = [row for row in rows if row["attack"] == WORST_KNOWN]
    smallest = {
        name: np.array([row["smallest_epsilon"] for row in worst if row["norm"] == name])
        for name in LARGEST
    }
    last = accuracy_row(WORST_KNOWN, norm, epsilon, torch.from_numpy(smallest[norm] > epsilon))
    table = [row for row in found["table"] if row["attack"] != WORST_KNOWN] + [last]
    radii = {k: _radii(v, epsilon * (k == norm), k) for k, v in smallest.items()}
    found |= {"table": table, "smallest_epsilons": rows, "curve": epsilon_curves(rows, radii)}
    return found | {"stages": _stage_rows(hits, last)}, attacked, classes


def _lengths(change: Tensor, broken: Tensor) -> dict[str, list[float]]:
    """Norm -> how long each change is, inf where it broke nothing."""
    flat = change.double().flatten(1)
    orders = {"linf": torch.inf, "l2": 2}
    lengths = {name: torch.linalg.vector_norm(flat, o, dim=1) for name, o in orders.items()}
    return {name: each.masked_fill(~broken, torch.inf).tolist() for name, each in lengths.items()}


def _with_strongest(rows: Sequence[Mapping], lengths: Mapping[str, list[float]]) -> list[dict]:
    """Rows of `epsilon_rows`; in those of all attacks, `lengths` of the strongest one count."""
    found = {name: iter(each) for name, each in lengths.items()}
    return [
        row | {"smallest_epsilon": min(row["smallest_epsilon"], next(found[row["norm"]]))}
        if row["attack"] == WORST_KNOWN
        else dict(row)
        for row in rows
    ]


def _radii(smallest: np.ndarray, epsilon: float, norm: str) -> list[float]:
    """Radii for a curve: up to where the last image breaks, `epsilon` among them."""
    end = 1.1 * max(smallest.max(), 2 * epsilon)
    # Nothing breaks within the largest radius that is searched; or everything at none at all.
    end = end if 0 < end < np.inf else LARGEST[norm]
    return sorted({*np.linspace(0, end, POINTS).tolist(), epsilon})


def _stage_rows(hits: Mapping[str, Tensor], worst: Mapping) -> list[dict]:
    """Per stage how many images stand, and how many it broke; then what all attacks leave."""
    rows, ball = [], (worst["norm"], worst["epsilon"])
    for stage, standing in hits.items():
        where = ("", 0.0) if stage == "clean" else ball
        row = accuracy_row(stage, *where, standing)
        rows.append(row | {"broken": rows[-1]["correct"] - row["correct"] if rows else 0})
    return [*rows, worst | {"broken": rows[-1]["correct"] - worst["correct"]}]
