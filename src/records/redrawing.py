"""Rows of certificates drawn again from the model that is said to be behind them."""

import os
from pathlib import Path

import numpy as np
from torch import nn
from torch.utils.data import TensorDataset

from src.checkpoints import load_checkpoint
from src.checks import check_dataset
from src.engine.forms import form_name
from src.engine.lattice import LEVELS
from src.models import SmoothClassifier
from src.records.identity import model_identity
from src.records.recording import is_same_draw
from src.records.rows import NUM_CLASSES, older_columns, read_rows
from src.records.twins import different_settings, read_exactly, read_twin
from src.training_and_evaluation import evaluate_robustness
from src.utils import data_digest, get_device, load_mnist

# How many of 1,000 votes may change in another form of the network, whose rounding decides ties
# differently.
OTHER_FORM = 1


def redraw(
    path: str | os.PathLike,
    rows: int,
    checkpoint: str | None = None,
    data: str | None = None,
    *,
    model: nn.Module | None = None,
    dataset: TensorDataset | None = None,
) -> list[str]:
    """Certify randomly chosen rows of a file again and compare the results.

    They must be equal if the votes are exact, or the network votes in the form that made the rows.
    In another form, OTHER_FORM of 1,000 votes may differ, and 2 more.

    Args:
        path: file of certificates.
        rows: how many to draw again; all if there are fewer.
        checkpoint: file of the model.
        data: folder of MNIST; None is `data` of the repository.
        model: the base classifier itself, or its SmoothClassifier, in place of `checkpoint`.
        dataset: the images behind the rows, if not the test images of MNIST.

    Returns:
        One sentence per difference; empty if there is none.

    Raises:
        OSError, ValueError: if a file cannot be used, or this machine lacks the type of device
            that made the rows.
    """
    if checkpoint is None and model is None:
        raise ValueError(
            "--redraw needs --checkpoint, the model behind the rows (of another class than ConvNN: "
            "call src.records.redraw(path, rows, model=..., dataset=...) in Python)."
        )
    settings = read_twin(Path(path).with_suffix(".json"))["settings"]
    if missing := {"precision", "model_digest", "data_digest"} - settings.keys():
        raise ValueError(f"{path} cannot be drawn again: its twin has no {min(missing)}.")
    if older_columns(read_exactly(Path(path))):
        raise ValueError(f"{path} cannot be drawn again: it is of an older release.")
    classes = settings.get("num_classes", NUM_CLASSES)
    # Exact votes are the same on every device; the CPU is the fastest.
    device = get_device("cpu" if settings.get("exact") else settings.get("device", "cpu"))
    if model is None:
        model = load_checkpoint(checkpoint, device)
    model = model.base_classifier if isinstance(model, SmoothClassifier) else model
    test = load_mnist("test", data) if dataset is None else dataset
    check_dataset(test)
    found = read_rows(path)
    if settings["data_digest"] != data_digest(test):
        which = "test " if dataset is None else ""
        return [f"the {which}images are not those behind the rows"]
    if other := _other_model(model, test, settings, classes):
        return [f"{checkpoint or 'the model given'} is not the model behind the rows{other}"]
    if (here := next(model.parameters(), test.tensors[0]).device.type) != device.type:
        raise ValueError(
            f"'model' is on {here}; move it to {device.type}, where the rows were made."
        )
    # Fresh entropy: whoever alters a row must not know which rows are drawn again.
    chosen = np.random.default_rng().choice(len(found), min(rows, len(found)), replace=False)
    problems = (
        _difference(found[number], model, test, settings, classes) for number in sorted(chosen)
    )
    return [problem for problem in problems if problem]


def _difference(
    row: dict, model: nn.Module, dataset: TensorDataset, settings: dict, classes: int
) -> str:
    """How a row differs from the same one drawn again, a sentence; "" if it does not."""
    precision, recorded = settings["precision"], settings.get("form")
    options = {"precision": precision, "levels": settings.get("levels", LEVELS)}
    smooth = SmoothClassifier(model, float(row["sigma"]), classes, **options)
    budget = {"n0": int(row["n0"]), "n": int(row["n"]), "alpha": float(row["alpha"])}
    budget |= {"seed": int(row["seed"]), "indices": [int(row["index"])], "progress": False}
    (again,) = evaluate_robustness(smooth, dataset, **budget)
    form, few = form_name(model, precision), int(row["n"]) * OTHER_FORM // 1000 + 2
    same = settings.get("exact") is True or form == recorded
    if is_same_draw(row, again, 0 if same else few):
        return ""
    hint = "" if form == recorded else f"; the form was {recorded!r}, here it is {form!r}"
    if not hint and "model_class" in settings and is_same_draw(row, again, few):
        hint = "; a few votes of a network in floats may depend on threads and processor"
    return f"image {row['index']} drawn again gives another row{hint}"


def _other_model(model: nn.Module, dataset: TensorDataset, settings: dict, classes: int) -> str:
    """How a model differs from the one that a twin describes, for a sentence; "" if it does not."""
    try:
        identity = model_identity(model, dataset.tensors[0], classes)
    except ValueError as error:
        return f": {error}"
    keys = ("model_digest", "model_class", "outputs")
    different = different_settings(*({k: of.get(k) for k in keys} for of in (settings, identity)))
    words = " and ".join(key.replace("model_digest", "state") for key in different)
    return f" (it differs in {words.replace('model_', '')})" if words else ""
