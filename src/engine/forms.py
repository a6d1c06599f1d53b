"""The forms in which a ConvNN is evaluated, attacked and votes: the same function, faster.

A form is made only of a network that was not altered since it was made (`untouched.py`). Nothing
here knows the class ConvNN: any network with the same layers under the same names will do, and any
ensemble that holds such `networks`, whose form is made of theirs.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from src.checks import check_function, evaluation_mode
from src.engine.exact import ExactConvNN, ExactEnsemble, WholeLogits
from src.engine.exact_native import NativeExact, exact_library
from src.engine.folded import FoldedConvNN
from src.engine.native import NativeConvNN, float_library
from src.engine.native_gradient import AttackedConvNN
from src.engine.parts import MeanForm, check_precision, members_of
from src.engine.untouched import agrees, alteration, is_untouched, unwrapped
from src.engine.votes import IN_TURN, Cast, Workers, exact_cast, float_cast, single_threaded_workers


def inference_form(network: nn.Module, precision: str) -> nn.Module:
    """A copy of a network for evaluation only, in torch; see `ConvNN.inference_form`."""
    _check_unaltered(network, precision)
    if precision == "exact":
        return _exact(network)
    return _in_floats(network, lambda member: FoldedConvNN(member, precision))


def attacked_form(network: nn.Module, precision: str) -> nn.Module:
    """The form that passes gradients to the images: in C where that is possible, else in torch."""
    return _in_floats(network, lambda member: _fastest(member, precision, AttackedConvNN))


def voting_form(network: nn.Module, precision: str) -> nn.Module:
    """The form in floats that votes fastest on the network's device."""
    _check_unaltered(network, precision)
    return _in_floats(network, lambda member: _fastest(member, precision, NativeConvNN))


def _check_unaltered(network: nn.Module, precision: str) -> None:
    check_precision(precision)
    if reason := alteration(network):
        raise ValueError(f"Only a ConvNN as it is made has other forms, but {reason}.")


def _exact(network: nn.Module) -> WholeLogits:
    """The form in whole numbers of a ConvNN or an ensemble."""
    one, *others = members_of(network)
    return ExactEnsemble([one, *others]) if others else ExactConvNN(one)


def _in_floats(network: nn.Module, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """The form that `make` gives for a ConvNN, or of an ensemble those of all its members."""
    forms = [make(member) for member in members_of(network)]
    return MeanForm(forms, network.thresholds) if len(forms) > 1 else forms[0]


def _fastest(network: nn.Module, precision: str, native: type) -> nn.Module:
    """A ConvNN in floats, of the class `native` if C can run it."""
    form, library = FoldedConvNN(network, precision), _library(network, precision)
    return native(form, library).eval() if library else form


def _library(network: nn.Module, precision: str) -> ctypes.CDLL | None:
    """The compiled library for a ConvNN on the CPU whose layers fill the vectors, else None."""
    on_cpu = network.output.weight.device.type == "cpu"
    library = float_library() if precision == "float32" and on_cpu else None
    if library is None:
        return None
    widths = network.conv1.out_channels, network.conv2.out_channels
    return None if any(width % library.lanes() for width in widths) else library


@contextmanager
def voters(
    model: nn.Module,
    precision: str | None,
    images: Tensor,
    num_classes: int,
    batch_size: int | None,
) -> Iterator[tuple[Cast, Workers]]:
    """Yield (what casts the votes of a model, who shares the work).

    An unaltered ConvNN votes in its form for `precision`, on all cores of a CPU. Any other model
    votes itself, in evaluation mode, one batch after another: nothing is known of its inside. It is
    first tried out on a few `images` (B, ...), which must be on its device.

    Raises:
        ValueError: if another model answers differently alone or in a batch, or the second time,
            or if its `precision` is not float32.
    """
    form = _trusted_form(unwrapped(model), precision)
    if form is not None:
        on_cpu = images.device.type == "cpu"
        # Here, or every worker would compile it.
        library = exact_library() if on_cpu else None
        with single_threaded_workers() if on_cpu else nullcontext(IN_TURN) as workers:
            if isinstance(form, WholeLogits):
                native = NativeExact(form, library) if library else None
                yield exact_cast(form, native, num_classes), workers
            else:
                yield float_cast(form, num_classes, batch_size), workers
        return
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    check_function(model, images.to(dtype))
    with evaluation_mode(model):
        yield float_cast(lambda noisy: model(noisy.to(dtype)), num_classes, batch_size), IN_TURN


def default_precision(model: nn.Module) -> str:
    """In which a model votes if nothing else is asked for.

    "exact" for an unaltered ConvNN on a CPU; "float32" for any other model, on another device, and
    where weights have no whole numbers (`ExactConvNN`).
    """
    return "float32" if _exact_form(unwrapped(model)) is None else "exact"


def _exact_form(network: nn.Module) -> WholeLogits | None:
    """The form in whole numbers of an unaltered network on a CPU, if it has one."""
    if not is_untouched(network) or next(network.parameters()).device.type != "cpu":
        return None
    try:
        form = _exact(network)
    except ValueError:
        return None
    return form if agrees(form, network, "exact") else None


def _trusted_form(network: nn.Module, precision: str | None) -> nn.Module | None:
    """The voting form of a network; None if only the network itself can vote."""
    if precision is None:
        return _exact_form(network) or _trusted_form(network, "float32")
    reason = alteration(network)
    if not reason:
        make = inference_form if precision == "exact" else voting_form
        form = make(network, precision)
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
    if precision == "exact":
        return "whole numbers"
    in_c = [bool(_library(member, precision)) for member in members_of(network)]
    some = "some " * (not all(in_c))
    return "batch normalisation folded" + f", {some}convolutions in C" * any(in_c)
