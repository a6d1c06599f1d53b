"""Work of a GPU that is recorded once and then replayed without Python."""

from collections.abc import Callable

import torch
from torch import Tensor

# Calls that run before the one that is recorded. Libraries set themselves up in them.
_PLAIN_CALLS = 3


class Recorded:
    """A function of CUDA tensors that becomes one CUDA graph in its fourth call.

    The passes of a small network are several hundred kernels of a few microseconds each. Python
    launches them more slowly than the GPU runs them; a replay launches all at once. A call returns
    a copy of the function's result.

    Args:
        function: tensors -> tensor, all on one device. It must do the same work each time, never
            wait for the GPU (no `item`, no `if` about values) and copy nothing from another device.
            Its Python runs only four times: its counters and its own generators then stand still,
            but torch's generator of the GPU moves on. A replay writes gradients and running
            statistics to the same memory: a gradient that is set to None outside is lost.

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
            if self.calls <= _PLAIN_CALLS:
                return self._plain(tensors)
            if self.graph is None:
                self._record(tensors)
            self._fill(tensors)
            self.graph.replay()
            # A copy: the next replay overwrites it.
            return self.output.clone()

    def _plain(self, tensors) -> Tensor:
        """A call that is not recorded, on the same stream as the recording will be."""
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
        """Copy the arguments into the tensors that the graph reads."""
        for held, given in zip(self.inputs, tensors, strict=True):
            if (held.shape, held.dtype) != (given.shape, given.dtype):
                raise ValueError(
                    f"Recorded with a tensor {tuple(held.shape)} of {held.dtype}, called with "
                    f"{tuple(given.shape)} of {given.dtype}; give tensors like the first."
                )
            held.copy_(given)
