"""A fixture that several tests of evaluations share."""

import pytest
import torch
from torch.utils.data import TensorDataset

from src.models import ConvNN


@pytest.fixture(scope="module")
def untrained():
    """A network that misleads single steps, and labels of which it gets most right."""
    torch.manual_seed(0)
    model = ConvNN((2, 3)).eval()
    images = torch.rand(40, 1, 28, 28)
    model.output.bias.data -= model(images).mean(dim=0)
    labels = model(images).argmax(dim=1).detach()
    labels[:5] = (labels[:5] + 1) % 10
    return model, TensorDataset(images, labels)
