"""The order of the training images, and their random shifts and warps."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from src.optimisation import processes


def shuffled(
    dataset: TensorDataset, batch_size: int, shift: int, warp: float, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's part of each batch, in random order, its images shifted and warped."""
    part = slice(processes.rank(), None, processes.process_count())
    images, labels = dataset.tensors
    # Moved to the device once: an index from elsewhere would make each batch wait for it.
    order = torch.randperm(len(images), generator=generator).to(images.device)
    for chosen in order[: len(order) // batch_size * batch_size].split(batch_size):
        # Drawn for the whole batch, so that the number of processes does not matter.
        moved = random_shift(images[chosen], shift, generator)
        yield random_warp(moved, warp, generator)[part], labels[chosen][part]


def random_shift(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Each image moved by up to `shift` pixels along both axes; zeros fill the gap."""
    if shift == 0:
        return images
    padded = F.pad(images, (shift,) * 4)
    height, width = images.shape[2:]
    offsets = torch.randint(0, 2 * shift + 1, (2, len(images), 1, 1), generator=generator)
    rows = offsets[0][:, None] + torch.arange(height)[:, None]
    columns = offsets[1][:, None] + torch.arange(width)
    numbers = torch.arange(len(images))[:, None, None, None]
    channels = torch.arange(images.shape[1])[:, None, None]
    index = (numbers, channels, rows, columns)
    return padded[tuple(_without_waiting(values, images) for values in index)]


def _without_waiting(values: Tensor, images: Tensor) -> Tensor:
    """`values` on the device of `images`; on CUDA, Python does not wait for the copy.

    CUDA keeps the source of the copy until it is done. MPS may read it after it was freed.
    """
    return values.to(images.device, non_blocking=images.is_cuda)


def random_warp(images: Tensor, warp: float, generator: torch.Generator) -> Tensor:
    """Each image under a random linear map about its centre; zeros fill the gaps.

    The output at p is the image at (I + A) p, interpolated linearly. The four entries of A are
    uniform in [-warp, warp]: a little rotation, shear and scaling, as between two handwritings.
    """
    if warp == 0:
        return images
    change = warp * (2 * torch.rand((len(images), 2, 2), generator=generator) - 1)
    maps = _without_waiting(F.pad(torch.eye(2) + change, (0, 1)), images).to(images.dtype)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    # Rounding can leave [0, 1] by one unit in the last place.
    return F.grid_sample(images, grid, align_corners=False).clamp(0, 1)
