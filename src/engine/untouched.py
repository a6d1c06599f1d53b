"""Tells an unaltered network, which may run in another form, from one that a user has changed."""

import functools
import json
import operator
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from src.checks import evaluation_mode, same
from src.engine.parts import TOLERANCES, members_of

# Wrappers that answer as the module inside does, and the attribute that holds it.
_WRAPPERS = {
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
}
# The attributes in which a module keeps its hooks of all kinds.
_HOOKS = [name for name in vars(nn.Module()) if name.endswith("hooks")]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `DataParallel`, `AveragedModel`, `torch.compile` and the like.

    A wrapper with hooks, or of another class, is returned as it is.
    """
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if kind not in _WRAPPERS or has_hooks(model):
        return model
    return unwrapped(getattr(model, _WRAPPERS[kind]))


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks of any kind hang on the module itself."""
    return any(map(vars(module).get, _HOOKS))


def alteration(network: nn.Module) -> str:
    """What is different from a network just made, as in "it has hooks"; "" if nothing is.

    Only a class that defines `inference_form` itself has unaltered networks: a subclass may have
    another forward pass. `config` must hold the arguments that make the network.
    """
    if "inference_form" not in vars(type(network)):
        return f"it is a {type(network).__name__}"
    if nn.modules.module._has_any_global_hook():
        return "there are hooks on all modules"
    for name, module in network.named_modules(remove_duplicate=False):
        if has_hooks(module):
            return f"it has hooks on {name or 'itself'}"
    try:
        # numpy's integers too are numbers.
        config = json.dumps(network.config, default=operator.index)
        expected = _structure_as_made(type(network), config)
    except (AttributeError, TypeError, ValueError, ArithmeticError, RuntimeError):
        return "its 'config' does not describe it"
    found = _structure(network)
    for name in expected | found:
        if expected.get(name) != found.get(name):
            return f"{name or 'the network itself'} was changed"
    values = [v for v in (*network.parameters(), *network.buffers()) if v.is_floating_point()]
    if any(value.dtype != torch.float32 for value in values):
        return f"it is in {', '.join(sorted({str(value.dtype) for value in values}))}"
    if len({value.device for value in values}) > 1:
        return "it is on several devices"
    for thresholds in (member.thresholds for member in members_of(network)):
        if not are_thresholds(thresholds):
            return f"its thresholds are {thresholds!r}"
    return ""


def is_untouched(network: nn.Module) -> bool:
    """Whether a network has its original layers in their places, in float32, without hooks."""
    return not alteration(network)


def _structure(network: nn.Module) -> dict[str, tuple]:
    """Per module, by name, everything that its answers depend on, except numbers."""
    structure = {}
    for name, module in network.named_modules(remove_duplicate=False):
        tensors = [*module._parameters.items(), *module._buffers.items()]
        tensors = [(key, type(value), getattr(value, "shape", None)) for key, value in tensors]
        # Methods that were replaced on the instance.
        replaced = vars(module).keys() & _class_attributes(type(module))
        structure[name] = (type(module), module.extra_repr(), tensors, replaced)
    return structure


_class_attributes = functools.cache(lambda kind: frozenset(dir(kind)))


@functools.lru_cache(64)
def _structure_as_made(kind: type, config: str) -> dict[str, tuple]:
    """The structure of a network just made of a config in JSON; its weights take no memory."""
    with torch.device("meta"):
        return _structure(kind(**json.loads(config)))


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

    Differences are measured against the largest logit plus the largest bias. Measured against the
    spread of the logits, a network whose logits hardly vary would seem altered.
    """
    images = _probe().to(next(network.parameters()).device)
    with evaluation_mode(network), torch.autocast(images.device.type, enabled=False):
        found, expected = form(images), network(images)
    bias = torch.stack([member.output.bias for member in members_of(network)])
    largest = sum(v.nan_to_num(0, 0, 0).abs().max() for v in (expected, bias))
    return same(found, expected, TOLERANCES[precision] * largest)


@functools.cache
def _probe() -> Tensor:
    """16 images (16, 1, 28, 28) of random pixels, half of them with noise added."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        # The type and the device are not left to the caller's defaults.
        options = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
        images = torch.rand((16, 1, 28, 28), **options)
        images[8:] += torch.randn((8, 1, 28, 28), **options)
    return images


@contextmanager
def evaluation_form(model: nn.Module, *, probe: bool = False) -> Iterator[nn.Module]:
    """The fastest form in which to evaluate and attack a model; use it only inside the block.

    An unaltered ConvNN gives its `attacked_form`: in bfloat16 under autocast, else in float32.
    Any other model is itself, in evaluation mode until the block ends. With `probe`, so is a
    ConvNN whose forward pass gives other answers than the form.
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
