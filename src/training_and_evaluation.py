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


def standard_loss(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy (scalar) and the logits (B, classes)."""
    logits = checked_logits(model(images), len(labels))
    return F.cross_entropy(logits, labels), logits


def adversarial_loss(
    model: nn.Module, images: Tensor, labels: Tensor, *, attack: Attack
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and logits at the attacked images.

    The inner maximum of min_theta E max_delta L(f_theta(x + delta), y) (Madry et al., ICLR
    2018), with `attack` standing in for it.
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
    device: str | torch.device | None = None,
    watch: Callable[[nn.Module], dict[str, float]] | None = None,
    select: str | None = None,
    progress: bool = True,
) -> dict:
    """Train in place with AdamW or Muon on one cycle of the learning rate (Smith, 2018).

    The model ends with the running average of its weights (Polyak and Juditsky, 1992), in
    evaluation mode; or with those of the best epoch, if `select` is given. Started by torchrun,
    the processes share each batch and end with the same weights.

    Args:
        model: images -> logits (B, classes).
        dataset: images (N, 1, 28, 28) in [0, 1] and int64 labels (N,).
        loss: (model, images, labels) -> mean loss and logits.
        epochs: passes over the data set; the last incomplete batch of each is left out.
        loss_schedule: progress in [0, 1) -> loss, in place of a fixed one.
        batch_size: images an update.
        learning_rate: at its peak.
        weight_decay: of AdamW and Muon.
        shift: largest random translation of a training image, in pixels.
        warp: largest entry of its random linear distortion (`random_warp`); 0.1 turns, shears and
            stretches by up to a tenth.
        averaging: decay of the running average of the weights, an update; 0 for none.
        precision: "float32", or "bfloat16" for convolutions and matrix products (autocast, and
            those inside Muon), with weights and statistics in float32: faster on processors with
            units for it.
        optimizer: "adamw", or "muon" for the weights between the first and the last layer
            (`src/muon.py`): more is learnt in as many epochs, each about a tenth longer.
        recorded: on CUDA, record loss and gradients of an update once and replay them, which spares
            Python's time (`src/cuda_graph.py` says what the loss must keep to); `loss_schedule`
            then gets a tensor without dimensions. No effect elsewhere.
        seed: of the order of the images, their shifts and warps. Losses that draw noise use torch's
            global generator: call `seed_everything` for those.
        device: where to train; default: where the model is.
        watch: averaged model -> figures, called after each epoch.
        select: the figure of `watch` whose highest value picks the epoch to end with.
        progress: show a progress bar.

    Returns:
        `step_loss`, `step_accuracy`: lists, one entry an update. `epochs`: a dictionary an
        epoch, of its number, mean loss and accuracy in training, seconds so far and the
        figures of `watch`. `best_epoch`: the number of the epoch the model ends with.

    Raises:
        ValueError: for an argument out of its range, for a model whose logits do not fit the
            labels, and for one that has no weights to train (none for Muon, with "muon").
        RuntimeError: if the loss is no longer finite.
    """
    _check_training(model, dataset, epochs, batch_size, learning_rate, weight_decay, averaging)
    check_count("seed", seed, 0)
    check_count("shift", shift, 0)
    check_number("warp", warp)
    check_precision(precision, FLOATS)
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"'optimizer' is {optimizer!r}; use one of {', '.join(OPTIMIZERS)}.")
    if select and not watch:
        raise ValueError("'select' needs 'watch', which gives the figures to select by.")
    batch_size = min(batch_size, len(dataset))
    if batch_size % processes.process_count():
        raise ValueError(
            f"'batch_size' = {batch_size} must be a multiple of the number of processes, "
            f"{processes.process_count()}."
        )
    if not processes.is_main():
        # Noise of its own: the first process has that of a run alone.
        torch.manual_seed(processes.own_seed(seed))
    updates = epochs * (len(dataset) // batch_size)
    device = device or next(model.parameters()).device
    model.to(device)
    # All of it, once: MNIST is 190 MB, and shifts and warps are then made on the device as well.
    dataset = TensorDataset(*(tensor.to(device) for tensor in dataset.tensors))
    _check_network(model, dataset, batch_size)
    processes.share_weights(model)
    schedule = loss_schedule or (lambda progress: loss)
    update = updater(
        model,
        schedule,
        updates,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        precision=precision,
        optimizer=optimizer,
        recorded=recorded,
    )
    averaged = copy.deepcopy(model).eval()
    history = {"step_loss": [], "step_accuracy": [], "epochs": [], "best_epoch": epochs}
    best_figure, best_state = -math.inf, None
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    shown = progress and processes.is_main()
    with progress_bar(shown, total=updates, desc="training", unit="step") as bar:
        for epoch in range(1, epochs + 1):
            model.train()
            steps = []
            for images, labels in shuffled(dataset, batch_size, shift, warp, generator):
                # Not bar.n: a bar that is switched off does not count.
                done = len(history["step_loss"]) + len(steps)
                steps.append(update(images, labels, done / updates))
                average_weights(averaged, model, min(averaging, (done + 1) / (done + 10)))
                bar.update()
            row = _epoch_row(history, epoch, torch.stack(steps))
            row |= {"seconds": time.perf_counter() - start}
            row |= processes.from_main(lambda: watch(averaged)) if watch else {}
            history["epochs"].append(row)
            if select and select not in row:
                raise ValueError(f"'select' is {select!r}, which 'watch' does not return.")
            bar.set_postfix({k: f"{v:.3f}" for k, v in row.items() if k not in _QUIET})
            if select and row[select] > best_figure:
                best_figure, best_state = row[select], copy.deepcopy(averaged.state_dict())
                history["best_epoch"] = epoch
    model.load_state_dict(best_state or averaged.state_dict())
    model.eval()
    return history


def _check_training(model, dataset, epochs, batch_size, learning_rate, weight_decay, averaging):
    check_dataset(dataset, empty=False)
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ValueError("'model' has no weights to train; set requires_grad of some.")
    check_count("epochs", epochs)
    check_count("batch_size", batch_size)
    check_number("learning_rate", learning_rate, positive=True)
    check_number("weight_decay", weight_decay)
    if not 0 <= averaging < 1:
        raise ValueError(f"'averaging' = {averaging} must be at least 0 and below 1.")


@torch.no_grad()
def _check_network(model: nn.Module, dataset: TensorDataset, batch_size: int) -> None:
    """Raise ValueError unless the logits of a first batch have all the classes of the labels.

    Once and not in every step, which must not wait for the labels on a GPU.
    """
    images, labels = dataset.tensors
    images = images[:batch_size]
    # A model that draws noise leaves the training the same draws as without this check.
    devices = [images.device] if images.is_cuda else []
    with torch.random.fork_rng(devices), evaluation_mode(model):
        logits = checked_logits(model(images), len(images))
    check_classes(labels, logits.shape[1])


_QUIET = ("epoch", "seconds")


def _epoch_row(history: dict, epoch: int, steps: Tensor) -> dict:
    """Add the updates (steps, 2) of an epoch to the history and return their means."""
    processes.average([steps])
    history["step_loss"] += steps[:, 0].tolist()
    history["step_accuracy"] += steps[:, 1].tolist()
    loss, hits = steps.mean(dim=0).tolist()
    if not math.isfinite(loss):
        raise RuntimeError(
            f"The loss is no longer finite in epoch {epoch}; lower the learning rate, 'warp', or "
            "the sigma and the weights of the loss, whichever is unusually large."
        )
    return {"epoch": epoch, "train_loss": loss, "train_accuracy": hits}


def accuracy(
    model: nn.Module,
    dataset: TensorDataset,
    *,
    attack: Attack | None = None,
    batch_size: int = 1000,
    device: str | torch.device | None = None,
) -> float:
    """Fraction of the images classified correctly, each after `attack` if one is given.

    Args:
        model: images -> logits (B, classes), run in evaluation mode and left in its own.
        dataset: images (N, 1, 28, 28) in [0, 1] and int64 labels (N,).
        attack: (model, images, labels) -> images.
        batch_size: images a batch.
        device: where to compute; default: where the model is.

    Raises:
        ValueError: if the data set is empty or not as described, if the logits do not fit its
            labels, and if `attack` returns anything but images in [0, 1] of the same shape; if the
            model's answer to an image depends on its batch, or changes from call to call under an
            attack (without one, that is warned of, but for a SmoothClassifier, which then makes one
            noisy draw).
    """
    check_dataset(dataset, empty=False)
    hits = correct(model, dataset, attack=attack, batch_size=batch_size, device=device)
    return hits.double().mean().item()


@with_gradients()
def correct(
    model: nn.Module,
    dataset: TensorDataset,
    *,
    attack: Attack | None = None,
    batch_size: int = 1000,
    device: str | torch.device | None = None,
) -> Tensor:
    """Whether each image is classified correctly, bool (N,); arguments as for `accuracy`."""
    check_dataset(dataset)
    check_count("batch_size", batch_size)
    device = device or next(model.parameters(), dataset.tensors[0]).device
    hits = []
    # The noise of a SmoothClassifier is meant to change; under attack it would pass for a success.
    noisy = attack is None and getattr(model, "draws_noise", False)
    checked = model.base_classifier if noisy else model
    check_function(checked, dataset.tensors[0][:4].to(device), may_change=attack is None)
    with evaluation_form(model, probe=True) as network:
        for images, labels in zip(*(t.split(batch_size) for t in dataset.tensors), strict=True):
            images, labels = images.to(device), labels.to(device)
            if attack is not None:
                images = attacked_batch(attack, model, images, labels)
            hits.append(stands(network, images, labels).cpu())
    return torch.cat(hits)


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
    two_sided: bool = False,
    progress: bool = True,
) -> Iterator[dict]:
    """Certify every image of a data set: one row an image, as soon as it is finished.

    Args:
        smooth_classifier: the SmoothClassifier to certify.
        dataset: images (N, 1, 28, 28) in [0, 1] and int64 labels (N,).
        n0, n, alpha, batch_size, seed: as for `SmoothClassifier.certify`.
        indices: the images of `dataset` to certify; default: all.
        two_sided: give the certificate from bounds on both sides as well.
        progress: show a progress bar.

    Returns:
        An iterator of dictionaries with the columns of the result rows: `index`, `label`,
        `prediction`, `correct` (0 or 1), `radius`, `p_lower`, `top_count`, `n0`, `n`, `alpha`,
        `sigma`, `seed`; with `two_sided` also `rival_count` and `radius_two_sided`.

    Raises:
        ValueError: for an argument out of its range.
    """
    indices = list(range(len(dataset)) if indices is None else indices)
    dataset = subset(dataset, indices)
    check_dataset(dataset)
    images, labels = dataset.tensors
    check_classes(labels, smooth_classifier.num_classes)
    settings = {"n0": n0, "n": n, "alpha": alpha}
    # Here and not in the generator below, whose body starts with the first row asked for.
    smooth_classifier.certify(
        images[:0], **settings, batch_size=batch_size, seed=seed, indices=indices[:0]
    )

    def rows() -> Iterator[dict]:
        bar = progress_bar(progress, indices, desc="certifying", unit="image")
        for index, image, label in zip(bar, images, labels.tolist(), strict=True):
            certificate = smooth_classifier.certify(
                image, **settings, batch_size=batch_size, seed=seed, indices=[index]
            )
            prediction = int(certificate.prediction)
            tight = {
                "rival_count": int(certificate.rival_count),
                "radius_two_sided": float(certificate.radius_two_sided),
            }
            yield {
                "index": int(index),
                "label": label,
                "prediction": prediction,
                "correct": int(prediction == label),
                "radius": float(certificate.radius),
                "p_lower": float(certificate.p_lower),
                "top_count": int(certificate.top_count),
                **settings,
                "sigma": smooth_classifier.sigma,
                "seed": seed,
                **(tight if two_sided else {}),
            }

    return rows()
