"""Rows of certificates drawn again from the model that is said to be behind them."""

import hashlib
import os
from pathlib import Path

import numpy as np
from torch.utils.data import TensorDataset

from src.certificates import read_rows, read_twin
from src.checkpoints import load_checkpoint, weights_digest
from src.models import SmoothClassifier
from src.native import form_name
from src.training_and_evaluation import evaluate_robustness
from src.utils import get_device, load_mnist

_COUNTED = ("label", "prediction", "correct", "top_count", "rival_count")


def data_digest(dataset: TensorDataset) -> str:
    """SHA-256 over images and labels."""
    digest = hashlib.sha256()
    for tensor in dataset.tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def redraw(
    path: str | os.PathLike, rows: int, checkpoint: str | None, data: str = "data"
) -> list[str]:
    """Certify randomly chosen rows of a file again and compare them exactly.

    Args:
        path: file of certificates of MNIST test images.
        rows: how many to draw again, all of them if there are fewer.
        checkpoint: the model.
        data: folder of MNIST.

    Returns:
        What differs, a sentence each; empty if nothing does. Another processor or form of the
        network may cast a vote differently in a tie of rounding errors.

    Raises:
        OSError, ValueError: if a file cannot be used, or this machine has no device of the type
            that made the rows.
    """
    if checkpoint is None:
        raise ValueError("--redraw needs --checkpoint, the model behind the rows.")
    settings = read_twin(Path(path).with_suffix(".json"))["settings"]
    precision = settings["precision"]
    # Each type of device has its own noise.
    model = load_checkpoint(checkpoint, get_device(settings.get("device", "cpu")))
    test, found = load_mnist("test", data), read_rows(path)
    if settings["model_digest"] != weights_digest(model.state_dict()):
        return [f"{checkpoint} is not the model behind the rows"]
    # Fresh entropy: whoever alters a row must not know which ones are drawn again.
    chosen = np.random.default_rng().choice(len(found), min(rows, len(found)), replace=False)
    form, recorded = form_name(model, precision), settings.get("form")
    hint = "" if form == recorded else f"; the form was {recorded!r}, here it is {form!r}"
    problems = []
    for row in (found[number] for number in sorted(chosen)):
        smooth = SmoothClassifier(model, float(row["sigma"]), precision=precision)
        settings = {"n0": int(row["n0"]), "n": int(row["n"]), "alpha": float(row["alpha"])}
        (again,) = evaluate_robustness(
            smooth,
            test,
            **settings,
            seed=int(row["seed"]),
            indices=[int(row["index"])],
            two_sided="rival_count" in row,
            progress=False,
        )
        # The counts decide; bounds and radii follow from them, which `verify` checks.
        if any(str(again.get(key)) != str(row.get(key)) for key in _COUNTED):
            problems.append(f"image {row['index']} drawn again gives another row{hint}")
    return problems


def certificate_settings(smooth: SmoothClassifier, test: TensorDataset, **settings) -> dict:
    """What rows of certificates depend on, for their twin."""
    return {
        "model_digest": weights_digest(smooth.base_classifier.state_dict()),
        "network": smooth.base_classifier.config,
        "data_digest": data_digest(test),
        "sigma": smooth.sigma,
        "device": next(smooth.parameters()).device.type,
        "precision": smooth.precision,
        "form": form_name(smooth.base_classifier, smooth.precision),
        **settings,
    }
