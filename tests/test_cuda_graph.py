import pytest
import torch

from src.models import ConvNN, SmoothClassifier
from src.smoothing import ramped_smoothing_loss
from src.training_and_evaluation import train_model
from tests.helpers import halves

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need CUDA")


def weights_after(device: str, recorded: bool) -> dict:
    torch.manual_seed(0)
    smooth = SmoothClassifier(ConvNN(channels=(8, 16), hidden=32), 0.5).to(device)
    history = train_model(
        smooth,
        halves(64, side=28),
        epochs=3,
        batch_size=16,
        loss_schedule=ramped_smoothing_loss("confidence"),
        optimizer="muon",
        warp=0.1,
        recorded=recorded,
        progress=False,
    )
    return smooth.state_dict() | {"loss": torch.tensor(history["step_loss"])}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_cuda)])
def test_a_recorded_training_ends_with_the_weights_of_a_plain_one(device):
    """On CUDA the noise is the same too: a replay moves the generator on as the calls would."""
    plain, recorded = (weights_after(device, recorded) for recorded in (False, True))
    for name, value in plain.items():
        # Not a matter of bits on CUDA: its libraries may choose other kernels in a recording.
        close = {"rtol": 0, "atol": 0} if device == "cpu" else {"rtol": 1e-2, "atol": 1e-3}
        torch.testing.assert_close(recorded[name], value, **close)
