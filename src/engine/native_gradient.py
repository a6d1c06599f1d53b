"""The form of ConvNN that is attacked fastest on a CPU: gradients of the images in C."""

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from src.engine.native import Layer, NativeConvNN


class AttackedConvNN(NativeConvNN):
    """A NativeConvNN that passes gradients to the images and uses all of torch's threads.

    The result for an image does not depend on its batch or on the number of threads, except in
    the fully connected layers, which are torch's.

    Args:
        form: a FoldedConvNN in float32.
        library: `float_library`.
    """

    def __init__(self, form: nn.Module, library: ctypes.CDLL):
        super().__init__(form, library)
        # In the order in which the flipped kernel meets the places of a 2x2 square.
        flipped = form.kernel2.flip(2, 3).transpose(0, 1)
        kernels = [flipped[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1)]
        lanes = library.lanes()
        kernels += [F.pad(form.reverse1, (0,) * 7 + (lanes - len(form.reverse1),))]
        zeros = torch.zeros(max(lanes, *self.widths))
        *self.back2, self.back1 = (Layer(k, zeros[: len(k)], lanes) for k in kernels)
        self.back_scratch_size = library.gradients_scratch_size(*self.widths)

    def convolve(self, images: Tensor) -> Tensor:
        """Features (B, 49 * channels) of images, with gradients back to them."""
        return _Convolutions.apply(images, self)

    def gradients(self, images: Tensor, features: Tensor, slope: Tensor) -> Tensor:
        """Gradients (B, 1, 28, 28) with respect to the images, from `slope`, those of the features.

        `features` and `slope` are (B, 49 * channels).
        """
        out, scratch = torch.empty_like(images), images.new_zeros(self.back_scratch_size // 4)
        first, back1 = ctypes.byref(self.layers[0]), ctypes.byref(self.back1)
        layers = first, (Layer * 4)(*self.back2), back1
        tensors = (tensor.data_ptr() for tensor in (features, slope, scratch, out))
        self.library.gradients(images.data_ptr(), len(images), self.widths[1], *layers, *tensors)
        return out


class _Convolutions(torch.autograd.Function):
    """Images (B, 1, 28, 28) -> features (B, 49 * channels) of an AttackedConvNN."""

    @staticmethod
    def forward(ctx, images, form):
        features = _in_parallel(super(AttackedConvNN, form).convolve, images)
        ctx.save_for_backward(images, features)
        ctx.form = form
        return features

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        images, features = ctx.saved_tensors
        return _in_parallel(ctx.form.gradients, images, features, slope.contiguous()), None


def _in_parallel(task, *batch: Tensor) -> Tensor:
    """`task` on parts of the batch, one per thread of torch; C code runs outside Python's lock."""
    threads = torch.get_num_threads()
    if threads == 1 or len(batch[0]) < 2 * threads:
        return task(*batch)
    parts = zip(*(tensor.chunk(threads) for tensor in batch), strict=True)
    return torch.cat(list(_pool(threads).map(lambda part: task(*part), parts)))


_pool = functools.cache(ThreadPoolExecutor)
