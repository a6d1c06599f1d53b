"""Work of a GPU that is recorded once and then replayed, without Python in between."""

from collections.abc import Callable

import torch
from torch import Tensor

# Calls that run as they are before the one that is recorded: libraries set themselves up in them.
_WARM_UP = 3


class Recorded:
    """A function of CUDA tensors, from its fourth call on as one CUDA graph.

    The forward and backward passes of a small network are several hundred kernels of a few
    microseconds each, which Python launches more slowly than the GPU runs them; a replay launches
    all at once. A call returns a copy of what the function returns.

    Args:
        function: tensors -> tensor, all on one device. It must do the same work each time, never
            wait for the GPU (no `item`, no `if` about values) and copy nothing from elsewhere. Its
            Python runs four times, so counters in it and generators of its own stand still after
            that; torch's generator of the GPU moves on. What it leaves in gradients or running
            statistics, a replay writes to the same memory: who sets a gradient to None outside of
            it loses all that follow.

    Raises:
        ValueError: in a call with other shapes or types than were recorded.
        RuntimeError: if the function cannot be recorded.
    """

    def __init__(self, function: Callable[..., Tensor]):
        self.function = function
        self.calls = 0
        self.stream = self.graph = self.inputs = self.output = None

    def __call__(self, *tensors: Tensor) -> Tensor:
        with torch.cuda.device(tensors[0].device):
            self.calls += 1
            if self.calls <= _WARM_UP:
                return self._aside(tensors)
            if self.graph is None:
                self._record(tensors)
            self._fill(tensors)
            self.graph.replay()
            # The next replay writes over it.
            return self.output.clone()

    def _aside(self, tensors) -> Tensor:
        """The plain call on the stream of the recording, to which what is set up then belongs."""
        self.stream = self.stream or torch.cuda.Stream()
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            output = self.function(*tensors)
        here.wait_stream(self.stream)
        return output

    def _record(self, tensors) -> None:
        self.inputs = [tensor.clone() for tensor in tensors]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.output = self.function(*self.inputs)
        except RuntimeError as error:
            raise RuntimeError(
                "This training cannot be recorded as a CUDA graph; call train_model with "
                f"recorded=False, or use another device ({error})."
            ) from error
        self.graph = graph

    def _fill(self, tensors) -> None:
        """Copy the arguments to where the graph reads them."""
        for held, given in zip(self.inputs, tensors, strict=True):
            if (held.shape, held.dtype) != (given.shape, given.dtype):
                raise ValueError(
                    f"Recorded with a tensor {tuple(held.shape)} of {held.dtype}, called with "
                    f"{tuple(given.shape)} of {given.dtype}; give tensors like the first."
                )
            held.copy_(given)
