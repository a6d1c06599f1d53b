"""What every script needs first: MNIST as tensors, parts of it, a device, seeds."""

import hashlib
import os
import random
import sys
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import TensorDataset
from tqdm import tqdm

from src.checks import check_count, check_tensors
from src.mnist.digits import read_digit
from src.mnist.files import read_mnist
from src.optimisation.processes import process_count


def load_mnist(split: str, root: str | os.PathLike | None = None) -> TensorDataset:
    """MNIST's "train" (N = 60,000) or "test" (N = 10,000) part in canonical order.

    It is read from the folder `root` and fetched into it if it is not there. None is `data` of the
    repository, whatever the working directory is.

    Returns:
        images: (N, 1, 28, 28) float32 in [0, 1], byte / 255; labels: (N,) int64.

    Raises:
        ValueError: if `split` is another word.
        FileNotFoundError: if a file is missing and no source has it.
        OSError: if a file is missing and `root` cannot be written to.
    """
    images, labels = read_mnist(split, root)
    pixels = np.divide(images[:, None], 255, dtype=np.float32)
    return TensorDataset(torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64)))


def load_image(path: str | os.PathLike) -> torch.Tensor:
    """An image file of one's own digit as the networks want it.

    Grey or colour, of any size, dark on light or light on dark: the digit is cropped, scaled and
    centred as MNIST's are, and a warning says each thing that was guessed. An image in MNIST's form
    comes back as it is.

    Returns:
        (1, 28, 28) float32 in [0, 1], each pixel byte / 255: ink 1 on background 0.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no image that can be read, or is blank, too small or too large.
    """
    digit = read_digit(path)
    for note in digit.notes:
        warnings.warn(f"{path}: {note}", stacklevel=2)
    return torch.from_numpy(np.divide(digit.pixels[None], 255, dtype=np.float32))


def data_digest(dataset: TensorDataset) -> str:
    """SHA-256 of the tensors of a data set, in hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in dataset.tensors:
        add_to_digest(digest, tensor)
    return digest.hexdigest()


def add_to_digest(digest, tensor: torch.Tensor) -> None:
    """Add type, shape and bytes of a tensor of any kind to a digest of hashlib."""
    if not isinstance(tensor, torch.Tensor):
        digest.update(f"{type(tensor).__name__}\n".encode())
        return
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    dense = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
    # As bytes: numpy has no bfloat16.
    digest.update(dense.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def load_training_data(
    root: str | os.PathLike | None, held_out: int, *, quick: bool = False
) -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """Training images without the last `held_out`, those held-out ones, and test images.

    `quick` takes only the first 2,560, 200 and 500 of them, for a smoke run.

    Raises:
        ValueError: unless 1 <= `held_out` < 60,000.
    """
    if not 1 <= held_out < 60_000:
        raise ValueError(f"'held_out' = {held_out} must be at least 1 and less than 60,000.")
    parts = (*hold_out(load_mnist("train", root), held_out), load_mnist("test", root))
    if not quick:
        return parts
    return tuple(
        subset(part, range(min(size, len(part))))
        for part, size in zip(parts, (2560, 200, 500), strict=True)
    )


def hold_out(dataset: TensorDataset, size: int) -> tuple[TensorDataset, TensorDataset]:
    """Split off the last `size` examples: (rest, held out). Choices are made on the latter.

    Raises:
        ValueError: unless 1 <= `size` < len(dataset).
    """
    if not 1 <= size < len(dataset):
        raise ValueError(f"'size' = {size} must be at least 1 and less than {len(dataset)}.")
    slices = (slice(None, -size), slice(-size, None))
    return tuple(TensorDataset(*(tensor[part] for tensor in dataset.tensors)) for part in slices)


def subset(dataset: TensorDataset, indices: Sequence[int] | torch.Tensor) -> TensorDataset:
    """The examples with the given numbers, in that order, as tensors in memory.

    Raises:
        ValueError: unless `dataset` is a TensorDataset and `indices` are whole numbers from 0 to
            len(dataset) - 1.
    """
    check_tensors(dataset)
    given = torch.as_tensor(indices)
    numbers = given.to(torch.int64)
    # A Boolean mask would become the numbers 0 and 1.
    whole = given.dtype != torch.bool and torch.equal(numbers.to(given.dtype), given)
    if not (whole and ((numbers >= 0) & (numbers < len(dataset))).all()):
        raise ValueError(f"'indices' must be whole numbers from 0 to {len(dataset) - 1}.")
    return TensorDataset(*(tensor[numbers.to(tensor.device)] for tensor in dataset.tensors))


def spread_indices(count: int, size: int) -> list[int]:
    """`size` evenly spaced whole numbers from 0 to `count` - 1; all of them if `size` is larger.

    A single one is 0.

    Raises:
        ValueError: unless `count` is a whole number of at least 0 and `size` one of at least 1.
    """
    check_count("count", count, 0)
    check_count("size", size)
    size = min(int(size), int(count))
    return [i * (int(count) - 1) // max(size - 1, 1) for i in range(size)]


def spread(dataset: TensorDataset, size: int) -> TensorDataset:
    """`size` examples spread from the first to the last, all of them if there are fewer."""
    return subset(dataset, spread_indices(len(dataset), size))


def progress_bar(shown: bool, *args, **options) -> tqdm:
    """tqdm's bar with these arguments; silent unless `shown`, or if stderr is closed."""
    return tqdm(*args, disable=not shown or sys.stderr is None, **options)


def get_device(name: str = "auto") -> torch.device:
    """The device called `name`: "cpu", "cuda", "cuda:1", "mps", or "auto" for the fastest.

    From then on float32 is computed as float32. TF32, with ten bits of mantissa, is the default of
    cuDNN and may have been chosen for matrix products too. Several processes cannot use MPS, whose
    tensors they cannot exchange.

    Raises:
        ValueError: if this machine has no such device; the message says what it has.
    """
    # By the old names and the new one: torch fails if they disagree.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.fp32_precision = "ieee"
    available = ["cpu"]
    if torch.backends.mps.is_available() and process_count() == 1:
        available.insert(0, "mps")
    if torch.cuda.is_available():
        numbered = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        available = ["cuda", *numbered, *available]
    if name == "auto":
        return torch.device(available[0])
    if str(name) not in available:
        raise ValueError(
            f"'device' = {str(name)!r} is not available; use {', '.join(available)} or auto."
        )
    return torch.device(name)


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch on every device.

    cuDNN then also uses algorithms that give the same bits every time. torch's generator for the
    CPU uses only the last 32 bits of `seed`.

    Raises:
        ValueError: unless `seed` is a whole number, 0 <= `seed` < 2**63.
    """
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ValueError(f"'seed' = {seed!r} must be a whole number from 0 to 2**63 - 1.")
    random.seed(int(seed))
    # Takes all of `seed`; numpy.random.seed stops at 2**32.
    np.random.set_bit_generator(np.random.MT19937(int(seed)))
    torch.manual_seed(int(seed))
    torch.backends.cudnn.deterministic = True
