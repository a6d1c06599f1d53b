from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from src.methods.smoothing import smoothing_loss_schedule
from src.models import ConvNN, SmoothClassifier
from src.optimisation.cuda_graph import Recorded
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
        loss_schedule=smoothing_loss_schedule("confidence"),
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


@pytest.fixture
def stand_in(monkeypatch):
    """What `Recorded` asks of CUDA, on a CPU: a graph computes again from the tensors it holds."""

    class Graph:
        def replay(self):
            made = self.of[0]
            made.output.copy_(made.function(*made.inputs))

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "device": lambda device: nullcontext(),
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: nullcontext(),
        "graph": lambda graph, stream: nullcontext(),
        "CUDAGraph": Graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    Graph.of = []
    return Graph.of


def test_what_a_recording_holds_is_filled_and_what_it_returns_is_kept(stand_in):
    recorded = Recorded(lambda x, factor: factor * x)
    stand_in.append(recorded)
    given = [(torch.full((3,), i + 1.0), torch.tensor(0.5 + i)) for i in range(7)]
    outputs = [recorded(*tensors) for tensors in given]
    for (x, factor), output in zip(given, outputs, strict=True):
        assert torch.equal(output, factor * x)
        assert torch.equal(x, torch.full((3,), x[0].item()))
    # Either would be broadcast or cast without a word.
    for wrong in (torch.ones(1), torch.ones(3, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"Recorded with a tensor \(3,\) of torch.float32"):
            recorded(wrong, torch.tensor(1.0))


def test_what_cannot_be_recorded_says_what_to_do(stand_in):
    def waits(x):
        if recorded.calls > 3:
            raise RuntimeError("operation not permitted when stream is capturing")
        return x

    recorded = Recorded(waits)
    for _ in range(3):
        recorded(torch.ones(2))
    # And again: half a recording is never replayed.
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"recorded=False, or use another device \(op"):
            recorded(torch.ones(2))


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
