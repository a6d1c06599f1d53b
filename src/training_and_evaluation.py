"""Losses, the training loop, and what is measured on a trained model."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from src.attacks import attacked_batch
from src.certification import ONE_SIDED, TWO_SIDED
from src.checks import (
    check_classes,
    check_count,
    check_dataset,
    check_function,
    check_number,
    checked_logits,
    evaluation_mode,
)
from src.engine.parts import FLOATS, check_precision
from src.engine.untouched import evaluation_form
from src.optimisation import processes
from src.optimisation.augmentation import shuffled
from src.optimisation.updates import OPTIMIZERS, average_weights, updater
from src.utils import progress_bar, subset
from src.verdicts import stands, with_gradients

Loss = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
# Columns of an epoch's row that the progress bar leaves out.
_NOT_IN_BAR = ("epoch", "seconds")


def standard_loss(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy (scalar) and the logits (B, classes)."""
    logits = checked_logits(model(images), len(labels))
    return F.cross_entropy(logits, labels), logits


def adversarial_loss(
    model: nn.Module, images: Tensor, labels: Tensor, *, attack: Attack
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy and logits at the images that `attack(model, images, labels)` returns.

    Adversarial training is min_theta E max_delta L(f_theta(x + delta), y) (Madry et al., ICLR
    2018); `attack` approximates the inner maximum.
    """
    return standard_loss(model, attack(model, images, labels), labels)


@with_gradients()
def train_model(
    model: nn.Module,
    dataset: TensorDataset,
    *,
    loss: Loss = standard_loss,
    epochs: int,
    loss_schedule: Callable[[float | Tensor], Loss] | None = None,
    batch_size: int = 256,
    learning_rate: float = 1e-2,
    weight_decay: float = 1e-2,
    shift: int = 1,
    warp: float = 0.0,
    averaging: float = 0.995,
    precision: str = "float32",
    optimizer: str = "adamw",
    recorded: bool = False,
    seed: int = 0,
    watch: Callable[[nn.Module], dict[str, float]] | None = None,
    select: str | None = None,
    progress: bool = True,
) -> dict:
    """Train in place with AdamW or Muon and one cycle of the learning rate (Smith, 2018).

    Afterwards the model is in evaluation mode and has the running average of its weights (Polyak
    and Juditsky, 1992), of the last epoch or, with `select`, of the best one. The processes of
    torchrun share each batch and end with the same weights.

    Args:
        model: images -> logits (B, classes). It is trained on the device where it is.
        dataset: images (N, C, H, W) in [0, 1] and int64 labels (N,).
        loss: (model, images, labels) -> mean loss and logits.
        epochs: passes over the data set. Each leaves out its last incomplete batch.
        loss_schedule: progress in [0, 1) -> loss, in place of `loss`.
        batch_size: images per update.
        learning_rate: its highest value in the cycle.
        weight_decay: of AdamW and Muon.
        shift: largest random translation of a training image, in pixels.
        warp: largest entry of the random linear distortion (`random_warp`); 0.1 turns, shears and
            stretches by up to a tenth.
        averaging: decay of the running average per update; 0 for no averaging.
        precision: "float32", or "bfloat16" for convolutions and matrix products (autocast, and
            inside Muon), with weights and statistics in float32. That is faster on processors with
            units for bfloat16.
        optimizer: "adamw", or "muon" for the weights between the first and the last layer. Muon
            learns more per epoch, and an epoch takes about a tenth longer.
        recorded: on CUDA, record loss and gradients of an update once and replay them, which saves
            Python's time. `Recorded` in `src/optimisation/cuda_graph.py` says what the loss may
            not do; `loss_schedule` then gets a tensor without dimensions. No effect elsewhere.
        seed: of the order of the images, their shifts and warps. Losses that draw noise use torch's
            global generator, which `seed_everything` seeds.
        watch: averaged model -> figures by name, called after each epoch.
        select: name of the figure of `watch` whose highest value marks the best epoch.
        progress: show a progress bar.

    Returns:
        `step_loss`, `step_accuracy`: lists with one entry per update. `epochs`: one dictionary per
        epoch with `epoch` (its number, from 1), `train_loss`, `train_accuracy`, `seconds` since the
        start and the figures of `watch`. `best_epoch`: number of the epoch whose weights are kept.

    Raises:
        ValueError: for an argument out of its range, for logits that do not fit the labels, and for
            a model without weights to train (for "muon": without weights between two layers).
        RuntimeError: if the loss is no longer finite.
    """
    numbers = {"learning_rate": learning_rate, "weight_decay": weight_decay, "warp": warp}
    _check_training(model, dataset, epochs, batch_size, numbers, averaging)
    check_count("seed", seed, 0)
    check_count("shift", shift, 0)
    check_precision(precision, FLOATS)
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"'optimizer' is {optimizer!r}; use one of {', '.join(OPTIMIZERS)}.")
    if select and not watch:
        raise ValueError("'select' needs 'watch', which gives the figures to select by.")
    batch_size = min(batch_size, len(dataset))
    if batch_size % (count := processes.process_count()):
        raise ValueError(
            f"'batch_size' = {batch_size} must be a multiple of the number of processes, {count}."
        )
    if not processes.is_main():
        # Noise of its own. The first process draws the noise of a run without torchrun.
        torch.manual_seed(processes.own_seed(seed))
    updates = epochs * (len(dataset) // batch_size)
    # All images at once: MNIST has 190 MB, and shifts and warps are then made on the device too.
    device = next(model.parameters()).device
    dataset = TensorDataset(*(tensor.to(device) for tensor in dataset.tensors))
    _check_network(model, dataset, batch_size)
    processes.share_weights(model)
    rates = {"learning_rate": learning_rate, "weight_decay": weight_decay}
    forms = {"precision": precision, "optimizer": optimizer, "recorded": recorded}
    update = updater(model, loss_schedule or (lambda _: loss), updates, **rates, **forms)
    kept = _KeptWeights(model, averaging, select)
    history = {"step_loss": [], "step_accuracy": [], "epochs": []}
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    shown = progress and processes.is_main()
    with progress_bar(shown, total=updates, desc="training", unit="step") as bar:
        for epoch in range(1, epochs + 1):
            batches = shuffled(dataset, batch_size, shift, warp, generator)
            # Not bar.n: a bar that is switched off does not count.
            steps = _train_epoch(update, batches, kept, len(history["step_loss"]), updates, bar)
            row = _epoch_row(history, epoch, steps) | {"seconds": time.perf_counter() - start}
            row |= processes.from_main(lambda: watch(kept.averaged)) if watch else {}
            history["epochs"].append(row)
            kept.choose(row)
            bar.set_postfix({k: f"{v:.3f}" for k, v in row.items() if k not in _NOT_IN_BAR})
    return history | {"best_epoch": kept.load()}


class _KeptWeights:
    """The running average of a model's weights, and a copy of it from the best epoch so far."""

    def __init__(self, model: nn.Module, decay: float, select: str | None):
        self.model, self.decay, self.select = model, decay, select
        self.averaged = copy.deepcopy(model).eval()
        self.epoch, self.highest, self.best_state = 0, -math.inf, None

    def follow(self, done: int) -> None:
        """Average in the weights after an update; before it there were `done` others."""
        average_weights(self.averaged, self.model, min(self.decay, (done + 1) / (done + 10)))

    def choose(self, row: dict) -> None:
        """Copy the average if the epoch of this row is the best so far by the figure `select`."""
        if self.select and self.select not in row:
            raise ValueError(f"'select' is {self.select!r}, which 'watch' does not return.")
        if self.select and row[self.select] > self.highest:
            self.highest, self.epoch = row[self.select], row["epoch"]
            self.best_state = copy.deepcopy(self.averaged.state_dict())
        elif self.best_state is None:
            self.epoch = row["epoch"]

    def load(self) -> int:
        """Give the model the best average, or the last one; returns the number of its epoch."""
        self.model.load_state_dict(self.best_state or self.averaged.state_dict())
        self.model.eval()
        return self.epoch


def _train_epoch(
    update: Callable, batches: Iterator, kept: _KeptWeights, done: int, updates: int, bar
) -> Tensor:
    """Loss and accuracy (steps, 2) of one epoch's updates; `done` of all `updates` come before."""
    kept.model.train()
    steps = []
    for number, (images, labels) in enumerate(batches, done):
        steps.append(update(images, labels, number / updates))
        kept.follow(number)
        bar.update()
    return torch.stack(steps)


def _check_training(model, dataset, epochs, batch_size, numbers, averaging) -> None:
    check_dataset(dataset, empty=False)
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ValueError("'model' has no weights to train; set requires_grad of some.")
    check_count("epochs", epochs)
    check_count("batch_size", batch_size)
    for name, value in numbers.items():
        check_number(name, value, positive=name == "learning_rate")
    if not 0 <= averaging < 1:
        raise ValueError(f"'averaging' = {averaging} must be at least 0 and below 1.")


@torch.no_grad()
def _check_network(model: nn.Module, dataset: TensorDataset, batch_size: int) -> None:
    """Raise ValueError unless the logits of a first batch have all the classes of the labels.

    Only once: in every step, Python would have to wait for the labels on a GPU.
    """
    images, labels = dataset.tensors
    images = images[:batch_size]
    # A model that draws noise leaves the training the same draws as without this check.
    devices = [images.device] if images.is_cuda else []
    with torch.random.fork_rng(devices), evaluation_mode(model):
        logits = checked_logits(model(images), len(images))
    check_classes(labels, logits.shape[1])


def _epoch_row(history: dict, epoch: int, steps: Tensor) -> dict:
    """Add the updates (steps, 2) of an epoch to the history and return their means."""
    processes.average([steps])
    history["step_loss"] += steps[:, 0].tolist()
    history["step_accuracy"] += steps[:, 1].tolist()
    loss, share = steps.mean(dim=0).tolist()
    if not math.isfinite(loss):
        raise RuntimeError(
            f"The loss is no longer finite in epoch {epoch}; lower the learning rate, 'warp', or "
            "the sigma and the weights of the loss, whichever is unusually large."
        )
    return {"epoch": epoch, "train_loss": loss, "train_accuracy": share}


def accuracy(
    model: nn.Module,
    dataset: TensorDataset,
    *,
    attack: Attack | None = None,
    batch_size: int = 1000,
) -> float:
    """Fraction of the images that are classified correctly, after `attack` if one is given.

    Args:
        model: images -> logits (B, classes). It computes where it is, in evaluation mode; its own
            mode is restored.
        dataset: images (N, C, H, W) in [0, 1] and int64 labels (N,).
        attack: (model, images, labels) -> images.
        batch_size: images per batch.

    Raises:
        ValueError: if the data set is empty or not as described; if the logits do not fit its
            labels; if `attack` returns anything but images in [0, 1] of the same shape; if the
            model's answer to an image depends on the other images of the batch; and, under an
            attack, if its answer changes from call to call. Without an attack that is only a
            warning, and not even that for a SmoothClassifier, which makes one noisy draw.
    """
    check_dataset(dataset, empty=False)
    standing = correct(model, dataset, attack=attack, batch_size=batch_size)
    return standing.double().mean().item()


@with_gradients()
def correct(
    model: nn.Module,
    dataset: TensorDataset,
    *,
    attack: Attack | None = None,
    batch_size: int = 1000,
) -> Tensor:
    """Whether each image is classified correctly, bool (N,); arguments as for `accuracy`."""
    check_dataset(dataset)
    check_count("batch_size", batch_size)
    device = next(model.parameters(), dataset.tensors[0]).device
    standing = []
    # A SmoothClassifier's noise is intended; under attack it would look like a successful attack.
    noisy = attack is None and getattr(model, "draws_noise", False)
    checked = model.base_classifier if noisy else model
    check_function(checked, dataset.tensors[0][:4].to(device), may_change=attack is None)
    with evaluation_form(model, probe=True) as network:
        for images, labels in zip(*(t.split(batch_size) for t in dataset.tensors), strict=True):
            images, labels = images.to(device), labels.to(device)
            if attack is not None:
                images = attacked_batch(attack, model, images, labels)
            standing.append(stands(network, images, labels).cpu())
    return torch.cat(standing)


def evaluate_robustness(
    smooth_classifier: nn.Module,
    dataset: TensorDataset,
    *,
    n0: int = 100,
    n: int = 100_000,
    alpha: float = 0.001,
    batch_size: int | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    progress: bool = True,
) -> Iterator[dict]:
    """Certify every image of a data set. The iterator gives one row per image, once it is done.

    Args:
        smooth_classifier: the SmoothClassifier to certify.
        dataset: images (N, C, H, W) in [0, 1] and int64 labels (N,).
        n0, n, alpha, batch_size, seed: as for `SmoothClassifier.certify`.
        indices: numbers of the images of `dataset` to certify; default: all.
        progress: show a progress bar.

    Returns:
        An iterator of dictionaries with the columns of the result rows: `index`, `label`,
        `prediction`, `correct` (0 or 1), `radius`, `p_lower`, `top_count`, `rival_count`,
        `radius_tight`, `test` ("one-sided" or "two-sided"), `n0`, `n`, `alpha`, `sigma`, `seed`.

    Raises:
        ValueError: for an argument out of its range.
    """
    indices = list(range(len(dataset)) if indices is None else indices)
    dataset = subset(dataset, indices)
    check_dataset(dataset)
    images, labels = dataset.tensors
    check_classes(labels, smooth_classifier.num_classes)
    budget = {"n0": n0, "n": n, "alpha": alpha}
    options = budget | {"batch_size": batch_size, "seed": seed}
    # Checks the arguments now; the body of the generator below runs only with its first row.
    smooth_classifier.certify(images[:0], **options, indices=indices[:0])
    settings = budget | {"sigma": smooth_classifier.sigma, "seed": seed}

    def rows() -> Iterator[dict]:
        bar = progress_bar(progress, indices, desc="certifying", unit="image")
        certificates = smooth_classifier.certify_each(images, **options, indices=indices)
        for index, label, certificate in zip(bar, labels.tolist(), certificates, strict=True):
            yield _certificate_row(int(index), label, certificate, settings)

    return rows()


def _certificate_row(index: int, label: int, certificate, settings: dict) -> dict:
    """The columns of one image's result row."""
    prediction = int(certificate.prediction)
    return {
        "index": index,
        "label": label,
        "prediction": prediction,
        "correct": int(prediction == label),
        "radius": float(certificate.radius),
        "p_lower": float(certificate.p_lower),
        "top_count": int(certificate.top_count),
        "rival_count": int(certificate.rival_count),
        "radius_tight": float(certificate.radius_tight),
        "test": TWO_SIDED if certificate.test == 2 else ONE_SIDED,
        **settings,
    }
