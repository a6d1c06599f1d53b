"""The Square Attack: random search without gradients (Andriushchenko et al., ECCV 2020)."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from src.attacks import checked
from src.balls import l2_length, linf_box, per_image, projection
from src.checks import check_count
from src.engine.untouched import evaluation_form
from src.verdicts import Worst

# Area of the first squares, as a share of the image.
SHARE = 0.8
# After how many of 10,000 queries the area of the squares is halved.
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def square_attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    norm: str = "linf",
    *,
    queries: int = 5000,
    clip: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Change a random square at a time, and keep the change if the margin rises.

    In linf all pixels of a square go to one end of the ball, starting from vertical stripes. In
    l2 a square takes over the length that another had. The model is only asked for its logits, so
    hidden gradients do not stop this attack. A misclassified image is left alone.

    Arguments and errors as for `pgd_attack`; `queries`: points tried per image, at most.
    """
    images = checked(images, labels, epsilon, norm, clip)
    check_count("queries", queries)
    if epsilon == 0 or not len(images):
        return images.clone()
    generator = generator or torch.Generator().manual_seed(0)
    moves = _linf_moves if norm == "linf" else _l2_moves
    with torch.inference_mode(False), torch.no_grad(), evaluation_form(model) as network:
        worst = Worst(network, images, labels, "margin", False)
        worst.visit(images, want_gradient=False)
        chosen = worst.standing.nonzero()[:, 0]
        start, change = moves(images, epsilon, clip, generator)
        points = start[chosen]
        value = torch.full_like(worst.value[chosen], -torch.inf)
        for query, side in enumerate(_sides(images, queries)):
            if not len(chosen):
                break
            tried = change(points, chosen, side) if query else points
            verdict = worst.visit(tried, chosen, want_gradient=False)
            better = verdict.loss > value
            points = torch.where(per_image(better), tried, points)
            value = torch.where(better, verdict.loss, value)
            if verdict.broken.any():
                standing = ~verdict.broken
                chosen, points, value = chosen[standing], points[standing], value[standing]
    return worst.points


def _sides(images: Tensor, queries: int) -> Iterator[int]:
    """The side of the square of each query, in pixels: large at first, then ever smaller."""
    area = images.shape[2] * images.shape[3]
    for query in range(queries):
        halvings = sum(query * 10_000 / queries > after for after in HALVINGS)
        yield min(max(round((SHARE * 0.5**halvings * area) ** 0.5), 1), *images.shape[2:])


def _corner(images: Tensor, side: int, generator) -> tuple[slice, slice]:
    """A square anywhere in the image, the same for all images: each sees only its own."""
    starts = [
        int(torch.randint(size - side + 1, (), generator=generator, device=generator.device))
        for size in images.shape[2:]
    ]
    return tuple(slice(start, start + side) for start in starts)


def _coins(shape, generator, device) -> Tensor:
    return (torch.rand(shape, generator=generator, device=generator.device) < 0.5).to(device)


def _linf_moves(images: Tensor, epsilon: float, clip, generator) -> tuple[Tensor, Callable]:
    """Stripes at the ends of the ball, and the function that repaints a square of them."""
    low, high = linf_box(images, epsilon, clip)
    count, channels, _, width = images.shape
    stripes = _coins((count, channels, 1, width), generator, images.device)

    def change(points: Tensor, chosen: Tensor, side: int) -> Tensor:
        rows, columns = _corner(images, side, generator)
        # Drawn for all images, so that no image's squares depend on which others stand.
        coins = _coins((count, channels, 1, 1), generator, images.device)[chosen]
        tried = points.clone()
        ends = (bound[chosen, :, rows, columns] for bound in (high, low))
        tried[:, :, rows, columns] = torch.where(coins, *ends)
        return tried

    return torch.where(stripes, high, low), change


def _l2_moves(images: Tensor, epsilon: float, clip, generator) -> tuple[Tensor, Callable]:
    """Bumps side by side in the ball, and the function that moves length between two squares."""
    project = projection(images, epsilon, "l2", clip)
    tile = max(min(images.shape[2:]) // 5, 1)
    start = torch.zeros_like(images)
    for top in range(0, images.shape[2] - tile + 1, tile):
        for left in range(0, images.shape[3] - tile + 1, tile):
            start[:, :, top : top + tile, left : left + tile] = _bumps(images, tile, generator)

    def change(points: Tensor, chosen: Tensor, side: int) -> Tensor:
        # Of an odd side of 3 at least, so that a bump has a middle.
        side = min(max(side, 3) // 2 * 2 + 1, *images.shape[2:])
        delta = points - images[chosen]
        gets, gives = (_corner(images, side, generator) for _ in range(2))
        free = (epsilon**2 - l2_length(delta) ** 2).clamp(min=0)
        shape = _bumps(images, side, generator)[chosen] + _unit(delta[:, :, gets[0], gets[1]])
        rest = delta.clone()
        for rows, columns in (gets, gives):
            rest[:, :, rows, columns] = 0
        # All the length of the two squares, and what clipping has left over.
        length = (free + l2_length(delta) ** 2 - l2_length(rest) ** 2).clamp(min=0).sqrt()
        rest[:, :, gets[0], gets[1]] = length * shape / l2_length(shape).clamp(min=1e-12)
        return project(images[chosen] + epsilon * rest / l2_length(rest).clamp(min=1e-12), chosen)

    return project(images + epsilon * start / l2_length(start).clamp(min=1e-12)), change


def _unit(delta: Tensor) -> Tensor:
    return delta / l2_length(delta).clamp(min=1e-12)


def _bumps(images: Tensor, side: int, generator) -> Tensor:
    """A hill beside a valley per image, in a square of this side: random signs and direction.

    Of l2 length 1, (B, C, side, side).
    """
    count, channels = images.shape[:2]
    half = side // 2
    both = torch.cat([_hill(half, side), -_hill(side - half, side)])
    both = both / both.norm()
    turned = _coins((count, 1, 1, 1), generator, images.device)
    signs = 1.0 - 2.0 * _coins((count, channels, 1, 1), generator, images.device).to(images)
    both = both.to(images)
    return torch.where(turned, both.T, both) * signs / channels**0.5


def _hill(height: int, width: int) -> Tensor:
    """Rises to the middle as a sum of 1 / k^2 over centred rectangles that shrink with k."""
    row, column = (
        (torch.arange(size, device="cpu") - (size - 1) / 2).abs().ceil()[:, None]
        for size in (height, width)
    )
    edge = max(height, width) // 2
    distance = torch.maximum(row, column.T).long().clamp(max=edge)
    steps = 1.0 / torch.arange(1, edge + 2, device="cpu") ** 2
    return steps.flip(0).cumsum(0).flip(0)[distance]
