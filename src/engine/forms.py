"""The forms in which a ConvNN is evaluated, attacked and votes: the same function, faster.

A form is made only of a network that was not altered since it was made (`untouched.py`). Nothing
here knows the class ConvNN: any network with the same layers under the same names will do.
"""

import ctypes
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from src.checks import check_function, evaluation_mode
from src.engine.folded import FoldedConvNN
from src.engine.native import NativeConvNN, compiled
from src.engine.native_gradient import AttackedConvNN
from src.engine.parts import FLOATS, check_precision
from src.engine.quantized import INTEGERS, QuantizedConvNN, is_finite
from src.engine.untouched import agrees, alteration, is_untouched, unwrapped
from src.engine.votes import IN_TURN, Workers, single_threaded_workers


def inference_form(network: nn.Module, precision: str) -> nn.Module:
    """A copy of a network for evaluation only, in torch; see `ConvNN.inference_form`."""
    check_precision(precision)
    if reason := alteration(network):
        raise ValueError(f"Only a ConvNN as it is made has other forms, but {reason}.")
    return (FoldedConvNN if precision in FLOATS else QuantizedConvNN)(network, precision)


def attacked_form(network: nn.Module, precision: str) -> nn.Module:
    """The form that passes gradients to the images: in C where that is possible, else in torch."""
    form, library = FoldedConvNN(network, precision), _library(network, precision)
    return AttackedConvNN(form, library).eval() if library else form


def voting_form(network: nn.Module, precision: str) -> nn.Module:
    """The form that votes fastest on the network's device; `precision` is one of PRECISIONS."""
    form, library = inference_form(network, precision), _library(network, precision)
    if library:
        return NativeConvNN(form, library).eval()
    if precision in INTEGERS:
        warnings.warn(f"{precision!r} goes through float64 here, which is slow.", stacklevel=2)
    return form


def _library(network: nn.Module, precision: str) -> ctypes.CDLL | None:
    """The compiled library for a network on the CPU whose layers fill the vectors, else None."""
    on_cpu = network.output.weight.device.type == "cpu"
    library = compiled(precision) if precision != "bfloat16" and on_cpu else None
    if library is None:
        return None
    widths = [network.conv1.out_channels, network.conv2.out_channels]
    if precision in INTEGERS and network.hidden is not None:
        widths.append(network.hidden.out_features)
    return None if any(width % library.lanes() for width in widths) else library


@contextmanager
def voters(
    model: nn.Module, precision: str, images: Tensor
) -> Iterator[tuple[Callable[[Tensor], Tensor], Workers]]:
    """Yield (the network that casts the votes of a model, who shares the work).

    An unaltered ConvNN votes in its fastest form, on all cores of a CPU. Any other model votes
    itself, in evaluation mode, one batch after another: nothing is known of its inside. It is
    first tried out on a few `images` (B, ...), which must be on its device.

    Raises:
        ValueError: if another model answers differently alone or in a batch, or the second time,
            or if its `precision` is not float32.
    """
    form = _trusted_form(unwrapped(model), precision)
    if form is not None:
        on_cpu = images.device.type == "cpu"
        with single_threaded_workers() if on_cpu else nullcontext(IN_TURN) as workers:
            yield form, workers
        return
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    check_function(model, images.to(dtype))
    with evaluation_mode(model):
        yield lambda noisy: model(noisy.to(dtype)), IN_TURN


def _trusted_form(network: nn.Module, precision: str) -> nn.Module | None:
    """The voting form of a network; None if only the network itself can vote."""
    reason = alteration(network)
    if not reason:
        form = voting_form(network, precision)
        if agrees(form, network, precision):
            return form
    check_form(precision, reason or "its forward pass gives other answers")
    return None


def check_form(precision: str, reason: str) -> None:
    """Raise ValueError if a network has a `reason` to vote as it is, and not in float32."""
    if reason and precision != "float32":
        raise ValueError(f"'precision' = {precision!r} needs a ConvNN as it is made, but {reason}.")


def form_name(network: nn.Module, precision: str) -> str:
    """The form in which a network votes, in words for the records."""
    network = unwrapped(network)
    if not is_untouched(network):
        return "its own forward pass"
    return "batch normalisation folded" + ", convolutions in C" * bool(_library(network, precision))


def common_precision(*networks: nn.Module) -> str:
    """The precision in which all networks vote: "int8" if all can do so in C, else "float32".

    Integers of 8 bits were the fastest on every processor measured that has instructions for
    them (`benchmarks/certification.py`).
    """
    able = (
        is_untouched(network) and is_finite(network) and _library(network, "int8")
        for network in map(unwrapped, networks)
    )
    return "int8" if all(able) else "float32"
