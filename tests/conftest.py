"""Fixtures that several test files share."""

from pathlib import Path

import pytest
from hypothesis import settings

from src.mnist.files import ensure_mnist

# A machine that is busy with anything else takes longer than hypothesis allows for one example.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    """The repository's `data` folder with all of MNIST, verified."""
    root = Path(__file__).resolve().parent.parent / "data"
    ensure_mnist(root)
    return root
