"""The command for other people's networks: what it writes, and one sentence for every bad input."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from src.command_line import run
from src.evaluate import main
from src.files import lock_file
from src.foreign import load_images, load_network
from src.records import read_rows, redraw, verify
from src.robustness.smallest_epsilon import smallest_epsilons
from tests.helpers import MeanPixel, shades

ROOT = Path(__file__).resolve().parent.parent
MODULE = """
import torch
from torch import nn

class Dark(nn.Module):
    def forward(self, images):
        margin = images.mean(dim=(1, 2, 3)) - 0.5
        return torch.stack([-margin, margin, margin - 1], dim=1)

def make():
    return Dark()

network = Dark()
number = 3

class Box:
    make = Dark

def fails():
    raise RuntimeError("no weights here\\nsecond line")

def quits():
    raise SystemExit("gone")

def needs(path):
    return Dark()

def gives_number():
    return 3

def flat():
    return nn.Flatten()

def other_shape():
    return nn.Sequential(nn.Flatten(), nn.Linear(5, 3))

def random():
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 3), Noise())

class Noise(nn.Module):
    def forward(self, logits):
        return logits + torch.randn_like(logits)

def untuple():
    model = Dark()
    model.forward = lambda images: (images,)
    return model
"""
# Grey levels and their classes: the mean of the last one is far from 1/2.
GREYS = np.array([100, 120, 130, 150, 240], dtype=np.uint8)


def arrays(count=5):
    images = np.broadcast_to(GREYS[:count, None, None, None], (count, 3, 4, 4)).copy()
    return {"images": images, "labels": (GREYS[:count] > 127).astype(np.int64)}


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text(MODULE)
    (tmp_path / "faulty.py").write_text("import nowhere_to_be_found\n")
    (tmp_path / "worse.py").write_text("1 / 0\n")
    np.savez(tmp_path / "file.npz", **arrays())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("theirs", "faulty", "worse"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


WORDS = ["--network", "theirs:make", "--data", "file.npz", "--norm", "linf", "--epsilon", "0.05"]
FEW = ["--steps", "4", "--queries", "50", "--n", "200"]
FEWER = ["--images", "2", "--steps", "2", "--queries", "10", "--n", "200"]


def test_everything_is_written_and_agrees(place, capsys):
    main([*WORDS, *FEW, "--sigma", "0.25", "--name", "dark"])
    shown = capsys.readouterr().out
    stages = read_rows("results/dark_stages.csv")
    # 0.05 is 12.75 grey levels from 127.5: the images at 120 and 130 fall, no other.
    assert [row["correct"] for row in stages] == ["5", *["3"] * (len(stages) - 1)]
    assert sum(int(row["broken"]) for row in stages) == 2
    assert stages[-1]["attack"] == "worst known"
    assert "apgd cross-entropy" in shown
    assert "checklist: 10 checks" in shown
    found = np.load("results/dark_adversarial.npz", allow_pickle=False)
    before = arrays()["images"] / 255
    assert found["images"].dtype == np.float32
    assert np.abs(found["images"] - before).max() <= 0.05
    assert (found["labels"] == arrays()["labels"]).all()
    assert (found["predictions"] != found["labels"]).sum() == 2
    means = found["images"].astype(np.float64).mean(axis=(1, 2, 3))
    assert ((means > 0.5) == found["predictions"]).all()
    assert found["indices"].tolist() == [0, 1, 2, 3, 4]
    smallest = [r for r in read_rows("results/dark_smallest_epsilons.csv") if r["norm"] == "linf"]
    worst = [float(r["smallest_epsilon"]) for r in smallest if r["attack"] == "worst known"]
    exact = np.abs(GREYS - 127.5) / 255
    assert (worst >= exact - 1e-6).all()
    assert (worst <= exact + 0.005).all()
    facts = json.loads(Path("results/dark_attacks.json").read_text())
    assert facts["command"].startswith("python -m src.evaluate --network theirs:make")
    assert facts["model_class"] == "theirs.Dark"
    assert (facts["clean_accuracy"], facts["classes"]) == (1, 3)
    assert verify("results/dark_certificates.csv") == []
    model, dataset = load_network("theirs:make"), load_images("file.npz")
    assert redraw("results/dark_certificates.csv", 9, model=model, dataset=dataset) == []
    for figure in ("accuracy_against_epsilon", "certified_accuracy"):
        assert Path(f"figures/dark_{figure}.png").stat().st_size > 10_000


def test_same_command_gives_the_same_rows_and_others_are_kept(place, monkeypatch):
    monkeypatch.setattr("src.reports.output.plot_accuracy_against_epsilon", lambda *_, **__: None)
    main([*WORDS, *FEWER])
    rows = Path("results/make_stages.csv").read_bytes()
    main([*WORDS, *FEWER])
    assert Path("results/make_stages.csv").read_bytes() == rows
    assert not list(Path("results").glob("*previous*"))
    main([*WORDS[:-1], "0.1", *FEWER])
    assert Path("results/make_stages.previous-1.csv").read_bytes() == rows


def test_attacked_images_can_be_evaluated_again(place, monkeypatch):
    monkeypatch.setattr("src.reports.output.plot_accuracy_against_epsilon", lambda *_, **__: None)
    main([*WORDS, *FEWER, "--images", "3"])
    main([*WORDS, *FEWER, "--data", "results/make_adversarial.npz", "--name", "again"])
    # The first and the last of three: the one at 130 is broken already.
    stages = read_rows("results/again_stages.csv")
    assert (stages[0]["images"], stages[0]["correct"]) == ("2", "2")


def test_killed_run_goes_on_and_another_is_refused(place, monkeypatch):
    monkeypatch.setattr("src.evaluate.report_attacks", lambda *_: None)
    words = [*WORDS, *FEWER, "--sigma", "0.25"]
    main([*words, "--name", "whole"])
    code = f"from src.evaluate import main; main({[*words, '--n', '3000000', '--name', 'killed']})"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    path, deadline = Path("results/killed_certificates.csv"), time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) != 0
    assert not Path("results/killed_stages.csv").exists()
    # A compiler that was just being started holds the lock until it runs.
    for _ in range(100):
        with contextlib.suppress(BlockingIOError), lock_file(Path("results/killed")):
            break
        time.sleep(0.1)
    with pytest.raises(ValueError, match=r"cannot be resumed.*n was 3000000, is 200"):
        main([*words, "--name", "killed", "--resume"])
    path = Path("results/whole_certificates.csv")
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model_class was theirs\.Dark"):
        main([*words, "--network", "torch.nn:Flatten", "--name", "whole", "--resume"])
    main([*words, "--name", "whole", "--resume"])
    assert path.read_bytes() == whole


def npz(**changes):
    content = {key: value for key, value in {**arrays(), **changes}.items() if value is not None}
    return lambda path: np.savez(path, **content)


def damaged(path):
    np.savez(path, **arrays())
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)
    path.write_bytes(content)


IMAGES = arrays()["images"]
BAD_DATA = {
    "missing images": (npz(images=None), "has no 'images', but 'labels'"),
    "missing labels": (npz(labels=None), "has no 'labels', but 'images'"),
    "no array": (lambda path: np.savez(path), "has no 'images', but nothing"),
    "pickled": (npz(labels=np.array([None] * 5)), "holds Python objects"),
    "pickled images": (npz(images=np.array([{}] * 5)), "holds Python objects"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged or no .npz file"),
    "text": (lambda path: path.write_text("images"), "is damaged or no .npz file|Python objects"),
    "cut": (lambda path: (damaged(path), path.write_bytes(path.read_bytes()[:300])), "damaged|obj"),
    "damaged": (damaged, "is damaged or no .npz file"),
    "one array": (lambda path: np.save(path.open("wb"), IMAGES), "one array without a name"),
    "folder": (lambda path: path.mkdir(), "is damaged or no .npz file"),
    "flat": (npz(images=IMAGES.reshape(5, -1)), r"have the shape \(5, 48\)"),
    "no channels": (npz(images=IMAGES[:, 0]), r"grey ones with C = 1"),
    "colours last": (npz(images=np.zeros((5, 8, 8, 3), np.uint8)), r"transpose\(0, 3, 1, 2\)"),
    "no images": (npz(images=IMAGES[:0], labels=np.zeros(0, int)), "has no images"),
    "other count": (npz(labels=np.zeros(4, int)), r"'labels' has shape \(4,\); expected \(5,\)"),
    "column": (npz(labels=np.zeros((5, 1), int)), r"'labels' has shape \(5, 1\)"),
    "one label": (npz(labels=np.int64(3)), "'labels' has shape"),
    "float labels": (npz(labels=np.zeros(5)), "'labels' are of type float64; save class numbers"),
    "negative": (npz(labels=np.full(5, -1)), "negative values"),
    "huge": (npz(labels=np.full(5, 2**64 - 1, np.uint64)), "'labels' are of type uint64"),
    "beyond": (npz(labels=np.full(5, 3)), "has the class 3, but the model has 3 classes"),
    "whole numbers": (npz(images=IMAGES.astype(int)), "save bytes"),
    "0..255": (npz(images=IMAGES.astype(np.float32)), r"outside \[0, 1\] or NaN"),
    "NaN": (npz(images=IMAGES * np.nan), r"outside \[0, 1\] or NaN"),
    "complex": (npz(images=IMAGES * 1j), "save bytes"),
    "no file": (lambda path: None, "There is no file"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_is_one_sentence_and_nothing_is_written(name, place, capsys):
    make, sentence = BAD_DATA[name]
    make(place / "bad.npz")
    refused([*WORDS, "--data", "bad.npz"], f"^error: .*({sentence})", place, capsys)


BAD_NETWORKS = {
    "no colon": ("theirs", "not of the form package.module:function"),
    "no function": ("theirs:", "not of the form"),
    "no module": ("nowhere_at_all:make", "there is no module 'nowhere_at_all' in .*PYTHONPATH"),
    "no submodule": ("theirs.inner:make", "there is no module 'theirs.inner'"),
    "no name": ("theirs:unmade", "has no 'unmade'"),
    "missing import": ("faulty:make", "importing faulty failed: ModuleNotFoundError"),
    "error in it": ("worse:make", "importing worse failed: ZeroDivisionError: division by zero"),
    "raises": ("theirs:fails", r"theirs:fails\(\) failed: RuntimeError: no weights here\."),
    "exits": ("theirs:quits", r"theirs:quits\(\) failed: SystemExit: gone"),
    "wants more": ("theirs:needs", r"theirs:needs\(\) failed: TypeError"),
    "number": ("theirs:number", "gives a int; it must give a torch.nn.Module"),
    "gives number": ("theirs:gives_number", "gives a int; it must"),
    "no logits": ("theirs:untuple", "'network' returned a tuple; wrap it"),
    "other logits": ("theirs:Noise", r"'network' returned a tensor \(4, 3, 4, 4\)"),
    "other images": ("theirs:other_shape", r"cannot take the images \(4, 3, 4, 4\): RuntimeError"),
    "random": ("theirs:random", "answers differently"),
}


@pytest.mark.parametrize("name", BAD_NETWORKS)
def test_bad_networks_are_one_sentence_and_nothing_is_written(name, place, capsys):
    network, sentence = BAD_NETWORKS[name]
    refused([*WORDS, "--network", network], f"^error: .*{sentence}", place, capsys)


BAD_OPTIONS = [
    (["--norm", "l1"], "invalid choice"),
    (["--epsilon", "-1"], "is not a number above 0"),
    (["--resume"], "--resume has no effect without --sigma"),
    (["--sigma", "0.5", "--n", "5"], "'n' = 5|n"),
    (["--images", "0"], "integer of at least 1"),
    (["--name", "a/b"], "no beginning of a file name"),
    (["--device", "tpu"], "'device' = 'tpu' is not available"),
    (["--results", "file.npz"], "is not a folder that can be written to"),
]


@pytest.mark.parametrize(("words", "sentence"), BAD_OPTIONS)
def test_bad_options_are_one_sentence_and_nothing_is_written(words, sentence, place, capsys):
    refused([*WORDS, *words], f"error: .*({sentence})", place, capsys)


def refused(words, sentence, place, capsys):
    before = sorted(path.name for path in place.iterdir() if path.suffix != ".pyc")
    with pytest.raises(SystemExit) as ended:
        run(lambda: main(words))
    shown = str(ended.value.code) if ended.value.code != 1 else capsys.readouterr().err
    assert shown.strip().count("\n") == 0

    assert re.search(sentence, shown.strip()), shown
    left = sorted(path.name for path in place.iterdir() if path.suffix != ".pyc")
    assert [name for name in left if name != "__pycache__"] == [
        n for n in before if n != "__pycache__"
    ]


def test_two_runs_of_one_name_do_not_mix(place):
    Path("results").mkdir()
    with lock_file(Path("results/make")), pytest.raises(OSError, match="Another process"):
        main([*WORDS, *FEW])


@pytest.mark.parametrize("name", ["make", "network", "Dark", "Box.make"])
def test_a_network_is_what_a_function_gives_a_class_makes_or_a_module_holds(name, place):
    model = load_network(f"theirs:{name}")
    assert isinstance(model, nn.Module)
    assert not model.training


@pytest.mark.parametrize("kind", [np.uint8, np.float16, np.float32, np.float64, ">f4"])
def test_images_are_bytes_or_floats_of_any_size(kind, tmp_path):
    values = np.array([0, 51, 255]) if kind is np.uint8 else np.array([0, 0.2, 1])
    images = np.broadcast_to(values[:, None, None, None], (3, 2, 1, 5)).astype(kind)
    np.savez(tmp_path / "x.npz", images=images, labels=np.array([0, 1, 2], dtype=np.uint8))
    found, labels = load_images(tmp_path / "x.npz").tensors
    assert (found.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert found[:, 0, 0, 0].tolist() == pytest.approx([0, 0.2, 1], abs=1e-4)


def test_a_finer_search_finds_smaller_epsilons():
    # The boundary lies 0.0062 away from the first image and 0.0112 from the second.
    dataset = shades([0.0062, -0.0112])
    coarse = smallest_epsilons(MeanPixel(), dataset, "linf", progress=False)
    fine = smallest_epsilons(MeanPixel(), dataset, "linf", finer=10, progress=False)
    assert (fine >= [0.0062 - 1e-6, 0.0112 - 1e-6]).all()
    assert (fine <= [0.0062 + 5e-4, 0.0112 + 5e-4]).all()
    assert (fine <= coarse).all()
