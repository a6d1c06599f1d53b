"""The noise of every certificate: Gaussian, on the grid of bytes, the same on every machine.

A noisy pixel is a whole number of steps of 1/255. The bits come from Philox4x32-10 (Salmon et
al., SC 2011), a generator that turns a key and a counter into 128 bits. So any copy of any image
can be drawn by itself. The key holds the 64 bits of the seed; fields of the counter hold the block
of four pixels, the copy, the image and the stage, each 32 bits. No two of these share noise.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from src.checks import check_count
from src.engine.exact_native import GROUP, draw_copies, exact_library
from src.engine.lattice import LEVELS, MOST_LEVELS, law, limit

# The last field of the counter. REFINE is added for the second half of a draw's 64 bits.
STAGES = {"select": 0, "estimate": 1, "predict": 2}
REFINE = 2**8
_MASK = 2**32 - 1


class Noise(NamedTuple):
    """The noise of one image: a function of seed, number of the image, stage and copy."""

    seed: int  # below 2**64
    index: int  # number of the image in its data set, below 2**32
    sigma: float  # standard deviation, in pixel units
    levels: int = LEVELS  # steps per unit of the grid

    def copies(self, steps: Tensor, stage: str, first: int, count: int) -> Tensor:
        """Noisy copies `first` to `first` + `count` - 1 of an image, int32 (count, ...) in steps.

        Args:
            steps: int32 (...), the image in steps of the grid; the copies are on its device.
            stage: one of `STAGES`.
        """
        library = exact_library() if steps.device.type == "cpu" else None
        if library:
            return draw_copies(library, steps, self, STAGES[stage], first, count)
        cut = limit(self.levels)
        noise = self._draw(stage, first, count, steps.numel(), steps.device)
        noisy = (steps.flatten() + noise).clamp(-cut, cut)
        return noisy.int().view(count, *steps.shape)

    def _draw(self, stage: str, first: int, count: int, pixels: int, device) -> Tensor:
        """The noise, int64 (count, pixels), as `exact.c` draws it.

        Of GROUP pixels, number 16 w + l is word w of block l.
        """
        of = self.sigma, self.levels
        table, (entries, lower) = law(*of), _tables_on(*of, device)
        blocks = torch.arange(-(-pixels // GROUP) * (GROUP // 4), device=device)
        copies = torch.arange(first, first + count, device=device)[:, None]
        random = self._numbers(blocks, copies, STAGES[stage]).flatten(1)[:, :pixels]
        cell, found = random & (2**table.bits - 1), random >> table.bits
        entry = entries[cell]
        threshold, alias = entry >> table.bits, entry & (2**table.bits - 1)
        own = found < threshold
        if (equal := found == threshold).any():
            # Once in 2**(32 - bits) numbers the first 32 bits do not decide.
            more = self._numbers(blocks, copies, STAGES[stage] + REFINE).flatten(1)[:, :pixels]
            own |= equal & (more < lower[cell])
        return torch.where(own, cell, alias) + table.lowest

    def _numbers(self, blocks: Tensor, copies: Tensor, last: int) -> Tensor:
        """32-bit numbers (copies, groups, GROUP) of these blocks and copies."""
        shape = torch.broadcast_shapes(blocks.shape, copies.shape)
        counter = [field.expand(shape) for field in (blocks, copies)]
        counter += [torch.full_like(counter[0], field) for field in (self.index, last)]
        words = torch.stack(philox(counter, self.seed), dim=1)
        return words.unflatten(2, (-1, GROUP // 4)).transpose(1, 2).flatten(2)


def philox(counter: list[Tensor], seed: int) -> list[Tensor]:
    """Philox4x32-10: four numbers of 32 bits for a counter of four, int64 (...) each."""
    (a, b, c, d), key0, key1 = counter, seed & _MASK, seed >> 32
    for _ in range(10):
        # Products are taken modulo 2**64, and their upper half is masked: so the sign does no harm.
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b = (right >> 32 & _MASK) ^ b ^ key0, right & _MASK
        c, d = (left >> 32 & _MASK) ^ d ^ key1, left & _MASK
        key0, key1 = (key0 + 0x9E3779B9) & _MASK, (key1 + 0xBB67AE85) & _MASK
    return [a, b, c, d]


@functools.lru_cache(maxsize=16)
def _tables_on(sigma: float, levels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    made = law(sigma, levels)
    return tuple(
        torch.from_numpy(t.astype(np.int64)).to(device) for t in (made.entries, made.lower)
    )


def sampler_cost(sigma: float, pixels: int, draws: int, levels: int = LEVELS) -> float:
    """What `draws` noisy copies of `pixels` pixels cost of alpha, as their law is not quite exact.

    The chance of an error under the law that is drawn and under the exact one differ by at most the
    distance in total variation, which adds up over independent pixels and copies.
    """
    # Four more units in the last place than the products can lose.
    return pixels * draws * law(float(sigma), levels).distance * (1 + 2.0**-50)


def check_numbers(seed: int, indices) -> None:
    """Raise ValueError unless seed and numbers of images fit into their fields."""
    check_count("seed", seed, 0)
    # As int: a tensor cannot be compared with numbers of this size.
    if int(seed) >= 2**64:
        raise ValueError(f"'seed' = {seed} must be below 2**64.")
    for index in indices:
        check_count("indices", index, 0)
        if int(index) >= 2**32:
            raise ValueError(f"'indices' holds {index}; numbers of images must be below 2**32.")


def checked_copies(**counts: int) -> list[int]:
    """The numbers of noisy copies as int; ValueError, with the name, for one that does not fit.

    Beyond 2**32 the field of the copy would start again, and copies would repeat others.
    """
    for name, count in counts.items():
        check_count(name, count)
        if int(count) > 2**32:
            raise ValueError(f"'{name}' = {count} must be at most 2**32, or copies would repeat.")
    return list(map(int, counts.values()))


def check_levels(levels: int) -> None:
    """Raise ValueError unless `levels` is a number of steps that the sampler can hold."""
    check_count("levels", levels)
    if levels > MOST_LEVELS:
        raise ValueError(f"'levels' = {levels} must be at most {MOST_LEVELS}.")


def to_grid(images: Tensor, levels: int = LEVELS) -> tuple[Tensor, list[float]]:
    """Images (B, ...) in [0, 1] in whole steps of 1 / levels, int32, and how far each was moved.

    The distance is l2 in pixel units, rounded up. A pixel that is float32(k / levels) counts as on
    the grid.
    """
    steps, distances = torch.empty(images.shape, dtype=torch.int32, device="cpu"), []
    # Float64 takes much memory, so a few images at once.
    size = max(1, 2**20 // max(1, images.shape[1:].numel()))
    for part, into in zip(images.detach().split(size), steps.split(size), strict=True):
        exact = part.cpu().double()
        nearest = (exact * levels).round()
        on_grid = exact.float() == (nearest / levels).float()
        moved = (exact - nearest / levels).masked_fill_(on_grid, 0).flatten(1)
        distances += (moved.norm(dim=1) * (1 + 1e-9)).tolist()
        into.copy_(nearest)
    return steps.to(images.device), distances
