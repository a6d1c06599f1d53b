"""Trained networks on disk: weights, the arguments that rebuild the network, and its training."""

import hashlib
import io
import json
import math
import os
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

from src.checks import NORMS
from src.engine.parts import members_of
from src.engine.untouched import alteration
from src.files import whole_file
from src.models import ConvNN, Ensemble
from src.utils import add_to_digest

# The facts that scripts rely on: their types, and the least value of numbers.
_TYPES = {"options": dict, "versions": dict, "command": str, "commit": str, "device": str}
_TYPES |= dict.fromkeys(("sigma", "epsilon", "seconds"), int | float) | {
    "seed": int,
    "threads": int,
}
_LEAST = {"sigma": math.ulp(0.0), "epsilon": 0, "seconds": 0, "seed": 0, "threads": 0}
_FORMAT = "ConvNN checkpoint 2"


def save_checkpoint(path: str | os.PathLike, model: ConvNN | Ensemble, **facts) -> Path:
    """Write the weights, the arguments of the network, `facts` and a digest; return `path`.

    Args:
        path: file to write, whole or not at all.
        model: the network. Of an Ensemble the `facts` of its members are kept too, as `members`.
        facts: how it was trained (seed, sigma, options, ...), JSON values.

    Raises:
        ValueError: if `model` is no ConvNN or Ensemble or was altered after it was made, or if a
            fact has another type than its name demands.
        TypeError: if `facts` cannot be written as JSON.
        OSError: if the file cannot be written.
    """
    if not isinstance(model, ConvNN | Ensemble):
        raise ValueError(f"'model' is a {type(model).__name__}; save its ConvNN.")
    if reason := _lost(model):
        raise ValueError(f"'model' cannot be kept in a checkpoint: {reason}; save a plain ConvNN.")
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if isinstance(model, Ensemble):
        facts["members"] = [getattr(member, "facts", {}) for member in model.networks]
    # Through JSON, which leaves the plain values that a safe reader accepts.
    facts = json.loads(json.dumps(facts))
    if wrong := _wrong_fact(facts, model):
        raise ValueError(
            f"The fact '{wrong}' has a value of a wrong kind, which no reader accepts."
        )
    content = {"format": _FORMAT, "config": model.config, "facts": facts}
    content |= {"digest": _digest(model.config, facts, weights), "weights": weights}
    # In memory first: torch would store the name of the temporary file, and does not say that the
    # disk is full.
    stored = io.BytesIO()
    torch.save(content, stored)
    with whole_file(path) as temporary:
        temporary.write_bytes(stored.getvalue())
    return Path(path)


def load_checkpoint(
    path: str | os.PathLike, device: str | torch.device = "cpu"
) -> ConvNN | Ensemble:
    """The network of a checkpoint, in evaluation mode, with its facts as `model.facts`.

    The members of an Ensemble have theirs too.

    Reads only tensors and plain values (`weights_only=True`), so no code in the file runs.
    Weights, config and facts must match the stored digest.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if the file cannot be read.
        ValueError: if the file is not a whole, unaltered checkpoint of a ConvNN or Ensemble.
    """
    content = _read(Path(path))
    try:
        intact = content["digest"] == _digest(*(content[k] for k in ("config", "facts", "weights")))
    except (TypeError, ValueError, RuntimeError):
        # Values that are no JSON, or tensors without plain bytes (sparse, meta).
        intact = False
    if not intact:
        raise ValueError(f"{path} is damaged: its content does not match its digest.")
    try:
        # First without memory: an absurd description may ask for too much of it.
        with torch.device("meta"):
            described = _made(content["config"]).state_dict()
        if _layout(described) != _layout(content["weights"]):
            raise ValueError
        model = _made(content["config"])
        model.load_state_dict(content["weights"])
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"{path} holds another architecture than its description {content['config']}."
        ) from None
    if wrong := _wrong_fact(content["facts"], model):
        raise ValueError(f"{path} is damaged: its fact '{wrong}' has a value of another kind.")
    model.facts = content["facts"]
    if isinstance(model, Ensemble):
        for member, facts in zip(model.networks, model.facts["members"], strict=True):
            member.facts = facts
    return model.to(device).eval()


