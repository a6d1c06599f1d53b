"""The noise and the votes of an ExactConvNN in C, for CPUs: the same bits as in torch, faster."""

import ctypes
import functools
import hashlib
import warnings
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from src.checks import check_shape
from src.engine.lattice import LEVELS, law, limit
from src.engine.native import compiled

LIMIT = limit()
# Widths in `exact.c` are multiples of this; channels that are filled up have weights 0.
STEP = 16
# The noise is drawn for so many pixels at once.
GROUP = 64
# SHA-256 of the right `_answers`.
ANSWERS = "c5001151bb3396c542dcd4fe01cf1b59fd11f16b58d0cb2dade45fb29469b11a"


class _Law(ctypes.Structure):
    _fields_ = [("entries", ctypes.c_void_p), ("lower", ctypes.c_void_p)]
    _fields_ += [("bits", ctypes.c_int32), ("lowest", ctypes.c_int32)]


class _Draw(ctypes.Structure):
    _fields_ = [("seed", ctypes.c_uint64), ("image", ctypes.c_uint32), ("stage", ctypes.c_uint32)]


class _Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("kernel", "bias", "scale")]
    _fields_ += [("width", ctypes.c_int32)]


class _Network(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("low", "high", "factor", "shift", "zero")]
    _fields_ += [(name, _Layer) for name in ("first", "second", "hidden", "output")]
    _fields_ += [("classes", ctypes.c_int32), ("multiplier", ctypes.c_int32)]


@functools.cache
def exact_library(*flags: str) -> ctypes.CDLL | None:
    """`exact.c`, compiled and tested; None without a compiler that makes it right."""
    # Products and sums must not be contracted: that rounds once instead of twice.
    library = compiled("exact.c", "-ffp-contract=off", *flags)
    if library is None:
        return None
    pointer, number, unsigned = ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint32
    copies = [pointer, pointer, unsigned, unsigned]
    library.noisy.argtypes = [pointer, unsigned, number, *copies, pointer]
    networks = [pointer, number]
    library.scratch_size.argtypes, library.scratch_size.restype = networks, ctypes.c_size_t
    library.forward.argtypes = [pointer, number, *networks, pointer, pointer]
    library.votes.argtypes = [pointer, *copies, *networks, pointer, pointer]
    # Whatever device the caller has made the default.
    with torch.device("cpu"):
        right = _answers(library) == ANSWERS
    if right:
        return library
    warnings.warn(
        "The compiled exact.c gives wrong answers here, so exact votes go through torch, which is "
        "slow: choose another compiler with the environment variable CC.",
        stacklevel=2,
    )
    return None


def draw_copies(
    library: ctypes.CDLL, steps: Tensor, noise, stage: int, first: int, count: int
) -> Tensor:
    """What `Noise.copies` returns, with the number of the stage."""
    out = steps.new_empty((count, *steps.shape), dtype=torch.int32)
    image, copies = _filled_up(steps), _copies(noise, stage)
    cut = limit(noise.levels)
    library.noisy(image.data_ptr(), steps.numel(), cut, *copies, first, count, out.data_ptr())
    return out


class NativeExact:
    """An ExactConvNN or ExactEnsemble on the CPU in the order in which `exact.c` reads its numbers.

    Its methods may run in several threads at once; other Python threads run meanwhile.
    """

    def __init__(self, form, library: ctypes.CDLL):
        self.library, self.classes, self.tensors = library, form.num_classes, []
        members, multipliers = getattr(form, "members", [form]), getattr(form, "multipliers", [1])
        members = list(map(self._member, members, multipliers))
        # The output, filled up.
        self.width = members[0].output.width
        self.networks = (_Network * len(members))(*members)
        self.scratch_size = library.scratch_size(self.networks, len(members))

    def _member(self, form, multiplier: int) -> _Network:
        """An ExactConvNN as C reads it."""
        layers, width = [], 1
        for number in range(1, form.layers + 1):
            kernel, bias, *scale = form.layer(number)
            if number == 1:
                # Here bytes count from `zero`, and a row of five pixels is filled up to eight.
                bias = bias - form.pixels[-1] * kernel.sum((1, 2), dtype=torch.int32)
                kernel = F.pad(kernel.unflatten(1, (5, 5)), (0, 0, 0, 3)).flatten(1, 2)
            kernel, fill = _in_reading_order(kernel, width, self.library.lanes()), -len(bias) % STEP
            # The output has no scale, and none is read; its biases will do.
            values = [kernel, *(F.pad(v, (0, fill)) for v in (bias, *(scale or [bias])))]
            width = len(bias) + fill
            layers.append(_Layer(*(tensor.data_ptr() for tensor in values), width))
            # The pointers are valid only as long as the tensors live.
            self.tensors += values
        hidden = layers[2] if len(layers) == 4 else _Layer()
        return _Network(
            *form.pixels, layers[0], layers[1], hidden, layers[-1], self.classes, multiplier
        )

    def logits(self, steps: Tensor) -> Tensor:
        """Whole logits, int64 (B, num_classes), of images (B, 1, 28, 28) in whole steps."""
        check_shape(steps)
        steps = steps.clamp(-LIMIT, LIMIT).int().contiguous()
        out = steps.new_empty((len(steps), self.width), dtype=torch.int64)
        self.library.forward(steps.data_ptr(), len(steps), *self._networks(), out.data_ptr())
        return out[:, : self.classes]

    def votes(self, steps: Tensor, noise, stage: int, first: int, count: int) -> np.ndarray:
        """Votes, int64 (num_classes,), on the copies of (1, 28, 28) that `draw_copies` returns."""
        # C reads so many pixels, whatever is there.
        check_shape(steps[None])
        counts, image = np.zeros(self.classes, np.int64), _filled_up(steps)
        copies = *_copies(noise, stage), first, count
        self.library.votes(image.data_ptr(), *copies, *self._networks(), counts.ctypes.data)
        return counts

    def _networks(self) -> tuple:
        """The networks, their number, and scratch memory, which is new for every call."""
        scratch = np.empty(self.scratch_size, np.uint8)
        return self.networks, len(self.networks), scratch.ctypes.data_as(ctypes.c_void_p)


