"""Work of a GPU that is recorded once and then replayed, without Python in between."""

from collections.abc import Callable

import torch
from torch import Tensor

# Calls that run as they are before the one that is recorded: libraries set themselves up in them.
_WARM_UP = 3


class Recorded:
    """A function of CUDA tensors, from its fourth call on as one CUDA graph.

    One update of a small network is several hundred kernels of a few microseconds each, which
    Python launches more slowly than the GPU runs them; a replay launches all at once.

    Args:
        function: tensors -> tensor. It must do the same work each time, with tensors of the same
            shapes, and never wait for the GPU (no `item`, no `if` about a tensor's values). What it
            leaves elsewhere, in gradients or running statistics, the replay writes to the same
            memory. Noise from torch's generator of the GPU is new in each call.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self.function = function
        self.calls = 0
        self.graph = None

    def __call__(self, *tensors: Tensor) -> Tensor:
        self.calls += 1
        if self.calls <= _WARM_UP:
            return self._aside(tensors)
        if self.graph is None:
            self.inputs = [tensor.clone() for tensor in tensors]
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.output = self.function(*self.inputs)
        for held, given in zip(self.inputs, tensors, strict=True):
            held.copy_(given)
        self.graph.replay()
        # The next replay writes over it.
        return self.output.clone()

    def _aside(self, tensors) -> Tensor:
        """The plain call, on a stream of its own as is wanted before a recording."""
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            output = self.function(*tensors)
        here.wait_stream(aside)
        return output
