"""The convolutions of ConvNN in C, for processors: compiled on first use where there is a compiler.

Most of a certificate's time goes into two small convolutions, which `native.c` runs near the rate
of torch's matrix product (`benchmarks/certification.py`; with CC=none the same through torch
alone). Without a compiler everything works as it does with one, slower.
"""

import ctypes
import functools
import os
import shlex
import signal
import subprocess
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.checks import check_shape
from src.engine.folded import FLOATS, FoldedConvNN, VotingOutput, as_one_call, ramp
from src.engine.quantized import INTEGERS, QuantizedConvNN, is_finite
from src.engine.untouched import is_untouched, unwrapped

_SOURCE = Path(__file__).with_suffix(".c")
# Making one call of a network by TorchScript takes about as long as a few thousand votes.
WORTH_ONE_CALL = 20_000
# A compiler that takes longer hangs; it is not asked again, in whatever precision.
COMPILER_SECONDS = 20
_HUNG: set[str] = set()
_FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC")


class _Layer(ctypes.Structure):
    """The struct layer of `native.c`."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("kernel", "bias", "scale")]
    _fields_ += [("width", ctypes.c_int)]


class NativeConvNN(nn.Module):
    """A form of ConvNN on the CPU whose convolutions are those of `native.c`.

    The same function, in floats up to the order of additions, and NaN where that is NaN; no
    gradients. Python's lock is free while the convolutions run.

    Args:
        form: a FoldedConvNN or QuantizedConvNN.
        library: `compiled` for its precision.
    """

    def __init__(self, form: FoldedConvNN | QuantizedConvNN, library: ctypes.CDLL):
        super().__init__()
        self.form, self.library, self.dtype = form, library, form.dtype
        self.thresholds = form.thresholds
        self.pooled = form.stride == 1
        self.widths = [len(form.kernel1), len(form.kernel2)]
        self.scratch = library.scratch_size(self.pooled, *self.widths)
        kernels = [rows_of(kernel) for kernel in (form.kernel1, form.kernel2)]
        if self.quantized:
            parameters = [form.layer(number)[1:] for number in (1, 2, 3)[: form.layers]]
            kernels += [form.kernel3.T[None]] if form.layers == 3 else []
        else:
            # Floats have no scales.
            parameters = [(bias.float(),) * 2 for bias in (form.bias1, form.bias2)]
            *self.connected, weight, bias = form.connected
            self.output = VotingOutput(weight, bias)
        lanes = library.lanes()
        tensors = [
            (in_order(kernel, lanes), *values)
            for kernel, values in zip(kernels, parameters, strict=True)
        ]
        self.kept, self.layers = tensors, [layer_of(*values) for values in tensors]

    @property
    def quantized(self) -> bool:
        return isinstance(self.form, QuantizedConvNN)

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(images)
        if self.quantized:
            features = self.hidden(features) if self.form.layers == 3 else features
            return self.form.logits(features, images)
        if self.connected:
            features = F.relu_(F.linear(features, *self.connected))
        return self.output(features)

    def features(self, images: Tensor) -> Tensor:
        """What the fully connected layers get, (B, 49 * channels), the channels last."""
        check_shape(images)
        if images.device.type != "cpu":
            raise ValueError(f"'images' are on {images.device}; this form takes them on the CPU.")
        return self.convolve(ramp(images.float(), self.thresholds).contiguous())

    def convolve(self, images: Tensor) -> Tensor:
        """The same, of images that have passed the ramp, float32 and contiguous."""
        features = images.new_empty((len(images), 49 * self.widths[1]), dtype=self.dtype)
        # Of each call its own, so that threads can share the network.
        scratch = images.new_zeros(self.scratch, dtype=torch.uint8)
        layers = map(ctypes.byref, self.layers[:2])
        batch = images.data_ptr(), len(images), self.pooled
        self.library.features(*batch, *layers, scratch.data_ptr(), features.data_ptr())
        return features

    def hidden(self, features: Tensor) -> Tensor:
        """The hidden layer of integer features, float32 (B, width)."""
        if features.element_size() == 1:
            features = F.pad(features, (0, -features.shape[1] % 16))
        layer, (n, inputs) = self.layers[2], features.shape
        out = features.new_empty((n, layer.width), dtype=torch.float32)
        self.library.connected(features.data_ptr(), n, inputs, ctypes.byref(layer), out.data_ptr())
        return out


def layer_of(kernel: Tensor, bias: Tensor, scale: Tensor) -> _Layer:
    """The struct of a layer; the tensors must live as long."""
    pointers = (values.data_ptr() for values in (kernel, bias, scale))
    return _Layer(*pointers, len(bias))


def rows_of(kernel: Tensor) -> Tensor:
    """A kernel (channels, inputs, rows, columns) as (rows, columns * inputs, channels)."""
    return kernel.permute(2, 3, 1, 0).flatten(1, 2)


def in_order(rows: Tensor, lanes: int) -> Tensor:
    """A kernel (rows, numbers, channels) in the order in which `native.c` adds it up.

    (groups, rows, words, channels of a group, numbers of a word), a word being four bytes and a
    group two vectors of channels, or one. Rows are filled up with zeros to whole words, of 8 bits
    to steps of 16 numbers.
    """
    word = 4 // rows.element_size()
    step = 16 if rows.dtype == torch.int8 else word
    group = lanes if rows.shape[2] % (2 * lanes) else 2 * lanes
    rows = F.pad(rows, (0, 0, 0, -rows.shape[1] % step))
    words = rows.unflatten(1, (-1, word)).transpose(2, 3)
    return words.unflatten(2, (-1, group)).movedim(2, 0).contiguous()


def voting_form(network: nn.Module, precision: str, *, often: bool = True) -> nn.Module:
    """The form of a ConvNN that casts votes fastest where it is: the same function of images.

    Args:
        network: a ConvNN.
        precision: one of PRECISIONS.
        often: it will cast enough votes to make up for the time that preparing it takes.
    """
    form = network.inference_form(precision)
    # Not a matter of `often`: an image's votes must be the same whatever else is asked.
    library = _library(network, precision)
    if library:
        return NativeConvNN(form, library).eval()
    if precision in INTEGERS:
        warnings.warn(f"{precision!r} goes through float64 here, which is slow.", stacklevel=2)
        return form
    on_cpu = network.output.weight.device.type == "cpu"
    return as_one_call(form) if often and on_cpu else form


def _library(network: nn.Module, precision: str) -> ctypes.CDLL | None:
    """The compiled library for a network that is on the CPU and whose layers fill the vectors.

    None for another, and where torch has faster units for a precision than these vectors.
    """
    library = compiled(precision) if network.output.weight.device.type == "cpu" else None
    if library is None or (precision == "bfloat16" and library.matrix_units()):
        return None
    widths = [network.conv1.out_channels, network.conv2.out_channels]
    if precision in INTEGERS and network.hidden is not None:
        widths.append(network.hidden.out_features)
    return None if any(width % library.lanes() for width in widths) else library


def form_name(network: nn.Module, precision: str) -> str:
    """What votes in place of a ConvNN, in words, for the records."""
    network = unwrapped(network)
    if not is_untouched(network):
        return "its own forward pass"
    native = isinstance(voting_form(network, precision, often=False), NativeConvNN)
    return "batch normalisation folded" + (", convolutions in C" if native else "")


@functools.cache
def compiled(precision: str, *flags: str) -> ctypes.CDLL | None:
    """The library of `native.c` for a precision, made by the compiler `cc` (or CC).

    None where there is none. It takes a second or less, once a process. CC=none does without.
    """
    if precision != "float32":
        flags += (f"-D{precision.upper()}",)
    compiler = os.environ.get("CC", "cc")
    if compiler in _HUNG:
        return None
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            target = Path(folder) / "native.so"
            command = shlex.split(compiler)
            _run([*command, *_FLAGS, *flags, str(_SOURCE), "-o", str(target)])
            library = ctypes.CDLL(str(target))
        pointer, layer, number = ctypes.c_void_p, ctypes.POINTER(_Layer), ctypes.c_int
        library.scratch_size.restype = ctypes.c_size_t
        library.features.argtypes = [pointer, number, number, layer, layer, pointer, pointer]
        library.connected.argtypes = [pointer, number, number, layer, pointer]
        library.features.restype = library.connected.restype = None
        if precision == "float32":
            library.gradients_scratch_size.restype = ctypes.c_size_t
            library.gradients.argtypes = [pointer, number, number, layer, layer, layer]
            library.gradients.argtypes += [pointer] * 4
            library.gradients.restype = None
    except subprocess.TimeoutExpired:
        _HUNG.add(compiler)
        return None
    except (OSError, ValueError, AttributeError, subprocess.SubprocessError):
        # No compiler, or one that does not make this library of C.
        return None
    return library


def _run(command: list[str]) -> None:
    """Run a command; if it fails or takes COMPILER_SECONDS, an error, and no child is left."""
    quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    # In a session of its own, so that what it started can be ended with it.
    with subprocess.Popen(command, **quiet, start_new_session=True) as process:
        try:
            status = process.wait(COMPILER_SECONDS)
        except BaseException:
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            raise
    if status:
        raise subprocess.CalledProcessError(status, command)


def fastest_precision(
    network: nn.Module, *others: nn.Module, seconds: float = 0.05, margin: float = 1.15
) -> str:
    """The precision in which `network` evaluates fastest where it is, measured.

    bfloat16 is several times as fast on processors and GPUs with units for it and many times
    slower on others, where integers are ahead of float32 if there is a compiler. Short turns, of
    which the fastest counts, and `margin` make it likely that another call answers the same.

    Args:
        network: a ConvNN on the device to measure.
        others: that are to vote in the same precision: integers only if all of them can in C.
        seconds: to spend on each precision, about.
        margin: each, in the order of PRECISIONS, must be so many times as fast as the one chosen so
            far to be chosen.
    """
    network, *others = map(unwrapped, (network, *others))
    if not all(map(is_untouched, (network, *others))):
        # Only their own forward pass can vote.
        return "float32"
    images = next(network.parameters()).new_zeros(128, 1, 28, 28)
    forms = {name: voting_form(network, name, often=False) for name in FLOATS}
    for name in INTEGERS:
        if all(_library(each, name) and is_finite(each) for each in (network, *others)):
            forms[name] = voting_form(network, name, often=False)
    threads, turns = torch.get_num_threads(), 5
    rates = dict.fromkeys(forms, 0.0)
    try:
        # As they will vote: each on a core of its own.
        torch.set_num_threads(1)
        for _ in range(turns):
            for name, form in forms.items():
                rates[name] = max(rates[name], _rate(form, images, seconds / turns))
    finally:
        torch.set_num_threads(threads)
    best = "float32"
    for name, rate in rates.items():
        best = name if rate > margin * rates[best] else best
    return best


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
