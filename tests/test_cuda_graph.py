import pytest
import torch

from src.cuda_graph import Recorded
from src.models import ConvNN, SmoothClassifier
from src.smoothing import ramped_smoothing_loss
from src.training_and_evaluation import train_model
from tests.helpers import halves

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need CUDA")


def weights_after(device: str, recorded: bool, precision: str = "float32") -> dict:
    torch.manual_seed(0)
    smooth = SmoothClassifier(ConvNN(channels=(8, 16), hidden=32), 0.5).to(device)
    history = train_model(
        smooth,
        halves(64, side=28),
        epochs=3,
        batch_size=16,
        loss_schedule=ramped_smoothing_loss("confidence"),
        optimizer="muon",
        precision=precision,
        warp=0.1,
        recorded=recorded,
        progress=False,
    )
    return smooth.state_dict() | {"loss": torch.tensor(history["step_loss"])}


def test_recorded_has_no_effect_on_a_cpu():
    plain, recorded = (weights_after("cpu", recorded) for recorded in (False, True))
    for name, value in plain.items():
        assert torch.equal(recorded[name], value)


@on_cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_recorded_training_ends_with_the_weights_of_a_plain_one(precision, monkeypatch):
    """The noise is the same too: a replay moves the generator on as the calls would.

    Not a matter of bits: CUDA's libraries may choose other kernels in a recording.
    """
    recordings = []
    record = Recorded._record
    monkeypatch.setattr(
        Recorded, "_record", lambda self, given: recordings.append(self) or record(self, given)
    )
    plain, recorded = (weights_after("cuda", recorded, precision) for recorded in (False, True))
    assert len(recordings) == 1
    for name, value in plain.items():
        torch.testing.assert_close(recorded[name], value, rtol=1e-2, atol=1e-3)


@on_cuda
def test_replays_compute_from_what_they_are_given():
    calls = []

    def product(x, factor):
        calls.append(len(calls))
        return factor * x

    recorded, outputs = Recorded(product), []
    given = [(torch.full((3,), i + 1.0), torch.tensor(0.5 + i)) for i in range(7)]
    for x, factor in given:
        outputs.append(recorded(x.cuda(), factor.cuda()))
    assert len(calls) == 4
    for (x, factor), output in zip(given, outputs, strict=True):
        assert torch.equal(output.cpu(), factor * x)
    with pytest.raises(ValueError, match=r"Recorded with a tensor \(3,\).*called with \(1,\)"):
        recorded(torch.ones(1).cuda(), torch.tensor(1.0).cuda())


@on_cuda
def test_replays_leave_gradients_and_draw_the_noise_of_plain_calls():
    def backward(x):
        weight.grad = None
        value = (weight * (x + torch.randn_like(x))).sum()
        value.backward()
        return value.detach()

    found = []
    for function in (backward, Recorded(backward)):
        torch.manual_seed(3)
        weight = torch.ones(5, device="cuda", requires_grad=True)
        found.append([])
        for i in range(7):
            value = function(torch.full((5,), float(i), device="cuda"))
            found[-1] += [value.cpu(), weight.grad.cpu()]
    for plain, recorded in zip(*found, strict=True):
        assert torch.equal(plain, recorded)
    assert len({tuple(gradient.tolist()) for gradient in found[1][1::2]}) == 7
