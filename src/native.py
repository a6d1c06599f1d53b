"""The convolutions of ConvNN in C, for processors: compiled on first use where there is a compiler.

Most of a certificate's time goes into two small convolutions, which `native.c` runs near the rate
of torch's matrix product (`benchmarks/certification.py`; with CC=none the same through torch
alone). Without a compiler everything works as it does with one, slower.
"""

import ctypes
import functools
import os
import shlex
import subprocess
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.checks import check_shape
from src.folded import PRECISIONS, FoldedConvNN, as_one_call, ramp

_SOURCE = Path(__file__).with_suffix(".c")
# Making one call of a network by TorchScript takes about as long as a few thousand votes.
WORTH_ONE_CALL = 20_000
_FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC")


class NativeConvNN(nn.Module):
    """A folded ConvNN on the CPU whose convolutions are those of `native.c`.

    The same function up to the order of additions, and NaN where that is NaN; no gradients.
    Python's lock is free while the convolutions run.

    Args:
        folded: the network.
        library: `compiled` for the precision of the network.
    """

    def __init__(self, folded: FoldedConvNN, library: ctypes.CDLL):
        super().__init__()
        self.folded, self.library = folded, library
        self.pooled = folded.stride == 1
        self.channels = [len(folded.kernel1), len(folded.kernel2)]
        self.kernels = [_in_order(kernel) for kernel in (folded.kernel1, folded.kernel2)]
        self.biases = [bias.float() for bias in (folded.bias1, folded.bias2)]
        self.scratch = library.scratch_size(self.pooled, *self.channels)
        # With a few empty classes more the product of matrices is nearly twice as fast.
        *self.hidden, weight, bias = folded.connected
        self.classes = len(bias)
        empty = -self.classes % 16
        self.output = (F.pad(weight, (0, 0, 0, empty)), F.pad(bias, (0, empty)))

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(images)
        if self.hidden:
            features = F.relu_(F.linear(features, *self.hidden))
        with torch.autocast("cpu", enabled=False):
            return F.linear(features.float(), *self.output)[:, : self.classes]

    def features(self, images: Tensor) -> Tensor:
        """What the fully connected layers get, (B, 49 * channels), the channels last."""
        check_shape(images)
        images = ramp(images.float(), self.folded.thresholds).contiguous()
        shape = len(images), 49 * self.channels[1]
        features = images.new_empty(shape, dtype=self.folded.dtype)
        # Of each call its own, so that threads can share the network.
        scratch = images.new_zeros(self.scratch, dtype=torch.uint8)
        first, second = (
            (kernel.data_ptr(), bias.data_ptr(), count)
            for kernel, bias, count in zip(self.kernels, self.biases, self.channels, strict=True)
        )
        batch = (images.data_ptr(), len(images), self.pooled)
        self.library.features(*batch, *first, *second, scratch.data_ptr(), features.data_ptr())
        return features


def _in_order(kernel: Tensor) -> Tensor:
    """A kernel (channels, inputs, 5, 5) in the order in which `native.c` adds it up.

    float32: (5, 5 * inputs, channels). bfloat16: (5, pairs, channels, 2), where the 5 * inputs
    numbers of a row are filled up with a zero if they are odd.
    """
    rows = kernel.permute(2, 3, 1, 0).flatten(1, 2)
    if kernel.dtype == torch.float32:
        return rows.contiguous()
    rows = F.pad(rows, (0, 0, 0, rows.shape[1] % 2))
    return rows.unflatten(1, (-1, 2)).transpose(2, 3).contiguous()


def voting_form(network: nn.Module, precision: str, *, often: bool = True) -> nn.Module:
    """The form of a ConvNN that casts votes fastest where it is: the same function of images.

    Args:
        network: a ConvNN.
        precision: "float32" or "bfloat16".
        often: it will cast enough votes to make up for the time that preparing it takes.
    """
    folded = network.inference_form(precision)
    if folded.kernel1.device.type != "cpu":
        return folded
    # Not a matter of `often`: an image's votes must be the same whatever else is asked.
    library = compiled(precision)
    if library and _suits(library, folded):
        return NativeConvNN(folded, library).eval()
    return as_one_call(folded) if often else folded


def _suits(library: ctypes.CDLL, folded: FoldedConvNN) -> bool:
    """Whether the channels fill the vectors, and torch has no faster units than these."""
    if folded.dtype == torch.bfloat16 and library.matrix_units():
        return False
    return not any(len(k) % library.lanes() for k in (folded.kernel1, folded.kernel2))


def form_name(network: nn.Module, precision: str) -> str:
    """What `voting_form` makes of a ConvNN, in words, for the records."""
    native = isinstance(voting_form(network, precision, often=False), NativeConvNN)
    return "batch normalisation folded" + (", convolutions in C" if native else "")


@functools.cache
def compiled(precision: str, *flags: str) -> ctypes.CDLL | None:
    """The library of `native.c` for a precision, made by the compiler `cc` (or CC).

    None where there is none. It takes half a second, once a process. CC=none does without.
    """
    if precision == "bfloat16":
        flags += ("-DBFLOAT16",)
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            target = Path(folder) / "native.so"
            command = shlex.split(os.environ.get("CC", "cc"))
            command += [*_FLAGS, *flags, str(_SOURCE), "-o", str(target)]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            library = ctypes.CDLL(str(target))
        pointer, layer = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
        batch = [pointer, ctypes.c_int, ctypes.c_int]
        library.scratch_size.restype = ctypes.c_size_t
        library.features.restype = None
        library.features.argtypes = [*batch, *layer, *layer, pointer, pointer]
    except (OSError, ValueError, AttributeError, subprocess.SubprocessError):
        # No compiler, or one that does not make this library of C.
        return None
    return library


def fastest_precision(network: nn.Module, *, seconds: float = 0.05, margin: float = 1.15) -> str:
    """The precision in which `network` evaluates fastest where it is, measured.

    bfloat16 is several times as fast on processors and GPUs with units for it, and many times
    slower on others; nothing in between was met, so `margin` keeps the answer the same from call
    to call.

    Args:
        network: a ConvNN on the device to measure.
        seconds: to spend on each precision, about.
        margin: bfloat16 must be so many times as fast as float32 to be chosen.
    """
    images = next(network.parameters()).new_zeros(128, 1, 28, 28)
    forms = {name: voting_form(network, name, often=False) for name in PRECISIONS}
    threads = torch.get_num_threads()
    try:
        # As they will vote: each on a core of its own.
        torch.set_num_threads(1)
        rates = {name: _rate(form, images, seconds) for name, form in forms.items()}
    finally:
        torch.set_num_threads(threads)
    return "bfloat16" if rates["bfloat16"] > margin * rates["float32"] else "float32"


@torch.no_grad()
def _rate(network: nn.Module, images: Tensor, seconds: float) -> float:
    """Batches a second, the first call not counted."""

    def call() -> None:
        # Reading a value waits for a GPU.
        network(images)[0, 0].item()

    call()
    calls, start = 0, time.perf_counter()
    while not calls or time.perf_counter() - start < seconds:
        call()
        calls += 1
    return calls / (time.perf_counter() - start)