def _made(config: dict) -> ConvNN | Ensemble:
    """The network that a config describes; only that of an Ensemble has `networks`."""
    return (Ensemble if "networks" in config else ConvNN)(**config)


def _lost(model: ConvNN | Ensemble) -> str:
    """What a checkpoint would lose of the network, in words; "" if nothing."""
    if type(model) not in (ConvNN, Ensemble):
        return f"it is a {type(model).__name__}"
    if reason := alteration(model):
        return reason
    for member in members_of(model):
        now, before = member.thresholds, member.config.get("thresholds")
        if (now and list(now)) != before:
            return "its thresholds were set after it was made"
    return ""


def _wrong_fact(facts: dict, model: ConvNN | Ensemble) -> str:
    """The name of a fact of `model` with a value of the wrong kind; "" if there is none."""
    wrong = _wrong_value(facts)
    if wrong or isinstance(model, ConvNN):
        return wrong
    members = facts.get("members")
    if not isinstance(members, list) or not all(isinstance(of, dict) for of in members):
        return "members"
    wrong = "members" if len(members) != len(model.networks) else ""
    return next(filter(None, map(_wrong_value, members)), wrong)


def _wrong_value(facts: dict) -> str:
    """The name of a fact of one network with a value of the wrong kind; "" if there is none."""
    for name in filter(facts.__contains__, _TYPES):
        value, least = facts[name], _LEAST.get(name)
        valid = isinstance(value, _TYPES[name]) and not isinstance(value, bool)
        # NaN fails both comparisons. An integer may be larger than any float.
        if not valid or (least is not None and not least <= value <= sys.float_info.max):
            return name
    options = facts.get("options", {})
    ball = {key: options[key] for key in ("norm", "epsilon") if options.get(key) is not None}
    if "norm" in ball and ball["norm"] not in NORMS:
        return "norm"
    # Beyond 28 in l2 every image lies in the ball.
    epsilon = ball.get("epsilon", 1)
    number = isinstance(epsilon, int | float) and not isinstance(epsilon, bool)
    return "" if number and 0 < epsilon <= 28 else "epsilon"


def _layout(weights: dict[str, Tensor]) -> dict:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}


def weights_digest(weights: dict[str, Tensor]) -> str:
    """SHA-256 of the names, types, shapes and bytes of a state dictionary.

    Of entries other than tensors, which a module may add to its state, only the types count.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name} ".encode())
        add_to_digest(digest, weights[name])
    return digest.hexdigest()


def _digest(config: dict, facts: dict, weights: dict[str, Tensor]) -> str:
    """SHA-256 of all that a checkpoint holds, the facts included: a wrong sigma misleads too."""
    described = json.dumps([_FORMAT, config, facts]) + weights_digest(weights)
    return hashlib.sha256(described.encode()).hexdigest()


def _read(path: Path) -> dict:
    """The content of a checkpoint file, with its structure checked."""
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint at {path}.")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a checkpoint.")
    stored = io.BytesIO(path.read_bytes())
    try:
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(stored, map_location="cpu", weights_only=True)
    except Exception:
        # torch raises half a dozen types of error and suggests to load the file unsafely.
        raise ValueError(
            f"{path} is not a checkpoint that can be read safely: it is empty, cut short, "
            "altered or of another kind; train the model again."
        ) from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path} is a file of torch, but not a checkpoint of this project.")
    expected = {"config": dict, "facts": dict, "digest": str, "weights": dict}
    for key, kind in expected.items():
        if not isinstance(content.get(key), kind):
            raise ValueError(f"{path} is damaged: its entry '{key}' is missing or malformed.")
    if content.keys() != {"format", *expected}:
        raise ValueError(f"{path} is damaged: it has entries that do not belong there.")
    if not all(isinstance(tensor, Tensor) for tensor in content["weights"].values()):
        raise ValueError(f"{path} is damaged: its weights are not all tensors.")
    return content
