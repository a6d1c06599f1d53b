"""The convolutions of ConvNN in C, for CPUs: compiled on first use where there is a compiler.

Most of the time of a certificate goes into two small convolutions. `native.c` runs them nearly as
fast as torch runs a product of matrices (`benchmarks/certification.py`; the environment variable
CC=none measures torch alone). Without a compiler everything works the same, but slower.
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
_FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC")
# A compiler that takes longer hangs. It is not asked again, in any precision.
COMPILER_SECONDS = 20
_HANGING_COMPILERS: set[str] = set()


class Layer(ctypes.Structure):
    """The struct layer of `native.c`.

    Args:
        kernel: (channels, inputs, rows, columns) or (channels, inputs).
        bias, scale: (channels,), float32; floats have no scale, and any vector will do.
        lanes: numbers per vector; divides the channels.
    """

    _fields_ = [(name, ctypes.c_void_p) for name in ("kernel", "bias", "scale")]
    _fields_ += [("width", ctypes.c_int)]

    def __init__(self, kernel: Tensor, bias: Tensor, scale: Tensor, lanes: int):
        # The pointers are valid only as long as the tensors live.
        self.tensors = _in_reading_order(kernel, lanes), bias, scale
        super().__init__(*(tensor.data_ptr() for tensor in self.tensors), len(bias))


def _in_reading_order(kernel: Tensor, lanes: int) -> Tensor:
    """The kernel of a Layer in the order in which `native.c` reads it.

    That is (groups, rows, words, channels per group, numbers per word). A word is four bytes; a
    group is two vectors of channels, or one if their number is odd. Rows are filled up with zeros
    to whole words, and those of 8 bits to steps of 16 numbers.
    """
    if kernel.dim() == 2:
        kernel = kernel[:, :, None, None]
    rows = kernel.permute(2, 3, 1, 0).flatten(1, 2)
    word = 4 // rows.element_size()
    step = 16 if rows.dtype == torch.int8 else word
    group = lanes if rows.shape[2] % (2 * lanes) else 2 * lanes
    rows = F.pad(rows, (0, 0, 0, -rows.shape[1] % step))
    words = rows.unflatten(1, (-1, word)).transpose(2, 3)
    return words.unflatten(2, (-1, group)).movedim(2, 0).contiguous()


class NativeConvNN(nn.Module):
    """A form of ConvNN on the CPU whose convolutions are those of `native.c`.

    It is the same function as the form it is made from: to the bit in integers, up to the order of
    additions in floats. It has no gradients. Other Python threads run while the convolutions do.

    Args:
        form: a FoldedConvNN or QuantizedConvNN.
        library: `compiled` for its precision.
    """

    def __init__(self, form: nn.Module, library: ctypes.CDLL):
        super().__init__()
        self.form, self.library, self.dtype = form, library, form.dtype
        self.thresholds = form.thresholds
        self.widths = [len(form.kernel1), len(form.kernel2)]
        self.scratch_size = library.scratch_size(self.widths[0])
        if form.in_integers:
            layers = [form.layer(number) for number in range(1, form.layers + 1)]
        else:
            layers = [(form.kernel1, form.bias1.float()), (form.kernel2, form.bias2.float())]
            # The bias again, where integers have a scale.
            layers = [(kernel, bias, bias) for kernel, bias in layers]
            *self.connected, weight, bias = form.connected
            self.output = VotingOutput(weight, bias)
        self.layers = [Layer(*tensors, library.lanes()) for tensors in layers]

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(images)
        if self.form.in_integers:
            features = self.hidden(features) if self.form.layers == 3 else features
            return self.form.logits(features, images)
        if self.connected:
            features = F.relu_(F.linear(features, *self.connected))
        return self.output(features)

    def features(self, images: Tensor) -> Tensor:
        """Inputs of the first fully connected layer, (B, 49 * channels), the channels last."""
        check_shape(images)
        if images.device.type != "cpu":
            raise ValueError(f"'images' are on {images.device}; this form takes them on the CPU.")
        return self.convolve(apply_thresholds(images.float(), self.thresholds).contiguous())

    def convolve(self, images: Tensor) -> Tensor:
        """Features of images whose thresholds were applied, float32 and contiguous."""
        features = images.new_empty((len(images), 49 * self.widths[1]), dtype=self.dtype)
        # New for every call, so that threads can share the network.
        scratch = images.new_zeros(self.scratch_size, dtype=torch.uint8)
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


@functools.cache
def compiled(precision: str, *flags: str) -> ctypes.CDLL | None:
    """The library of `native.c` for a precision, compiled by `cc` or what CC names.

    It takes about a second, once per process. None without a compiler that can make it; CC=none
    asks for none.
    """
    if precision != "float32":
        flags += (f"-D{precision.upper()}",)
    compiler = os.environ.get("CC", "cc")
    if compiler in _HANGING_COMPILERS:
        return None
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            target = Path(folder) / "native.so"
            command = shlex.split(compiler)
            _run([*command, *_FLAGS, *flags, str(_SOURCE), "-o", str(target)])
            library = ctypes.CDLL(str(target))
        pointer, layer, number = ctypes.c_void_p, ctypes.POINTER(Layer), ctypes.c_int
        library.scratch_size.restype = ctypes.c_size_t
        library.features.argtypes = [pointer, number, layer, layer, pointer, pointer]
        library.connected.argtypes = [pointer, number, number, layer, pointer]
        if precision == "float32":
            library.gradients_scratch_size.restype = ctypes.c_size_t
            library.gradients.argtypes = [pointer, number, number, *[layer] * 3, *[pointer] * 4]
    except subprocess.TimeoutExpired:
        _HANGING_COMPILERS.add(compiler)
        return None
    except (OSError, ValueError, AttributeError, subprocess.SubprocessError):
        # There is no compiler, or it cannot make this library.
        return None
    return library


def _run(command: list[str]) -> None:
    """Run a command; raise if it fails or takes COMPILER_SECONDS, and leave no child behind."""
    quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    # In a session of its own, so that the processes it started can be ended with it.
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
