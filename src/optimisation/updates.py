"""One update of the weights, and their running average."""

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

    It returns the loss and the accuracy (2,) before the update. Images and labels must be on the
    device of the model. Arguments as for `train_model`; `updates` is the number of all updates.
    `recorded` has no effect if there are several processes.
    """
    steppers = _optimizers_and_schedules(
        model, updates, learning_rate, weight_decay, precision, optimizer
    )
    device = next(model.parameters()).device

    def backward(images: Tensor, labels: Tensor, progress: float | Tensor) -> Tensor:
        loss = loss_schedule(progress)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            value, logits = loss(model, images, labels)
        if not value.requires_grad:
            raise ValueError("'loss' has no gradient by the weights of 'model'; nothing is learnt.")
        model.zero_grad(set_to_none=True)
        value.backward()
        accuracy = (predicted(logits.detach()) == labels).float().mean()
        return torch.stack([value.detach(), accuracy])

    # Recording is untested with several processes, which exchange tensors in the background.
    replayed = recorded and device.type == "cuda" and processes.process_count() == 1
    replay = Recorded(backward) if replayed else None

    def update(images: Tensor, labels: Tensor, progress: float) -> Tensor:
        if replay is None:
            outcome = backward(images, labels, progress)
        else:
            outcome = replay(images, labels, torch.full((), progress, device=device))
        # DistributedDataParallel does not support losses that call the network several times and
        # in several forms. In training, each process normalises by the statistics of its own part
        # of the batch; the running statistics, for evaluation, are averaged.
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        processes.average(gradients + [b for b in model.buffers() if b.is_floating_point()])
        # The gradients are kept: a replay writes to the same memory.
        for stepper in steppers:
            stepper.step()
        return outcome

    return update


def _optimizers_and_schedules(
    model, updates, learning_rate, weight_decay, precision, optimizer
) -> list:
    """The optimisers, then their learning-rate schedules; an update calls `step` of each."""
    weights = list(model.parameters())
    inner = [weight for weight in weights if weight.ndim > 1][1:-1] if optimizer == "muon" else []
    if optimizer == "muon" and not inner:
        raise ValueError(
            "'optimizer' = 'muon' takes the weight matrices and kernels between the first and the "
            "last, and 'model' has none there; use 'adamw'."
        )
    others = [weight for weight in weights if all(weight is not matrix for matrix in inner)]
    optimizers = [torch.optim.AdamW(others, lr=learning_rate, weight_decay=weight_decay)]
    if inner:
        dtype = getattr(torch, precision)
        optimizers += [Muon(inner, learning_rate, weight_decay=weight_decay, dtype=dtype)]
    # One step more than there are updates, because the cycle's last learning rate is zero. The rate
    # rises for a fifth of them; for longer if they are few, or the schedule would divide by zero.
    rise = max(0.2, 1.5 / (updates + 1))
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(
            o, learning_rate, updates + 1, pct_start=rise, cycle_momentum="betas" in o.defaults
        )
        for o in optimizers
    ]
    return [*optimizers, *schedules]


@torch.no_grad()
def average_weights(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the running average of weights and statistics towards the model's."""
    values = model.state_dict().values()
    for mean, value in zip(averaged.state_dict().values(), values, strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - decay)
        else:
            mean.copy_(value)
