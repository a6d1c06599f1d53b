"""Rows of certificates drawn again from the model that is said to be behind them."""

import os
from pathlib import Path

import numpy as np

from src.checkpoints import load_checkpoint, weights_digest
from src.engine.forms import form_name
from src.engine.lattice import LEVELS
from src.models import SmoothClassifier
from src.records.recording import is_same_draw
from src.records.rows import older_columns, read_rows
from src.records.twins import read_exactly, read_twin
from src.training_and_evaluation import evaluate_robustness
from src.utils import data_digest, get_device, load_mnist

# How many of 1,000 votes may change in another form of the network, whose rounding decides ties
# differently.
OTHER_FORM = 1


def redraw(
    path: str | os.PathLike, rows: int, checkpoint: str | None, data: str | None = None
) -> list[str]:
    """Certify randomly chosen rows of a file again and compare the results.

    They must be equal if the votes are exact, or the network votes in the form that made the rows.
    In another form, OTHER_FORM of 1,000 votes may differ, and 2 more.

    Args:
        path: file of certificates of MNIST test images.
        rows: how many to draw again; all if there are fewer.
        checkpoint: the model.
        data: folder of MNIST; None is `data` of the repository.

    Returns:
        One sentence per difference; empty if there is none.

    Raises:
        OSError, ValueError: if a file cannot be used, or this machine lacks the type of device
            that made the rows.
    """
    if checkpoint is None:
        raise ValueError("--redraw needs --checkpoint, the model behind the rows.")
    settings = read_twin(Path(path).with_suffix(".json"))["settings"]
    if missing := {"precision", "model_digest", "data_digest"} - settings.keys():
        raise ValueError(f"{path} cannot be drawn again: its twin has no {min(missing)}.")
    if older_columns(read_exactly(Path(path))):
        raise ValueError(f"{path} cannot be drawn again: it is of an older release.")
    precision, levels = settings["precision"], settings.get("levels", LEVELS)
    # Exact votes are the same on every device; the CPU is the fastest.
    device = "cpu" if settings.get("exact") else settings.get("device", "cpu")
    model = load_checkpoint(checkpoint, get_device(device))
    test, found = load_mnist("test", data), read_rows(path)
    if settings["model_digest"] != weights_digest(model.state_dict()):
        return [f"{checkpoint} is not the model behind the rows"]
    if settings["data_digest"] != data_digest(test):
        return ["the test images are not those behind the rows"]
    # Fresh entropy: whoever alters a row must not know which rows are drawn again.
    chosen = np.random.default_rng().choice(len(found), min(rows, len(found)), replace=False)
    form, recorded = form_name(model, precision), settings.get("form")
    same = settings.get("exact") is True or form == recorded
    hint = "" if form == recorded else f"; the form was {recorded!r}, here it is {form!r}"
    problems = []
    for row in (found[number] for number in sorted(chosen)):
        smooth = SmoothClassifier(model, float(row["sigma"]), precision=precision, levels=levels)
        settings = {"n0": int(row["n0"]), "n": int(row["n"]), "alpha": float(row["alpha"])}
        settings |= {"seed": int(row["seed"]), "indices": [int(row["index"])], "progress": False}
        (again,) = evaluate_robustness(smooth, test, **settings)
        votes = 0 if same else int(row["n"]) * OTHER_FORM // 1000 + 2
        if not is_same_draw(row, again, votes):
            problems.append(f"image {row['index']} drawn again gives another row{hint}")
    return problems
