"""The noise of a certificate, fixed by seed and image, and the votes that are cast under it."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from src.checks import checked_logits, predicted

# Part of the seed of every draw: no two stages of one certificate share noise.
STAGES = {"select": 0, "estimate": 1, "predict": 2}


class Workers(NamedTuple):
    """A `map` over tasks, and the number of tasks that it works on at once."""

    map: Callable
    number: int


# One task after another.
IN_TURN = Workers(map, 1)


class NoisyImage(NamedTuple):
    """One image under Gaussian noise, and the network that votes on its noisy copies.

    The first copies are the same whatever their number, the batch size and the workers.
    Memory does not grow with the number of copies. The methods raise ValueError if the network
    returns logits of another shape.
    """

    network: Callable[[Tensor], Tensor]  # (B, 1, 28, 28) -> logits (B, num_classes)
    num_classes: int
    image: Tensor  # (1, 28, 28), on the device of the network
    key: int  # `image_key`; together with the stage it determines the noise
    sigma: float  # standard deviation of the noise, in pixel units
    batch_size: int | None = None  # at most this many copies pass through the network at once

    def votes(self, stage: str, n: int, workers: Workers = IN_TURN) -> np.ndarray:
        """Votes on `n` noisy copies: int64 (num_classes,).

        A NaN among the logits is a vote for none of the classes.

        Args:
            stage: one of `STAGES`.
            n: number of copies.
            workers: who shares the work.
        """
        blocks = range(-(-n // _block_size(self.image.device)))

        def count(share: Iterable[int]) -> np.ndarray:
            counts = self._zeros()
            for copies in self._draw(stage, share, n):
                for batch in copies.split(self.batch_size or len(copies)):
                    self._add_votes(counts, batch)
            return counts.cpu().numpy()

        shares = [blocks[first :: workers.number] for first in range(workers.number)]
        return sum(workers.map(count, shares))[:-1]

    def running_votes(self, stage: str, looks: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (look, votes on the first `look` copies) for each of the ascending `looks`.

        No copy is drawn before its look is asked for.
        """
        counts, copies, done = self._zeros(), self.image[:0], 0
        blocks = self._draw(stage, itertools.count(), looks[-1])
        for look in looks:
            while done < look:
                copies = copies if len(copies) else next(blocks)
                batch, copies = copies[: look - done], copies[look - done :]
                self._add_votes(counts, batch)
                done += len(batch)
            yield look, counts[:-1].cpu().numpy()

    def _draw(self, stage: str, blocks: Iterable[int], n: int) -> Iterator[Tensor]:
        """Yield the noisy copies (size, 1, 28, 28) of these blocks, up to copy `n` of the image.

        All noise of all certificates is drawn here.
        """
        size = _block_size(self.image.device)
        generator = torch.Generator(self.image.device)
        noise = torch.empty((size, *self.image.shape), device=self.image.device)
        for block in blocks:
            generator.manual_seed(block_seed(self.key, stage, block))
            # Always a whole block, even if only a part is used: the draws must not depend on n.
            noise.normal_(0, self.sigma, generator=generator)
            yield noise[: n - block * size].add_(self.image)

    def _zeros(self) -> Tensor:
        """Counts per class; the last entry counts the NaNs."""
        return torch.zeros(self.num_classes + 1, dtype=torch.int64, device=self.image.device)

    @torch.no_grad()
    def _add_votes(self, counts: Tensor, batch: Tensor) -> None:
        logits, expected = self.network(batch), (len(batch), self.num_classes)
        if isinstance(logits, Tensor) and logits.shape != expected:
            raise ValueError(
                f"'base_classifier' returned logits of shape {tuple(logits.shape)}; "
                f"expected {expected}, the second being 'num_classes'."
            )
        logits = checked_logits(logits, len(batch), name="base_classifier")
        vote = predicted(logits, none=self.num_classes)
        counts.scatter_add_(0, vote, torch.ones_like(vote))


def image_key(seed: int, index: int) -> int:
    """32 bits that stand for one image of a data set under one seed."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1)[0])


def block_seed(key: int, stage: str, block: int) -> int:
    """Seed of one block of noise; all blocks of all stages of one image have different seeds.

    This is the last step of MurmurHash3, which maps 32 bits one to one. The generator of torch
    on the CPU (a Mersenne Twister) takes in 32 bits and no more.
    """
    value = (4 * block + STAGES[stage]) ^ key
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        value = ((value ^ (value >> shift)) * factor) & 0xFFFFFFFF
    return value ^ (value >> 16)


def _block_size(device: torch.device) -> int:
    """Number of copies whose noise is drawn at once; it is also the default batch size."""
    # 128 copies and their first features fit into the second-level cache of a core.
    return 128 if device.type == "cpu" else 2048


@contextmanager
def single_threaded_workers() -> Iterator[Workers]:
    """As many workers as torch has threads; each works with one thread.

    torch draws normals with a single thread, and small convolutions gain little from several.
    Whole blocks of noise in parallel keep the cores busier. The votes then do not depend on the
    number of threads either.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, None, torch.set_num_threads, (1,)) as pool:
            yield Workers(pool.map, threads)
    finally:
        torch.set_num_threads(threads)