def _copies(noise, stage: int) -> tuple:
    """Which noise, as C reads it."""
    table = law(noise.sigma, noise.levels)
    pointers = table.entries.ctypes.data, table.lower.ctypes.data
    of = _Law(*pointers, table.bits, table.lowest)
    # The pointers are valid only as long as the arrays live.
    of.table = table
    return ctypes.byref(_Draw(noise.seed, noise.index, stage)), ctypes.byref(of)


def _filled_up(steps: Tensor) -> Tensor:
    """The pixels of an image, int32, filled up to whole groups."""
    return F.pad(steps.int().flatten(), (0, -steps.numel() % GROUP)).contiguous()


def _in_reading_order(kernel: Tensor, width: int, lanes: int) -> Tensor:
    """A kernel (C, places, inputs) as `exact.c` reads it.

    That is (vectors of channels, words, lanes, numbers per word). A word is four bytes. The inputs
    of a place are filled up with zeros to `width`.
    """
    rows = F.pad(kernel, (0, width - kernel.shape[2])).flatten(1)
    rows = F.pad(rows, (0, 0, 0, -len(rows) % STEP))
    words = rows.unflatten(1, (-1, 4 // rows.element_size())).unflatten(0, (-1, lanes))
    return words.transpose(1, 2).contiguous()


def _answers(library: ctypes.CDLL) -> str:
    """SHA-256 of noise and logits that no right library can get wrong by chance."""
    noise = SimpleNamespace(seed=2**63 + 5, index=2**31 + 7, sigma=0.25, levels=LEVELS)
    steps = (torch.arange(28 * 28, dtype=torch.int32) * 37 % 256).view(1, 28, 28)
    # A number of copy 2787 stands exactly at its threshold, so it takes 64 bits.
    copies = [draw_copies(library, steps, noise, 1, first, 20) for first in (2780, 2**32 - 20)]
    images = torch.cat(copies)
    digest = hashlib.sha256(images.numpy().tobytes())
    for hidden in (None, 16):
        network = NativeExact(_made_up_network(hidden), library)
        digest.update(network.logits(images).int().numpy().tobytes())
        digest.update(network.votes(steps, noise, 1, 0, 100).tobytes())
    return digest.hexdigest()


def _made_up_network(hidden: int | None) -> SimpleNamespace:
    """A network of 16-32 channels whose numbers are made of whole numbers alone."""

    def numbers(*shape, most: int) -> Tensor:
        values = torch.arange(int(np.prod(shape))) * 2654435761 % 2**32
        return ((values >> 16) % (2 * most + 1) - most).view(shape)

    shapes = [(16, 25, 1), (32, 25, 16), *([(hidden, 49, 32)] if hidden else [])]
    scales = [2.0**-7, 2.0**-8 if hidden else 2.0**-4, 2.0**-2]
    layers = [
        (
            numbers(*shape, most=24).to(torch.int8),
            numbers(shape[0], most=999).int(),
            torch.full(shape[:1], scale, dtype=torch.float32),
        )
        for shape, scale in zip(shapes, scales, strict=False)
    ]
    kernel = numbers(3, 1 if hidden else 49, hidden or 32, most=999).to(torch.int16)
    layers.append((kernel, numbers(3, most=999).int()))
    pixels = -LIMIT, LIMIT, 2**13, (128 << 16) + 2**15, 128
    return SimpleNamespace(
        layers=len(layers), layer=lambda n: layers[n - 1], num_classes=3, pixels=pixels
    )
