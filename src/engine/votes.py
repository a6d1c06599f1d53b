"""Noise keyed by seed and image, and the votes that a network casts under it."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from src.checks import checked_logits, predicted

# Part of the key of every draw, so that no two stages of one certificate share noise.
STAGES = {"select": 0, "estimate": 1, "predict": 2}


class Workers(NamedTuple):
    """A `map` over tasks and the number of tasks it works on at once."""

    map: Callable
    number: int


IN_TURN = Workers(map, 1)


def count_votes(
    network: Callable[[Tensor], Tensor],
    image: Tensor,
    n: int,
    sigma: float,
    num_classes: int,
    stream: tuple[int, str],
    batch_size: int | None = None,
    workers: Workers = IN_TURN,
    start: int = 0,
) -> np.ndarray:
    """Votes of `network` on `n` copies of one image under Gaussian noise.

    The first copies are the same whatever `n`, the batch size and the number of workers.
    Memory does not grow with `n`.

    Args:
        network: images (B, 1, 28, 28) -> logits (B, num_classes).
        image: (1, 28, 28), on the device of the network.
        n: number of copies.
        sigma: standard deviation of the noise, in pixel units.
        num_classes: number of logits.
        stream: `image_key` and one of `STAGES`, which determine the noise.
        batch_size: at most so many copies pass through the network at once.
        workers: who shares the blocks of noise.
        start: leave out the first so many copies, a multiple of 2,048.

    Returns:
        int64 (num_classes,); a NaN among the logits is a vote for none of them.

    Raises:
        ValueError: if the network returns logits of another shape.
    """
    size = _block_size(image.device)
    blocks = range(start // size, -(-n // size))
    shares = [blocks[first :: workers.number] for first in range(workers.number)]

    def vote(share: range) -> np.ndarray:
        counts = torch.zeros(num_classes + 1, dtype=torch.int64, device=image.device)
        with torch.no_grad():
            for copies in _noisy_blocks(image, share, n, sigma, stream):
                for batch in copies.split(batch_size or size):
                    _add_votes(counts, network(batch), len(batch))
        return counts.cpu().numpy()

    return sum(workers.map(vote, shares))[:num_classes]


def running_votes(
    network: Callable[[Tensor], Tensor],
    image: Tensor,
    looks: Sequence[int],
    sigma: float,
    num_classes: int,
    stream: tuple[int, str],
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (look, votes of the first `look` copies) for each of the ascending `looks`.

    No copy is drawn before its look is asked for. Arguments as for `count_votes`.
    """
    counts = torch.zeros(num_classes + 1, dtype=torch.int64, device=image.device)
    blocks = _noisy_blocks(image, itertools.count(), looks[-1], sigma, stream)
    done, copies = 0, image[:0]
    for look in looks:
        while done < look:
            copies = copies if len(copies) else next(blocks)
            batch, copies = copies[: look - done], copies[look - done :]
            with torch.no_grad():
                _add_votes(counts, network(batch), len(batch))
            done += len(batch)
        yield look, counts[:num_classes].cpu().numpy()


def _noisy_blocks(image, blocks, n, sigma, stream):
    """Yield these blocks of noisy copies (size, 1, 28, 28), the last one as far as `n` goes."""
    size = _block_size(image.device)
    generator = torch.Generator(image.device)
    noise = torch.empty((size, *image.shape), device=image.device)
    for block in blocks:
        # A whole block is drawn even if a part is used: the draws must not depend on n.
        noise.normal_(0, sigma, generator=generator.manual_seed(block_seed(*stream, block)))
        yield noise[: n - block * size].add_(image)


def _add_votes(counts: Tensor, logits: Tensor, expected: int) -> None:
    """Add the votes of a batch to `counts` (num_classes + 1,), whose last entry counts NaNs."""
    num_classes = len(counts) - 1
    if isinstance(logits, Tensor) and logits.shape != (expected, num_classes):
        raise ValueError(
            f"'base_classifier' returned logits of shape {tuple(logits.shape)}; "
            f"expected ({expected}, {num_classes}), the second being 'num_classes'."
        )
    vote = predicted(checked_logits(logits, expected, name="base_classifier"), num_classes)
    counts.scatter_add_(0, vote, torch.ones_like(vote))


def image_key(seed: int, index: int) -> int:
    """32 bits that stand for one image of a data set under one seed."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1)[0])


def block_seed(key: int, stage: str, block: int) -> int:
    """Seed of one block of noise: distinct for all blocks of all stages of one image.

    The finaliser of MurmurHash3, a bijection on 32 bits, which is as much as the Mersenne
    Twister of torch's CPU generator takes in.
    """
    value = (4 * block + STAGES[stage]) ^ key
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        value = ((value ^ (value >> shift)) * factor) & 0xFFFFFFFF
    return value ^ (value >> 16)


def _block_size(device: torch.device) -> int:
    """Copies of an image whose noise is drawn in one go, and the default batch."""
    # 128 copies and their first features stay in a core's second-level cache.
    return 128 if device.type == "cpu" else 2048


@contextmanager
def single_threaded_workers():
    """As many workers as torch has threads, each with one thread of its own.

    Drawing normals is single-threaded in torch and small convolutions share badly between
    threads, so whole blocks in parallel keep the cores busier. It also makes the votes
    independent of the number of threads.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, None, torch.set_num_threads, (1,)) as pool:
            yield Workers(pool.map, threads)
    finally:
        torch.set_num_threads(threads)
