"""Fixtures that several test files share."""

from pathlib import Path

import pytest

from src.mnist.files import ensure_mnist


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    """The repository's `data` folder with all of MNIST, verified."""
    root = Path(__file__).resolve().parent.parent / "data"
    ensure_mnist(root)
    return root
