"""Checks of arguments and models that several modules share; an error names the argument."""

import contextlib
import math
import operator
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

NORMS = ("linf", "l2")


def check_images(images: Tensor, *, dims: tuple[int, ...] = (4,)) -> None:
    """Raise ValueError unless `images` is floating, in [0, 1] and has one of the ranks `dims`."""
    if not isinstance(images, Tensor):
        raise ValueError(f"'images' must be a tensor, not {type(images).__name__}.")
    if not images.is_floating_point():
        raise ValueError(
            f"'images' has dtype {images.dtype}; give floating-point pixels in [0, 1] "
            "(for bytes: images.float() / 255)."
        )
    if images.dim() not in dims or 0 in images.shape[1:]:
        expected = "(B, C, H, W)" + " or (C, H, W)" * (3 in dims)
        raise ValueError(f"'images' has shape {tuple(images.shape)}; expected {expected}.")
    # A NaN fails both comparisons.
    if images.numel() and not bool(((images >= 0) & (images <= 1)).all()):
        raise ValueError("'images' has values outside [0, 1] or NaN; scale the pixels to [0, 1].")


def check_shape(images: Tensor) -> None:
    """Raise ValueError unless `images` is of shape (B, 1, 28, 28)."""
    if images.dim() != 4 or images.shape[1:] != (1, 28, 28):
        raise ValueError(f"'images' has shape {tuple(images.shape)}; expected (B, 1, 28, 28).")


