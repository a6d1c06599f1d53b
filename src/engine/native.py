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
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.checks import check_shape
from src.engine.parts import VotingOutput, apply_thresholds

_SOURCE = Path(__file__).with_suffix(".c")
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

    def __init__(self, form: nn.Module, library: ctypes.CDLL):
        super().__init__()
        self.form, self.library, self.dtype = form, library, form.dtype
        self.thresholds = form.thresholds
        self.widths = [len(form.kernel1), len(form.kernel2)]
        self.scratch = library.scratch_size(self.widths[0])
        kernels = [rows_of(kernel) for kernel in (form.kernel1, form.kernel2)]
        if form.in_integers:
            parameters = [form.layer(number)[1:] for number in (1, 2, 3)[: form.layers]]
            kernels += [form.kernel3.T[None]] if form.layers == 3 else []
        else:
            # Floats have no scales.
            parameters = [(bias.float(),) * 2 for bias in (form.bias1, form.bias2)]
            *self.connected, weight, bias = form.connected
            self.output = VotingOutput(weight, bias)
        lanes = library.lanes()
        tensors = [
            (added_up_in_order(kernel, lanes), *values)
            for kernel, values in zip(kernels, parameters, strict=True)
        ]
        self.kept, self.layers = tensors, [layer_of(*values) for values in tensors]

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(images)
        if self.form.in_integers:
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
        return self.convolve(apply_thresholds(images.float(), self.thresholds).contiguous())

    def convolve(self, images: Tensor) -> Tensor:
        """The same, of images that have passed the ramp, float32 and contiguous."""
        features = images.new_empty((len(images), 49 * self.widths[1]), dtype=self.dtype)
        # Of each call its own, so that threads can share the network.
        scratch = images.new_zeros(self.scratch, dtype=torch.uint8)
        layers = map(ctypes.byref, self.layers[:2])
        batch = images.data_ptr(), len(images)
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


def added_up_in_order(rows: Tensor, lanes: int) -> Tensor:
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
        library.features.argtypes = [pointer, number, layer, layer, pointer, pointer]
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
