"""Work shared by two processes of torchrun, against the same work done by one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from src.checkpoints import save_checkpoint
from src.models import ConvNN
from src.records.rows import verify
from src.training_and_evaluation import train_model
from tests.helpers import HERE

ROOT = Path(__file__).resolve().parents[2]
PAIR = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
# torchrun would take --n for a short form of its own options without the two dashes.
END = "--"
# Runs are compared byte for byte: none may choose its own precision.
COMPARE = ["--every", "1000", "--n", "500", "--steps", "1", "--sigma", "0.5"]
COMPARE += ["--precision", "float32", *HERE]


def start(command, cwd, **options):
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=600, check=False, **options
    )


def folder_with_models(folder, mnist_root):
    """A folder from which main_compare.py can run: MNIST and three untrained networks."""
    folder.mkdir()
    (folder / "data").symlink_to(mnist_root)
    for seed, name in enumerate(
        ("standard_training", "adversarial_training", "randomized_smoothing")
    ):
        torch.manual_seed(seed)
        save_checkpoint(folder / "models" / f"{name}.pt", ConvNN((2, 3)), sigma=0.5)
    return folder


def certificates(folder):
    found = sorted((folder / "results").glob("certificates_*.csv"))
    return {path.name: path.read_bytes() for path in found}


def settings(folder):
    return [
        json.loads(path.read_text())["settings"]
        for path in sorted((folder / "results").glob("certificates_*.json"))
    ]


def commands(folder):
    """What made the rows; several processes leave facts of each."""
    twins = (folder / "results").glob("certificates_*.json")
    facts = [json.loads(path.read_text())["facts"] for path in twins]
    return {
        one["command"] for made in facts for one in (made if isinstance(made, list) else [made])
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory, mnist_root):
    """The folder of a comparison by one process."""
    folder = folder_with_models(tmp_path_factory.mktemp("alone") / "run", mnist_root)
    ended = start([sys.executable, str(ROOT / "main_compare.py"), *COMPARE], folder)
    assert ended.returncode == 0, ended.stderr
    return folder


def test_two_processes_leave_the_rows_of_one(alone, tmp_path, mnist_root):
    folder = folder_with_models(tmp_path / "pair", mnist_root)
    ended = start([*PAIR, END, str(ROOT / "main_compare.py"), *COMPARE], folder)
    assert ended.returncode == 0, ended.stderr
    assert certificates(folder) == certificates(alone)
    assert settings(folder) == settings(alone)
    words = " ".join(["main_compare.py", *COMPARE])
    assert commands(folder) == {f"torchrun --nproc-per-node=2 -- {words}"}
    assert commands(alone) == {f"python {words}"}
    assert [verify(p) for p in (folder / "results").glob("certificates_*.csv")] == [[]] * 3
    # Only the first process prints, and it prints what a single one does.
    assert ended.stdout.count("abstentions") == 1


# Kills the second process, once, after it has written two rows of the second model.
KILLER = """
import os, signal, sys
import main_compare
from src.records import certify
from src.command_line import run

rows = certify.evaluate_robustness
models = []

def evaluate(*args, **options):
    models.append(1)
    for number, row in enumerate(rows(*args, **options)):
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and os.environ["RANK"] == "1" and len(models) == 2 and number == 2:
            open("killed", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        yield row

certify.evaluate_robustness = evaluate
run(lambda: main_compare.main(sys.argv[1:]))
"""


def test_the_death_of_a_worker_costs_no_rows(alone, tmp_path, mnist_root):
    folder = folder_with_models(tmp_path / "killed", mnist_root)
    (folder / "killer.py").write_text(KILLER)
    command = [*PAIR, "--max-restarts=1", END, "killer.py", *COMPARE]
    ended = start(command, folder, env=environment())
    assert ended.returncode == 0, ended.stderr
    # It did die, and finished rows were not set aside. torchrun names only one failed process, and
    # that may be the other one, which lost its partner.
    assert (folder / "killed").exists()
    assert "Earlier rows are kept" not in ended.stdout
    assert certificates(folder) == certificates(alone)


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT)}


def test_a_user_error_ends_all_processes_with_a_sentence(tmp_path, mnist_root):
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "data").symlink_to(mnist_root)
    ended = start([*PAIR, END, str(ROOT / "main_compare.py"), *COMPARE], folder)
    assert ended.returncode != 0
    assert "run python main_training.py first" in ended.stderr
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in ended.stderr


TRAIN = """
import sys
import torch
import torch.distributed as dist
from src.optimisation.processes import process_group, rank
from tests.optimisation.test_processes import small, train_model

with process_group():
    for normalised in (False, True):
        model, dataset = small(dist.get_rank(), normalised)
        history = train_model(model, dataset, epochs=2, batch_size=8, progress=False,
                              watch=lambda model: {"who": float(rank())})
        torch.save([model.state_dict(), history], f"{rank()}-{normalised}.pt")
"""


def small(seed, normalised=False):
    """A network with weights by the seed, and 20 images."""
    torch.manual_seed(seed)
    layers = [nn.Flatten(), nn.Linear(784, 4)] + [nn.BatchNorm1d(4)] * normalised
    model = nn.Sequential(*layers, nn.Linear(4, 2))
    generator = torch.Generator().manual_seed(9)
    images = torch.rand(20, 1, 28, 28, generator=generator)
    return model, TensorDataset(images, torch.arange(20) % 2)


def test_two_processes_train_as_one(tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    ended = start([*PAIR, END, "train.py"], tmp_path, env=environment())
    assert ended.returncode == 0, ended.stderr
    for normalised in (False, True):
        (first, history), (second, other) = (
            torch.load(tmp_path / f"{k}-{normalised}.pt", weights_only=True) for k in (0, 1)
        )
        # The same weights to the last bit, though they started from different ones.
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert len(history["step_loss"]) == 2 * (20 // 8)
        assert history["step_loss"] == other["step_loss"]
        # The watch of the first process is what all report and select by.
        assert {row["who"] for row in (*history["epochs"], *other["epochs"])} == {0.0}
        if normalised:
            continue  # Batch normalisation looks at the half batch of its own process.
        model, dataset = small(0)
        alone = train_model(model, dataset, epochs=2, batch_size=8, progress=False)
        # The mean gradient of two half batches is that of the whole batch.
        for name, value in model.state_dict().items():
            torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)
        assert history["step_loss"] == pytest.approx(alone["step_loss"], rel=1e-4)