def check_labels(labels: Tensor, count: int, *, name: str = "labels") -> None:
    """Raise ValueError unless `labels` is int64 of shape (count,) without negative values."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        given = getattr(labels, "dtype", type(labels).__name__)
        raise ValueError(f"'{name}' must be an int64 tensor, not {given}.")
    if labels.shape != (count,):
        raise ValueError(f"'{name}' has shape {tuple(labels.shape)}; expected ({count},).")
    if count and int(labels.min()) < 0:
        raise ValueError(f"'{name}' has negative values; classes are numbered from 0.")


def check_tensors(dataset: TensorDataset) -> None:
    """Raise ValueError unless `dataset` is a TensorDataset."""
    if not hasattr(dataset, "tensors"):
        raise ValueError(
            f"'dataset' must be a TensorDataset, not {type(dataset).__name__}; build it by "
            "TensorDataset(torch.stack(images), torch.tensor(labels))."
        )


def check_dataset(dataset: TensorDataset, *, empty: bool = True) -> None:
    """Raise ValueError unless `dataset` is a TensorDataset of valid images and labels.

    Images are (N, C, H, W) in [0, 1], labels int64 (N,). N may be 0 only if `empty`.
    """
    check_tensors(dataset)
    if len(dataset.tensors) != 2:
        given = len(dataset.tensors)
        raise ValueError(f"'dataset' must be a TensorDataset of images and labels, not of {given}.")
    images, labels = dataset.tensors
    check_images(images)
    check_labels(labels, len(images))
    if not (empty or len(images)):
        raise ValueError("'dataset' has no images.")


def check_classes(labels: Tensor, classes: int) -> None:
    """Raise ValueError unless all `labels` are below `classes`."""
    if len(labels) and int(labels.max()) >= classes:
        raise ValueError(
            f"'labels' has the class {int(labels.max())}, but the model has {classes} classes."
        )


def checked_logits(
    logits: Tensor, count: int, labels: Tensor | None = None, *, name: str = "model"
) -> Tensor:
    """`logits`, which the model in the argument `name` returned for `count` images.

    Raises:
        ValueError: unless they are floating (count, K), with K >= 2 and above all `labels`.
    """
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"'{name}' returned a {type(logits).__name__}; wrap it so that it returns its logits, "
            "a tensor (B, classes)."
        )
    shape = logits.shape
    if not logits.is_floating_point() or len(shape) != 2 or shape[0] != count or shape[1] < 2:
        raise ValueError(
            f"'{name}' returned a tensor {tuple(shape)} of {logits.dtype}; expected floating-point "
            f"logits ({count}, classes) of two classes or more."
        )
    if labels is not None:
        check_classes(labels, shape[1])
    return logits


def ask(model: nn.Module, images: Tensor) -> Tensor:
    """What a model returns for images; in the dtype of its weights if it takes no other.

    So a network in float64 can be asked about images in float32, and the other way round.
    """
    try:
        return model(images)
    except RuntimeError:
        weights = (p.dtype for p in model.parameters() if p.is_floating_point())
        dtype = next(weights, images.dtype)
        if dtype == images.dtype:
            raise
    return model(images.to(dtype))


def predicted(logits: Tensor, none: int = -1) -> Tensor:
    """The class of each row of logits (B, K), int64 (B,); `none`, which is no class, with a NaN."""
    # max returns NaN if there is one; argmax would choose its class.
    highest, chosen = logits.max(dim=1)
    return chosen.masked_fill(highest.isnan(), none)


def check_ball(epsilon: float, norm: str) -> None:
    """Raise ValueError unless `norm` is known and `epsilon` a finite number, at least 0."""
    if norm not in NORMS:
        raise ValueError(f"'norm' is {norm!r}; use one of {', '.join(map(repr, NORMS))}.")
    check_number("epsilon", epsilon)


def check_number(name: str, value: float, *, positive: bool = False) -> None:
    """Raise ValueError unless `value` is finite and at least 0 (above 0 if `positive`)."""
    try:
        # float("0.3") would work here, but the string fails in later arithmetic.
        value = float(None if isinstance(value, str) else value)
    except (TypeError, ValueError):
        raise ValueError(f"'{name}' must be a number, not {value!r}.") from None
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        bound = "above 0" if positive else "at least 0"
        raise ValueError(f"'{name}' = {value:g} must be finite and {bound}.")


def check_count(name: str, value: int, minimum: int = 1) -> None:
    """Raise ValueError unless `value` is an integer of at least `minimum`."""
    try:
        valid = not isinstance(value, bool) and operator.index(value) >= minimum
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(f"'{name}' = {value!r} must be an integer of at least {minimum}.")


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Put every submodule in evaluation mode, and back in its own mode afterwards.

    Unlike `model.train(mode)` afterwards, which would give all submodules one mode, also those that
    a user has frozen.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def check_function(model: nn.Module, images: Tensor, *, may_change: bool = False) -> None:
    """Raise ValueError unless each image has one answer: alone, in a batch, and when asked again.

    The model is given up to four of the images, among random ones. Rounding differences are
    allowed.

    Args:
        model: images -> logits (B, classes), run in evaluation mode.
        images: (B, ...) in [0, 1], on the device of the model.
        may_change: only warn if the answer changes when asked again.
    """
    few = images[:4]
    if not len(few):
        return
    # An unusual seed, so that a caller's random images are not the same.
    generator = torch.Generator().manual_seed(0xC0FFEE)
    others = torch.rand(few.shape, generator=generator, device=generator.device)
    batch = torch.cat([few, others.to(few)])
    devices = [images.device] if images.is_cuda else []
    with torch.random.fork_rng(devices), evaluation_mode(model):
        first, again, alone = (ask(model, part) for part in (batch, batch, batch[:1]))
    if not isinstance(first, Tensor):
        raise ValueError(
            f"'model' returned a {type(first).__name__}; expected logits (B, classes)."
        )
    if first.dim() != 2 or len(first) != len(batch):
        # `checked_logits` refuses these later, with a better message.
        return
    rounding = _rounding(first)
    if not same(again, first, rounding):
        text = "'model' answers differently when it is asked about the same images again"
        if not may_change:
            raise ValueError(
                f"{text}: judge it without its randomness (of a SmoothClassifier attack the "
                "base_classifier, or use challenge_certificates)."
            )
        warnings.warn(f"{text}: the result is that of one draw.", stacklevel=3)
    elif not same(alone, first[:1], rounding):
        raise ValueError(
            "'model' answers differently to an image alone and in a batch, so it has no answer to "
            "an image; normalise by fixed statistics (track_running_stats=True in BatchNorm2d)."
        )


def same(found: Tensor, expected: Tensor, tolerance: Tensor) -> bool:
    """Whether two tensors are equal up to `tolerance`; NaN equals NaN."""
    equal = (found == expected) | (found.isnan() & expected.isnan())
    return bool((equal | ((found - expected).abs() <= tolerance)).all())


def _rounding(logits: Tensor) -> Tensor:
    """How far rounding may move the logits (B, classes), for each class: (classes,)."""
    unit, finite = rounding_unit(logits), logits.nan_to_num(0, 0, 0)
    spread = (finite.amax(0) - finite.amin(0)).max()
    # For each class: a constant -1e9 in one must not hide changes in the others.
    return unit**0.5 * spread + 64 * unit * finite.abs().amax(0)


def rounding_unit(logits: Tensor) -> float:
    """The relative size of one rounding in the network that gave these logits."""
    unit = torch.finfo(logits.dtype).eps if logits.is_floating_point() else 0.0
    if torch.is_autocast_enabled(logits.device.type):
        return torch.finfo(torch.bfloat16).eps
    # On a GPU convolutions may run in TF32, with 10 bits.
    return max(unit, 2**-10) if logits.is_cuda else unit
