"""A data set certified to a file of rows, with the settings behind them in its twin."""

import itertools
import os
from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.utils.data import TensorDataset

from src.checks import check_dataset
from src.engine.forms import form_name
from src.engine.noise import to_grid
from src.models import SmoothClassifier
from src.records.identity import model_identity
from src.records.recording import record_certificates
from src.records.twins import indices_digest
from src.training_and_evaluation import evaluate_robustness
from src.utils import data_digest, subset


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
    facts: Mapping | None = None,
    shard: tuple[int, int] | None = None,
    progress: bool = True,
) -> list[dict[str, str]]:
    """Certify a data set to a file of rows with its twin; see `record_certificates`.

    The model may be any `nn.Module`. The twin tells it by its state, its class and its outputs on
    fixed images, so a resumed run with another model is refused; `redraw` and `verify` check rows.

    Args:
        smooth: the classifier to certify.
        dataset: images (N, C, H, W) in [0, 1] and int64 labels (N,).
        path: the CSV file.
        n0, n, alpha, seed, indices, progress: as for `evaluate_robustness`.
        resume: keep the rows of an interrupted run and certify the rest.
        facts: what else is worth knowing of the run, JSON values.
        shard: (k, n) to certify the k-th of n parts of these images only, to be merged later.

    Returns:
        All rows, as `read_rows` gives them.

    Raises:
        ValueError: for an argument out of its range, for a model or data that cannot be certified,
            and as `record_certificates` does. Nothing is written then.
        OSError: if the file cannot be written or another process is writing it.
    """
    check_dataset(dataset)
    indices = list(range(len(dataset)) if indices is None else indices)
    settings = {"n0": n0, "n": n, "alpha": alpha, "seed": seed}
    part, (k, parts) = {}, shard or (1, 1)
    if parts > 1:
        part = {"shard": f"{k}/{parts}", "all_indices": indices_digest(indices)}
        indices = indices[k - 1 :: parts]

    def certify(left: Sequence[int]):
        shown = progress and len(left) > 1
        return evaluate_robustness(smooth, dataset, **settings, indices=left, progress=shown)

    return record_certificates(
        path,
        indices,
        certify,
        certificate_settings(smooth, dataset, **settings) | part,
        facts or {},
        labels=subset(dataset, indices).tensors[1].tolist(),
        resume=resume,
    )


def certificate_settings(smooth: SmoothClassifier, test: TensorDataset, **settings) -> dict:
    """All that rows of certificates depend on, for their twin.

    Of `settings`, `n0` and `n` are needed.
    """
    images = test.tensors[0]
    pixels, draws = images.shape[1:].numel(), settings["n0"] + settings["n"]
    return {
        **model_identity(smooth.base_classifier, test.tensors[0], smooth.num_classes),
        "data_digest": data_digest(test),
        "sigma": smooth.sigma,
        "device": next(smooth.parameters(), test.tensors[0]).device.type,
        "num_classes": smooth.num_classes,
        "precision": smooth.precision,
        "form": form_name(smooth.base_classifier, smooth.precision),
        "exact": smooth.exact,
        "sampler_cost": smooth.sampler_cost(pixels, draws),
        "levels": smooth.levels,
        "off_grid": off_grid(images, smooth.levels),
        **settings,
    }


def off_grid(images: Tensor, levels: int) -> float:
    """The largest l2 distance of an image (B, C, H, W) from the grid of 1 / levels."""
    parts = (to_grid(part, levels)[1] for part in images.split(1000))
    return max(itertools.chain.from_iterable(parts), default=0.0)
