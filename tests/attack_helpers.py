"""Models with known answers and the comparisons that the tests of attacks share."""

import torch
import torch.nn.functional as F
from torch import nn

from src.models import ConvNN


class Linear(nn.Module):
    """Logits x W + b: the loss of two classes is monotone in one direction."""

    def __init__(self, classes=2, scale=1.0, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(scale * torch.randn(784, classes, generator=generator))
        self.bias = nn.Parameter(torch.randn(classes, generator=generator))

    def forward(self, images):
        return images.flatten(1) @ self.weight.to(images.dtype) + self.bias.to(images.dtype)


class Scaled(nn.Module):
    def __init__(self, model, factor):
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, images):
        return self.factor * self.model(images)


def random_batch(count, classes=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand((count, 1, 28, 28), generator=generator)
    return images, torch.randint(classes, (count,), generator=generator)


@torch.no_grad()
def wrong(model, images, labels):
    return model(images).argmax(dim=1) != labels


@torch.no_grad()
def margin(model, images, labels):
    logits = model(images).double()
    own = logits.gather(1, labels[:, None])[:, 0]
    return own - logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)


def length(change, norm):
    flat = change.flatten(1)
    return flat.abs().amax(dim=1) if norm == "linf" else flat.norm(dim=1)


def best_l2_change(images, direction, epsilon):
    """Maximises direction * change in ball and box: clip(t * direction), t by bisection."""
    low, high = torch.zeros(len(images), 1), torch.full((len(images), 1), 1e4)
    for _ in range(100):
        middle = (low + high) / 2
        change = (images + middle * direction).clamp(0, 1) - images
        inside = change.norm(dim=1, keepdim=True) <= epsilon
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return (images + low * direction).clamp(0, 1) - images


def snapshot(model):
    """Everything of the model and of torch that an attack must leave alone."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    flags = [p.requires_grad for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    return state, gradients, flags, modes, torch.get_rng_state(), torch.is_grad_enabled()


def equal(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and equal([*first.values()], [*second.values()])
    if isinstance(first, list | tuple):
        return all(equal(a, b) for a, b in zip(first, second, strict=True))
    return first == second


def mixed_modes(model):
    model.train()
    model.norm1.eval()


def trained_network():
    """A small network that knows ten faint patterns in noise, and 200 images of them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        patterns = torch.rand(10, 1, 28, 28)
        labels = torch.arange(400) % 10
        images = (0.5 + 0.2 * (patterns[labels] - 0.5) + 0.1 * torch.randn(400, 1, 28, 28)).clamp(
            0, 1
        )
        model = ConvNN((4, 8))
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(25):
            optimizer.zero_grad()
            F.cross_entropy(model(images[200:]), labels[200:]).backward()
            optimizer.step()
    model.eval().zero_grad()
    assert wrong(model, images[:200], labels[:200]).float().mean() < 0.1
    return model, images[:200], labels[:200]
