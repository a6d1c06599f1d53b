"""Small data, models and comparisons that several test files share."""

from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

ROOT = Path(__file__).resolve().parent.parent
# Makes a script work in the working directory. By default it takes the folders of the repository.
HERE = [f"--{name}={name}" for name in ("data", "models", "results", "figures")]


def halves(count=256, side=8, seed=0):
    """Which half is bright: separable, also after a shift by a pixel."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    images = 0.3 * torch.rand(count, 1, side, side, generator=generator)
    for label, part in ((0, slice(0, side // 2)), (1, slice(side // 2, side))):
        images[labels == label, :, part] += 0.5
    return TensorDataset(images, labels)


class MeanPixel(nn.Module):
    """Class 1 where the mean pixel is above 1/2: each image's distance is known."""

    def forward(self, images):
        margin = images.flatten(1).mean(dim=1) - 0.5
        return torch.stack([-margin, margin], dim=1)


def shades(margins):
    """Grey images at 0.5 + margin, whose l-infinity distance to the boundary is |margin|."""
    margins = torch.tensor(margins)
    images = (0.5 + margins)[:, None, None, None].expand(-1, 1, 28, 28).contiguous()
    return TensorDataset(images, (margins > 0).long())


def linear(seed=0, side=8, classes=2):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(side * side, classes))


def bits(state):
    """Names, types and bytes: unlike ==, tells -0.0 from 0.0 and knows NaN."""
    return [(k, v.dtype, v.shape, v.contiguous().numpy().tobytes()) for k, v in state.items()]
