"""Rows of certificates drawn again from the model that is said to be behind them."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import TensorDataset

from src.checkpoints import load_checkpoint, weights_digest
from src.models import SmoothClassifier
from src.native import form_name
from src.records.rows import is_same_draw, read_rows, read_twin, record_certificates
from src.training_and_evaluation import evaluate_robustness
from src.utils import get_device, load_mnist, subset

# Votes that may fall otherwise, of a thousand, where another form of the network casts them: in a
# tie of rounding errors.
OTHER_FORM = 1


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
    """Certify randomly chosen rows of a file again and compare them.

    Exactly if the network votes in the form that made them, else up to OTHER_FORM votes in 1,000.

    Args:
        path: file of certificates of MNIST test images.
        rows: how many to draw again, all of them if there are fewer.
        checkpoint: the model.
        data: folder of MNIST.

    Returns:
        What differs, a sentence each; empty if nothing does.

    Raises:
        OSError, ValueError: if a file cannot be used, or this machine has no device of the type
            that made the rows.
    """
    if checkpoint is None:
        raise ValueError("--redraw needs --checkpoint, the model behind the rows.")
    settings = read_twin(Path(path).with_suffix(".json"))["settings"]
    if missing := {"precision", "model_digest", "data_digest"} - settings.keys():
        raise ValueError(f"{path} cannot be drawn again: its twin has no {min(missing)}.")
    precision = settings["precision"]
    # Each type of device has its own noise.
    model = load_checkpoint(checkpoint, get_device(settings.get("device", "cpu")))
    test, found = load_mnist("test", data), read_rows(path)
    if settings["model_digest"] != weights_digest(model.state_dict()):
        return [f"{checkpoint} is not the model behind the rows"]
    if settings["data_digest"] != data_digest(test):
        return ["the test images are not those behind the rows"]
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
        votes = 0 if form == recorded else int(row["n"]) * OTHER_FORM // 1000 + 2
        if not is_same_draw(row, again, votes):
            problems.append(f"image {row['index']} drawn again gives another row{hint}")
    return problems


def certify_dataset(
    smooth: SmoothClassifier,
    dataset: TensorDataset,
    path: str | os.PathLike,
    *,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    resume: bool = False,
    two_sided: bool = False,
    facts: Mapping | None = None,
    shard: str | None = None,
    progress: bool = True,
) -> list[dict[str, str]]:
    """Certify a data set to a file of rows with its twin; see `record_certificates`.

    Args:
        smooth: the classifier to certify.
        dataset: images (N, 1, 28, 28) in [0, 1] and int64 labels (N,).
        path: the CSV file.
        n0, n, alpha, seed, indices, two_sided, progress: as for `evaluate_robustness`.
        resume: go on with the rows that an interrupted run has left.
        facts: what else is worth knowing of the run, JSON values.
        shard: "k/n" if `indices` are a part of the images, to be merged with the others.
    """
    indices = list(range(len(dataset)) if indices is None else indices)
    settings = {"n0": n0, "n": n, "alpha": alpha, "seed": seed}
    settings |= {"two_sided": True} if two_sided else {}
    part = {"shard": shard} if shard else {}
    return record_certificates(
        path,
        indices,
        lambda left: evaluate_robustness(
            smooth, dataset, **settings, indices=left, progress=progress and len(left) > 1
        ),
        certificate_settings(smooth, dataset, **settings) | part,
        facts or {},
        labels=subset(dataset, indices).tensors[1].tolist(),
        resume=resume,
    )


def certificate_settings(smooth: SmoothClassifier, test: TensorDataset, **settings) -> dict:
    """What rows of certificates depend on, for their twin."""
    return {
        "model_digest": weights_digest(smooth.base_classifier.state_dict()),
        "network": smooth.base_classifier.config,
        "data_digest": data_digest(test),
        "sigma": smooth.sigma,
        "device": next(smooth.parameters()).device.type,
        "num_classes": smooth.num_classes,
        "precision": smooth.precision,
        "form": form_name(smooth.base_classifier, smooth.precision),
        **settings,
    }
