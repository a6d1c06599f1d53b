"""What tells a stock network, which may run in another form, from one that a user has changed."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from src.checks import evaluation_mode, same
from src.engine.parts import TOLERANCES

# Wrappers that answer as the module in this attribute does.
_WRAPPERS = {
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
}
# Where a module keeps its hooks: forward and backward, before and after, of its state.
_HOOKS = [name for name in vars(nn.Module()) if name.endswith("hooks")]
# Hooks on every module there is. The dictionaries never change their places.
_GLOBAL_HOOKS = [
    hooks
    for name, hooks in vars(nn.modules.module).items()
    if name.startswith(("_global_forward", "_global_backward")) and name.endswith("hooks")
]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `DataParallel`, `AveragedModel`, `torch.compile` and the like.

    A wrapper with hooks, or of a class of its own, is not seen through.
    """
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if kind not in _WRAPPERS or has_hooks(model):
        return model
    return unwrapped(getattr(model, _WRAPPERS[kind]))


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks of any kind hang on this very module."""
    return any(map(vars(module).get, _HOOKS))


def alteration(network: nn.Module) -> str:
    """What a network has that its class does not give it, as in "it has hooks"; "" for nothing.

    A class vouches for its instances if it defines `inference_form` itself: what inherits it may
    have another forward pass. `config` must hold the arguments that make the network.
    """
    if "inference_form" not in vars(type(network)):
        return f"it is a {type(network).__name__}"
    if any(_GLOBAL_HOOKS):
        return "there are hooks on all modules"
    modules = list(network.named_modules(remove_duplicate=False))
    for name, module in modules:
        if has_hooks(module):
            return f"it has hooks on {name or 'itself'}"
    try:
        expected = _made(type(network), _frozen(network.config))
    except (AttributeError, TypeError, ValueError, ArithmeticError, RuntimeError):
        return "its 'config' does not describe it"
    found = dict(_contents(*named) for named in modules)
    for name in expected | found:
        if expected.get(name) != found.get(name):
            return f"{name or 'the network itself'} was changed"
    values = [v for v in (*network.parameters(), *network.buffers()) if v.is_floating_point()]
    if any(value.dtype != torch.float32 for value in values):
        return f"it is in {', '.join(sorted({str(value.dtype) for value in values}))}"
    if len({value.device for value in values}) > 1:
        return "it is on several devices"
    return (
        "" if are_thresholds(network.thresholds) else f"its thresholds are {network.thresholds!r}"
    )


def is_untouched(network: nn.Module) -> bool:
    """Whether a network consists of stock layers in stock places, in float32, without hooks."""
    return not alteration(network)


def _contents(name: str, module: nn.Module) -> tuple:
    """A module's name, and all but numbers that its answers depend on."""
    kind = type(module)
    tensors = [*module._parameters.items(), *module._buffers.items()]
    tensors = [(key, type(value), getattr(value, "shape", None)) for key, value in tensors]
    # Methods that the instance has instead of its class.
    replaced = vars(module).keys() & _attributes(kind)
    return name, (kind, module.extra_repr(), tensors, replaced)


@functools.cache
def _attributes(kind: type) -> frozenset:
    return frozenset(dir(kind))


def _frozen(config: dict) -> tuple:
    return tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in config.items())


@functools.lru_cache(64)
def _made(kind: type, config: tuple) -> dict:
    """`_contents` of a network just made, without memory for its weights."""
    with torch.device("meta"):
        network = kind(**dict(config))
    return dict(_contents(*named) for named in network.named_modules(remove_duplicate=False))


def are_thresholds(thresholds) -> bool:
    """Whether `thresholds` are None or 0 <= low < high <= 1."""
    try:
        low, high = (0, 1) if thresholds is None else thresholds
        return 0 <= low < high <= 1
    except (TypeError, ValueError, RuntimeError):
        return False


@torch.no_grad()
def agrees(form: nn.Module, network: nn.Module, precision: str) -> bool:
    """Whether a form answers like `network.forward`, up to its rounding, on images and noise.

    In relation to the largest logit or bias: with the spread of the logits for a measure, networks
    whose logits hardly move would be taken for altered.
    """
    images = _probe().to(network.output.weight.device)
    with evaluation_mode(network), torch.autocast(images.device.type, enabled=False):
        found, expected = form(images), network(images)
    largest = sum(v.nan_to_num(0, 0, 0).abs().max() for v in (expected, network.output.bias))
    return same(found, expected, TOLERANCES[precision] * largest)


@functools.cache
def _probe() -> Tensor:
    """16 images (16, 1, 28, 28), half of them under noise."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        images = torch.rand((16, 1, 28, 28), generator=generator)
        images[8:] += torch.randn((8, 1, 28, 28), generator=generator)
    return images


@contextmanager
def evaluation_form(model: nn.Module, *, probe: bool = False) -> Iterator[nn.Module]:
    """The form in which a model is best evaluated and attacked; it must not outlive the block.

    A ConvNN as it was made offers one (`attacked_form`), in bfloat16 under autocast, else in
    float32. Another model is put in evaluation mode until the block ends; so is a ConvNN that was
    altered after it was made and, if `probe`, one whose forward pass gives other answers.
    """
    network = unwrapped(model)
    if is_untouched(network):
        cast = torch.is_autocast_enabled(next(network.parameters()).device.type)
        precision = "bfloat16" if cast else "float32"
        form = network.attacked_form(precision)
        if not probe or agrees(form, network, precision):
            yield form
            return
    with evaluation_mode(model):
        yield model
