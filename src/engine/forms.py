"""The forms in which a ConvNN is evaluated, attacked and votes: the same function, faster.

A form is made only of a network that is untouched, see `src/engine/untouched.py`. Nothing here
knows the class ConvNN: a network of the same layers by the same names will do.
"""

import warnings

from torch import nn

from src.engine.folded import FoldedConvNN
from src.engine.native import NativeConvNN, compiled
from src.engine.native_gradient import AttackedConvNN
from src.engine.parts import FLOATS, check_precision
from src.engine.quantized import INTEGERS, QuantizedConvNN, is_finite
from src.engine.untouched import alteration, is_untouched, unwrapped


def inference_form(network: nn.Module, precision: str) -> nn.Module:
    """A copy of a network for evaluation only, in torch; see `ConvNN.inference_form`."""
    check_precision(precision)
    if reason := alteration(network):
        raise ValueError(f"Only a ConvNN as it is made has other forms, but {reason}.")
    return (FoldedConvNN if precision in FLOATS else QuantizedConvNN)(network, precision)


def attacked_form(network: nn.Module, precision: str) -> nn.Module:
    """The form that passes gradients to the images; in C where that can be.

    It can be in float32 on a CPU with a compiler, for networks whose layers fill the vectors.
    """
    form = FoldedConvNN(network, precision)
    library = compiled(precision) if precision == "float32" and _is_on_cpu(network) else None
    if library is None or any(len(k) % library.lanes() for k in (form.kernel1, form.kernel2)):
        return form
    return AttackedConvNN(form, library).eval()


def voting_form(network: nn.Module, precision: str) -> nn.Module:
    """The form that casts votes fastest where the network is; `precision` one of PRECISIONS."""
    form = inference_form(network, precision)
    library = _library(network, precision)
    if library:
        return NativeConvNN(form, library).eval()
    if precision in INTEGERS:
        warnings.warn(f"{precision!r} goes through float64 here, which is slow.", stacklevel=2)
    return form


def _library(network: nn.Module, precision: str):
    """The compiled library for a network on the CPU whose layers fill the vectors, else None."""
    library = compiled(precision) if precision != "bfloat16" and _is_on_cpu(network) else None
    if library is None:
        return None
    widths = [network.conv1.out_channels, network.conv2.out_channels]
    if precision in INTEGERS and network.hidden is not None:
        widths.append(network.hidden.out_features)
    return None if any(width % library.lanes() for width in widths) else library


def _is_on_cpu(network: nn.Module) -> bool:
    return network.output.weight.device.type == "cpu"


def form_name(network: nn.Module, precision: str) -> str:
    """What votes in place of a network, in words, for the records."""
    network = unwrapped(network)
    if not is_untouched(network):
        return "its own forward pass"
    return "batch normalisation folded" + ", convolutions in C" * bool(_library(network, precision))


def common_precision(*networks: nn.Module) -> str:
    """The precision in which all of these networks vote: "int8" if all can in C, else "float32".

    Where there are instructions for them, integers of 8 bits were the fastest wherever it was
    measured (`benchmarks/certification.py`).
    """
    able = (
        is_untouched(network) and is_finite(network) and _library(network, "int8")
        for network in map(unwrapped, networks)
    )
    return "int8" if all(able) else "float32"
