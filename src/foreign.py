"""Other people's networks and images: a network by the name of its module, images from a file."""

import importlib
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from src.checks import (
    ask,
    check_classes,
    check_dataset,
    check_function,
    checked_logits,
    evaluation_mode,
)


def load_network(name: str) -> nn.Module:
    """The network called "package.module:function", in evaluation mode.

    The module is imported, from the current folder or wherever Python finds it, so its code runs.
    After the colon stands a function without arguments or a class that gives an `nn.Module`, or a
    network itself.

    Raises:
        ValueError: if any of this fails; the message says which.
    """
    module, _, attribute = name.partition(":")
    if not (module and attribute):
        raise ValueError(f"--network {name!r} is not of the form package.module:function.")
    found = _imported(module)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"--network: the module {module!r} has no {attribute!r}.")
        found = getattr(found, part)
    if not isinstance(found, nn.Module) and callable(found):
        try:
            found = found()
        except (Exception, SystemExit) as error:
            raise ValueError(f"--network: {name}() failed: {_described(error)}.") from error
    if not isinstance(found, nn.Module):
        kind = type(found).__name__
        raise ValueError(f"--network: {name} gives a {kind}; it must give a torch.nn.Module.")
    return found.eval()


def _imported(module: str):
    """The module of this name; the current folder comes first, as in `python -m`."""
    folder = os.getcwd()
    if not {"", folder} & set(sys.path):
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:
        missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module}.".startswith(f"{missing}."):
            raise ValueError(
                f"--network: there is no module {missing!r} in {folder} or where else Python "
                "looks; run the command in the folder that holds it, or name that in PYTHONPATH."
            ) from None
        raise ValueError(f"--network: importing {module} failed: {_described(error)}.") from error


def _described(error: BaseException) -> str:
    """Kind and first line of an error of other people's code."""
    lines = str(error).strip().splitlines()
    return type(error).__name__ + (f": {lines[0].rstrip('.')}" if lines else "")


def load_images(path: str | os.PathLike) -> TensorDataset:
    """The data set in an .npz file with `images` and `labels`; no code in the file can run.

    Images are floats in [0, 1] or bytes, which are divided by 255, of shape (N, C, H, W); labels
    are whole numbers from 0, of shape (N,).

    Returns:
        images float32 (N, C, H, W) in [0, 1], labels int64 (N,), N at least 1.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds anything else.
    """
    images, labels = _arrays(Path(path))
    if images.dtype == np.uint8:
        images = np.divide(images, 255, dtype=np.float32)
    elif images.dtype.kind != "f":
        raise ValueError(
            f"{path}: 'images' are of type {images.dtype}; save bytes (uint8) or floats in [0, 1]."
        )
    if images.ndim != 4:
        raise ValueError(
            f"{path}: 'images' have the shape {images.shape}; save them as (N, C, H, W), grey ones "
            "with C = 1."
        )
    if min(images.shape[1:3]) > 4 and images.shape[3] in (1, 3):
        raise ValueError(
            f"{path}: 'images' have the shape {images.shape}, with the colours last; save "
            "images.transpose(0, 3, 1, 2)."
        )
    if labels.dtype.kind not in "iu" or (labels.size and labels.max() > 2**62):
        raise ValueError(f"{path}: 'labels' are of type {labels.dtype}; save class numbers, int64.")
    pixels = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))
    dataset = TensorDataset.__new__(TensorDataset)
    # Its constructor refuses different lengths by an assertion; `check_dataset` says which.
    dataset.tensors = (pixels, torch.from_numpy(labels.astype(np.int64)))
    try:
        check_dataset(dataset, empty=False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return dataset


def _arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The arrays `images` and `labels` of an .npz file."""
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}.")
    way_out = "make it by numpy.savez(path, images=images, labels=labels)"
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            raise ValueError("it holds one array without a name")
        with content:
            if missing := [name for name in ("images", "labels") if name not in content.files]:
                held = ", ".join(map(repr, content.files)) or "nothing"
                raise ValueError(f"it has no {missing[0]!r}, but {held}")
            return content["images"], content["labels"]
    except Exception as error:
        # numpy and zipfile raise half a dozen types, and advise to load pickles.
        reason = str(error) if str(error).startswith("it ") else "it is damaged or no .npz file"
        if "allow_pickle" in str(error):
            reason = "it holds Python objects, which may run code when they are read"
        raise ValueError(f"{path} cannot be used: {reason}; {way_out}.") from None


@torch.no_grad()
def count_classes(model: nn.Module, dataset: TensorDataset) -> int:
    """How many logits the model has for each image of the data set.

    Raises:
        ValueError: if it cannot take the images, if its logits do not cover the labels, or if its
            answer to an image depends on the batch or changes from call to call.
    """
    images, labels = dataset.tensors
    images = images[:4].to(next(model.parameters(), images).device)
    try:
        with evaluation_mode(model):
            logits = ask(model, images)
    except Exception as error:
        raise ValueError(
            f"The network cannot take the images {tuple(images.shape)}: {_described(error)}."
        ) from error
    checked_logits(logits, len(images), name="network")
    check_classes(labels, logits.shape[1])
    check_function(model, images)
    return logits.shape[1]
