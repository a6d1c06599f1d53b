"""One update of the weights, their running average, and the order and shifts of the images."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from src.checks import predicted
from src.optimisation import processes
from src.optimisation.cuda_graph import Recorded
from src.optimisation.muon import Muon

OPTIMIZERS = ("adamw", "muon")


def updater(
    model: nn.Module,
    loss_schedule: Callable,
    updates: int,
    *,
    learning_rate: float,
    weight_decay: float,
    precision: str,
    optimizer: str,
    recorded: bool = False,
) -> Callable[..., Tensor]:
    """A function (images, labels, progress) that updates the model once.

    It returns the loss and the accuracy (2,) before the update. Images and labels have to be on
    the device of the model; `loss_schedule` takes the progress in [0, 1) to a loss. If `recorded`,
    loss and gradients are those of a CUDA graph in a process alone on CUDA, and the schedule is
    given the progress as a tensor without dimensions.
    """
    steps = _optimizers(model, updates, learning_rate, weight_decay, precision, optimizer)
    device = next(model.parameters()).device

    def backward(images: Tensor, labels: Tensor, progress: float | Tensor) -> Tensor:
        loss = loss_schedule(progress)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            value, logits = loss(model, images, labels)
        if not value.requires_grad:
            raise ValueError("'loss' has no gradient by the weights of 'model'; nothing is learnt.")
        model.zero_grad(set_to_none=True)
        value.backward()
        hits = (predicted(logits.detach()) == labels).float().mean()
        return torch.stack([value.detach(), hits])

    # Beside the processes of torchrun, whose exchanges go on in the background, it is untried.
    replayed = recorded and device.type == "cuda" and processes.process_count() == 1
    replay = Recorded(backward) if replayed else None

    def update(images: Tensor, labels: Tensor, progress: float) -> Tensor:
        if replay is None:
            outcome = backward(images, labels, progress)
        else:
            outcome = replay(images, labels, torch.full((), progress, device=device))
        # By hand: the losses call the network more than once and in several forms, for which
        # DistributedDataParallel is not made. The statistics of batch normalisation are each
        # process's own in the forward pass, and averaged in what evaluation uses.
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        processes.average(gradients + [b for b in model.buffers() if b.is_floating_point()])
        # The gradients stay: a replay writes to the memory of the recorded ones.
        for one in steps:
            one.step()
        return outcome

    return update


def _optimizers(model, updates, learning_rate, weight_decay, precision, optimizer) -> list:
    """The optimisers of a model, then their schedules; all have to step in every update."""
    weights = list(model.parameters())
    matrices = [weight for weight in weights if weight.ndim > 1][1:-1]
    inner = matrices if optimizer == "muon" else []
    if optimizer == "muon" and not inner:
        raise ValueError(
            "'optimizer' = 'muon' takes the weight matrices and kernels between the first and the "
            "last, and 'model' has none there; use 'adamw'."
        )
    others = [weight for weight in weights if all(weight is not one for one in inner)]
    optimizers = [torch.optim.AdamW(others, lr=learning_rate, weight_decay=weight_decay)]
    if inner:
        dtype = getattr(torch, precision)
        optimizers += [Muon(inner, learning_rate, weight_decay=weight_decay, dtype=dtype)]
    # One step more than there are updates: the cycle's last learning rate is zero. Its rise takes
    # a fifth; of a handful of updates a little more, or the schedule would divide by zero.
    rise = max(0.2, 1.5 / (updates + 1))
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            one, learning_rate, updates + 1, pct_start=rise, cycle_momentum="betas" in one.defaults
        )
        for one in optimizers
    ]
    return [*optimizers, *schedules]


@torch.no_grad()
def average_weights(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the running average of weights and statistics towards the model's."""
    for mean, value in zip(
        averaged.state_dict().values(), model.state_dict().values(), strict=True
    ):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - decay)
        else:
            mean.copy_(value)
