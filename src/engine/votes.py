"""The votes on noisy copies of an image: who casts them, and who shares the work."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from src.checks import checked_logits, predicted
from src.engine.noise import STAGES, Noise

# (image in steps of the grid, its noise, stage, first copy, copies) -> votes, int64 (num_classes,)
Cast = Callable[[Tensor, Noise, str, int, int], np.ndarray]
# Copies per task at most, so that all workers end at about the same time.
TASK = 4096


class Workers(NamedTuple):
    """A `map` over tasks, and the number of tasks that it works on at once."""

    map: Callable
    number: int


# One task after another.
IN_TURN = Workers(map, 1)


class NoisyImage(NamedTuple):
    """One image under its noise, and what casts votes on its noisy copies.

    The copies are the same whatever their number, the batch size and the workers. Memory does not
    grow with the number of copies.
    """

    cast: Cast
    steps: Tensor  # int32 (C, H, W), the image in steps of the grid
    noise: Noise
    distance: float = 0.0  # l2, from the image to the point on the grid

    def votes(self, stage: str, n: int, workers: Workers = IN_TURN) -> np.ndarray:
        """Votes on `n` noisy copies: int64 (num_classes,).

        A NaN among the logits is a vote for none of the classes.

        Args:
            stage: one of `STAGES`.
            n: number of copies.
            workers: who shares the work.
        """
        # In floats rounding depends on the batch: whole batches, whatever the number of workers.
        size = block_size(self.steps.device)
        # Every task takes memory until the last one ends, so there are at most 10,000 or so.
        size *= max(1, min(max(TASK, n // 10_000), -(-n // workers.number)) // size)

        def count(first: int) -> np.ndarray:
            return self.cast(self.steps, self.noise, stage, first, min(size, n - first))

        return sum(workers.map(count, range(0, n, size)))

    def running_votes(self, stage: str, looks: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (look, votes on the first `look` copies) for each of the ascending `looks`.

        No copy is drawn before its look is asked for.
        """
        counts, done = 0, 0
        for look in looks:
            counts = counts + self.cast(self.steps, self.noise, stage, done, look - done)
            done = look
            yield look, counts


def exact_cast(form: nn.Module, native, num_classes: int) -> Cast:
    """Votes of a form in whole numbers: in C by `native`, a NativeExact of it, or through torch.

    Both give the same votes. Raises ValueError if the form has another number of classes.
    """
    _check_classes((1, form.num_classes), 1, num_classes)
    if native:
        return lambda steps, noise, stage, first, count: native.votes(
            steps, noise, STAGES[stage], first, count
        )

    def cast(steps: Tensor, noise: Noise, stage: str, first: int, count: int) -> np.ndarray:
        counts = torch.zeros(num_classes, dtype=torch.int64, device=steps.device)
        for start, size in _batches(first, count, block_size(steps.device)):
            counts += form.classes(noise.copies(steps, stage, start, size)).bincount(
                minlength=num_classes
            )
        return counts.cpu().numpy()

    return cast


def float_cast(
    network: Callable[[Tensor], Tensor], num_classes: int, batch_size: int | None
) -> Cast:
    """Votes of a network in floats: (B, C, H, W) -> logits (B, num_classes).

    At most `batch_size` copies pass through it at once. The votes raise ValueError if it returns
    logits of another shape.
    """

    @torch.no_grad()
    def cast(steps: Tensor, noise: Noise, stage: str, first: int, count: int) -> np.ndarray:
        # The last entry counts the NaNs.
        counts = torch.zeros(num_classes + 1, dtype=torch.int64, device=steps.device)
        for start, size in _batches(first, count, batch_size or block_size(steps.device)):
            copies = noise.copies(steps, stage, start, size).float() / noise.levels
            logits = network(copies)
            if isinstance(logits, Tensor):
                _check_classes(logits.shape, size, num_classes)
            logits = checked_logits(logits, size, name="base_classifier")
            vote = predicted(logits, none=num_classes)
            counts.scatter_add_(0, vote, torch.ones_like(vote))
        return counts[:-1].cpu().numpy()

    return cast


def _check_classes(shape: Sequence[int], count: int, num_classes: int) -> None:
    if tuple(shape) != (count, num_classes):
        raise ValueError(
            f"'base_classifier' returned logits of shape {tuple(shape)}; "
            f"expected {(count, num_classes)}, the second being 'num_classes'."
        )


def _batches(first: int, count: int, size: int) -> Iterator[tuple[int, int]]:
    """(first copy, copies) of each batch."""
    for start in range(first, first + count, size):
        yield start, min(size, first + count - start)


def block_size(device: torch.device) -> int:
    """Number of copies that pass through a network at once, if nothing else is asked for."""
    # 128 copies and their first features fit into the second-level cache of a core.
    return 128 if device.type == "cpu" else 2048


@contextmanager
def single_threaded_workers() -> Iterator[Workers]:
    """As many workers as torch has threads; each works with one thread.

    Small convolutions gain little from several threads. Whole blocks of copies in parallel keep the
    cores busier. The votes then do not depend on the number of threads either.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, None, torch.set_num_threads, (1,)) as pool:
            yield Workers(pool.map, threads)
    finally:
        torch.set_num_threads(threads)
