"""The form of ConvNN that is attacked fastest on a processor: its gradients by the images in C."""

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from src.engine.native import NativeConvNN, added_up_in_order, layer_of, rows_of


class AttackedConvNN(NativeConvNN):
    """A NativeConvNN that passes gradients to the images, and works with all of torch's threads.

    What comes out for an image depends neither on its batch nor on the number of threads, up to
    the fully connected layers, which are torch's.

    Args:
        form: a FoldedConvNN in float32.
        library: `compiled` for float32.
    """

    def __init__(self, form: nn.Module, library: ctypes.CDLL):
        super().__init__(form, library)
        # In the order in which the flipped kernel meets the places of a 2x2 square.
        flipped = form.kernel2.flip(2, 3).transpose(0, 1)
        kernels = [flipped[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1)]
        lanes = library.lanes()
        kernels += [F.pad(form.reverse1, (0,) * 7 + (lanes - len(form.reverse1),))]
        nothing = torch.zeros(max(lanes, *self.widths))
        tensors = [(added_up_in_order(rows_of(k), lanes), nothing[: len(k)]) for k in kernels]
        layers = [layer_of(kernel, zeros, zeros) for kernel, zeros in tensors]
        self.kept_back = tensors
        self.back2, self.back1 = (type(layers[0]) * 4)(*layers[:4]), layers[4]
        self.back_scratch = library.gradients_scratch_size(*self.widths)

    def convolve(self, images: Tensor) -> Tensor:
        return _Convolutions.apply(images, self)

    def gradients(self, images: Tensor, features: Tensor, slope: Tensor) -> Tensor:
        """Gradients by the images (B, 1, 28, 28), given those by the features, both (B, ...)."""
        out, scratch = torch.empty_like(images), images.new_zeros(self.back_scratch // 4)
        self.library.gradients(
            images.data_ptr(),
            len(images),
            self.widths[1],
            ctypes.byref(self.layers[0]),
            self.back2,
            ctypes.byref(self.back1),
            *(values.data_ptr() for values in (features, slope, scratch, out)),
        )
        return out


class _Convolutions(torch.autograd.Function):
    """Images (B, 1, 28, 28) -> features (B, 49 * channels) of an AttackedConvNN."""

    @staticmethod
    def forward(ctx, images, form):
        features = _shared(super(AttackedConvNN, form).convolve, images)
        ctx.save_for_backward(images, features)
        ctx.form = form
        return features

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        images, features = ctx.saved_tensors
        return _shared(ctx.form.gradients, images, features, slope.contiguous()), None


def _shared(task, *batch: Tensor) -> Tensor:
    """`task` on parts of the batch, one for each of torch's threads; C lets go of Python's lock."""
    threads = torch.get_num_threads()
    if threads == 1 or len(batch[0]) < 2 * threads:
        return task(*batch)
    parts = zip(*(tensor.chunk(threads) for tensor in batch), strict=True)
    return torch.cat(list(_pool(threads).map(lambda part: task(*part), parts)))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)
