"""The convolutions of ConvNN in C, in float32 on CPUs, and how C is compiled on first use.

Most of the time of an attack goes into two small convolutions. `native.c` runs them nearly as fast
as torch runs a product of matrices (`benchmarks/attacks.py`; the environment variable CC=none
measures torch alone). Without a compiler everything works the same, but slower.
"""

import ctypes
import functools
import os
import shlex
import signal
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.checks import check_shape
from src.engine.parts import VotingOutput, apply_thresholds

_FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC")
# A compiler that takes longer hangs. It is not asked again. Without vector instructions `exact.c`
# takes 4 seconds, and several times that on a busy machine.
COMPILER_SECONDS = 60
_HANGING_COMPILERS: set[str] = set()


class Layer(ctypes.Structure):
    """The struct layer of `native.c`.

    Args:
        kernel: (channels, inputs, rows, columns), float32.
        bias: (channels,), float32.
        lanes: numbers per vector; divides the channels.
    """

    _fields_ = [("kernel", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("width", ctypes.c_int)]

    def __init__(self, kernel: Tensor, bias: Tensor, lanes: int):
        # The order in which `native.c` reads it: (groups, rows, columns, inputs, channels per
        # group). A group is two vectors of channels, or one if their number is odd.
        group = lanes if len(kernel) % (2 * lanes) else 2 * lanes
        kernel = kernel.permute(2, 3, 1, 0).unflatten(3, (-1, group)).movedim(3, 0).contiguous()
        # The pointers are valid only as long as the tensors live.
        self.tensors = kernel, bias
        super().__init__(kernel.data_ptr(), bias.data_ptr(), len(bias))


class NativeConvNN(nn.Module):
    """A form of ConvNN on the CPU whose convolutions are those of `native.c`.

    It is the same function as the form it is made from, up to the order of additions. It has no
    gradients. Other Python threads run while the convolutions do.

    Args:
        form: a FoldedConvNN in float32.
        library: `float_library`.
    """

    def __init__(self, form: nn.Module, library: ctypes.CDLL):
        super().__init__()
        self.form, self.library, self.thresholds = form, library, form.thresholds
        self.widths = [len(form.kernel1), len(form.kernel2)]
        self.scratch_size = library.scratch_size(self.widths[0])
        *self.connected, weight, bias = form.connected
        self.output = VotingOutput(weight, bias)
        layers = (form.kernel1, form.bias1), (form.kernel2, form.bias2)
        self.layers = [Layer(*tensors, library.lanes()) for tensors in layers]

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(images)
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
        features = images.new_empty((len(images), 49 * self.widths[1]))
        # New for every call, so that threads can share the network.
        scratch = images.new_zeros(self.scratch_size, dtype=torch.uint8)
        layers = map(ctypes.byref, self.layers)
        batch = images.data_ptr(), len(images)
        self.library.features(*batch, *layers, scratch.data_ptr(), features.data_ptr())
        return features


@functools.cache
def float_library(*flags: str) -> ctypes.CDLL | None:
    """`native.c`, compiled; None as for `compiled`."""
    library = compiled("native.c", *flags)
    if library is not None:
        pointer, layer, number = ctypes.c_void_p, ctypes.POINTER(Layer), ctypes.c_int
        library.scratch_size.restype = library.gradients_scratch_size.restype = ctypes.c_size_t
        library.features.argtypes = [pointer, number, layer, layer, pointer, pointer]
        library.gradients.argtypes = [pointer, number, number, *[layer] * 3, *[pointer] * 4]
    return library


def compiled(source: str, *flags: str) -> ctypes.CDLL | None:
    """A C file, by its path from this folder, as a library compiled by `cc` or what CC names.

    It takes about a second. None without a compiler that can make it; CC=none asks for none.
    """
    compiler = os.environ.get("CC", "cc")
    if compiler in _HANGING_COMPILERS:
        return None
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            target = Path(folder) / "native.so"
            command = [*shlex.split(compiler), *_FLAGS, *flags]
            _run([*command, str(Path(__file__).parent / source), "-o", str(target)])
            return ctypes.CDLL(str(target))
    except subprocess.TimeoutExpired:
        _HANGING_COMPILERS.add(compiler)
        warnings.warn(
            f"The compiler {compiler} took more than {COMPILER_SECONDS} s, so everything goes "
            "through torch, which is slow: choose another one with the environment variable CC.",
            stacklevel=3,
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        # There is no compiler, or it cannot make this library.
        pass
    return None


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
