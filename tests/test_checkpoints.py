"""Checkpoints: what is saved comes back bit for bit, and the digest sees every change."""

import hashlib
import json
import math
import os

import numpy as np
import pytest
import torch
from torch import nn

from src.checkpoints import load_checkpoint, save_checkpoint, weights_digest
from src.models import ConvNN, SmoothClassifier
from tests.helpers import bits

FACTS = {
    "seed": 2**62 + 1,
    "sigma": 0.1 + 0.2,
    "tiny": math.ulp(0.0),
    "name": "é",
    "nothing": None,
    "yes": True,
    "epochs": [{"epoch": 1, "clean": 1 / 3}, {"epoch": 2, "clean": -0.0}],
}


def network(seed=0, channels=(1, 2), **options):
    """A network none of whose weights or statistics has its initial value."""
    torch.manual_seed(seed)
    model = ConvNN(channels, **options)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape).abs() * 10)
    return model


@pytest.fixture
def path(tmp_path):
    return save_checkpoint(tmp_path / "model.pt", network(), **FACTS)


@pytest.mark.parametrize("options", [{}, {"hidden": 3}, {"num_classes": 2, "channels": (3, 1)}])
@pytest.mark.parametrize("training", [True, False])
def test_round_trip_is_exact(tmp_path, options, training):
    model = network(**options).train(training)
    model.norm1.running_mean[0], model.norm2.running_var[0] = math.nan, -0.0
    path = save_checkpoint(tmp_path / "deep" / "model.pt", model, **FACTS)
    loaded = load_checkpoint(path)
    assert bits(loaded.state_dict()) == bits(model.state_dict())
    assert json.dumps(loaded.facts) == json.dumps(FACTS)
    assert loaded.config == model.config
    assert not any(module.training for module in loaded.modules())
    assert all(module.training == training for module in model.modules())


def test_loaded_network_gives_the_same_logits(path):
    images = torch.rand(3, 1, 28, 28)
    assert torch.equal(load_checkpoint(path)(images), network().eval()(images))
    assert load_checkpoint(str(path), device=torch.device("cpu")).output.weight.requires_grad


def test_same_model_gives_the_same_bytes(tmp_path):
    # A temporary name or a time in the file would break comparisons by checksum.
    files = [save_checkpoint(tmp_path / name, network(), **FACTS) for name in ("a.pt", "b.pt")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "b.pt"]


def test_digest_is_the_documented_hash():
    weights = {"b": torch.tensor([[1, 2]], dtype=torch.int64), "a": torch.tensor(0.5)}
    text = b"a torch.float32 ()\n" + np.float32(0.5).tobytes()
    text += b"b torch.int64 (1, 2)\n" + np.array([1, 2]).tobytes()
    assert weights_digest(weights) == hashlib.sha256(text).hexdigest()


def test_digest_sees_every_tensor_and_only_its_content():
    state = network().state_dict()
    digest = weights_digest(state)
    assert weights_digest(dict(reversed(state.items()))) == digest
    plain = {k: v.clone(memory_format=torch.contiguous_format) for k, v in state.items()}
    assert weights_digest(plain) == digest
    seen = {digest}
    for name in state:
        for change in ("last", "negate", "shape", "name", "drop", "type"):
            other = {key: value.clone() for key, value in plain.items()}
            flat = other[name].view(-1)
            if change == "last":
                # The smallest change there is.
                flat.view(torch.uint8)[0] ^= 1
            elif change == "negate":
                flat[-1] = -flat[-1]
            elif change == "shape":
                other[name] = other[name][None]
            elif change == "type":
                other[name] = other[name].view(
                    {4: torch.int32, 8: torch.float64}[other[name].element_size()]
                )
            elif change == "name":
                other[name + "_"] = other.pop(name)
            else:
                del other[name]
            seen.add(weights_digest(other))
    assert len(seen) == 1 + 6 * len(state)


@pytest.mark.parametrize("fault", ["disk", "facts", "model"])
def test_failed_save_leaves_the_old_file(path, monkeypatch, fault):
    before = path.read_bytes()

    def full_disk(content, file):
        file.write(b"half of it")
        raise OSError("no space left")

    if fault == "disk":
        monkeypatch.setattr(torch, "save", full_disk)
    model = nn.Linear(2, 2) if fault == "model" else network(seed=1)
    facts = {"loss": object()} if fault == "facts" else {}
    with pytest.raises({"disk": OSError, "facts": TypeError, "model": ValueError}[fault]):
        save_checkpoint(path, model, **facts)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_smoothed_network_is_not_taken_for_its_base(tmp_path):
    with pytest.raises(ValueError, match="'model' is a SmoothClassifier; save its ConvNN"):
        save_checkpoint(tmp_path / "m.pt", SmoothClassifier(network(), 0.5))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "options",
    [{"norm": 5}, {"norm": "l7"}, {"norm": ["a"]}, {"epsilon": "x"}, {"epsilon": True}]
    + [{"epsilon": value} for value in (-1, 0, 1e300, [0.3])],
    ids=str,
)
def test_a_ball_that_makes_no_sense_is_refused(options, tmp_path):
    with pytest.raises(ValueError, match="has a value of a wrong kind"):
        save_checkpoint(tmp_path / "x.pt", ConvNN((2, 2)), options=options)
    for sound in ({"norm": "l2", "epsilon": 2.0}, {"epsilon": None}, {"epsilon": 1}, {}):
        save_checkpoint(tmp_path / "x.pt", ConvNN((2, 2)), options=sound)
