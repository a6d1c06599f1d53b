"""The four scripts end to end in an empty folder, and what a user meets when things are wrong."""

import json
import os
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageDraw

import main_adv_training
import main_compare
import main_random_smoothing
import main_training
from src.certification.bounds import certified_radius, lower_confidence_bound
from src.checkpoints import load_checkpoint, save_checkpoint, weights_digest
from src.files import lock_file
from src.models import ConvNN
from src.records.rows import read_rows
from src.records.twins import read_twin
from src.reports.comparison import common_sigma, default_files, load_models
from src.utils import load_image
from tests.helpers import HERE

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("main_training", "main_adv_training", "main_random_smoothing", "main_compare")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, mnist_root):
    """A folder in which the four scripts have run with --quick."""
    folder = tmp_path_factory.mktemp("quick")
    (folder / "data").symlink_to(mnist_root)
    before = Path.cwd()
    os.chdir(folder)
    try:
        for script in (main_training, main_adv_training, main_random_smoothing, main_compare):
            script.main(["--quick", *HERE])
    finally:
        os.chdir(before)
    return folder


def start(script, *options, cwd):
    """Run a script as a user does; returns the finished process."""
    return subprocess.run(
        [sys.executable, str(ROOT / f"{script}.py"), *options],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_scripts_leave_checkpoints_rows_and_figures(finished):
    assert {p.name for p in (finished / "models").iterdir()} == {
        "standard_training.pt",
        "adversarial_training.pt",
        "randomized_smoothing.pt",
    }
    # Nothing half-written: no temporary file is left, and every figure is a whole PNG.
    leftovers = [p for p in finished.rglob(".*") if p.name != "data"]
    assert leftovers == []
    figures = list((finished / "figures").glob("*.png"))
    assert len(figures) == 14
    assert all(p.read_bytes().endswith(b"IEND\xaeB`\x82") for p in figures)


def test_certificates_can_be_recomputed_from_their_counts(finished):
    for name in ("standard", "adversarial", "smoothed"):
        path = finished / "results" / f"certificates_{name}.csv"
        rows, settings = read_rows(path), read_twin(path.with_suffix(".json"))["settings"]
        assert (settings["exact"], settings["form"]) == (True, "whole numbers")
        # What the noise costs of alpha; the images are bytes, so nothing comes off the radii.
        assert 0 < settings["sampler_cost"] < 1e-7
        assert settings["off_grid"] == 0
        assert [int(row["index"]) for row in rows] == list(range(0, 10_000, 1000))
        for row in rows:
            alpha = float(row["alpha"]) - settings["sampler_cost"]
            bound = lower_confidence_bound(int(row["top_count"]), int(row["n"]), alpha)
            assert float(row["p_lower"]) == bound
            assert float(row["radius"]) == certified_radius(bound, float(row["sigma"]))
            assert int(row["correct"]) == (row["prediction"] == row["label"])


def test_json_twin_says_what_made_the_rows(finished):
    facts = json.loads((finished / "results" / "certificates_smoothed.json").read_text())
    assert facts["facts"]["command"] == f"python main_compare.py --quick {' '.join(HERE)}"
    assert facts["facts"]["versions"]["torch"] == version("torch")
    weights = load_checkpoint(finished / "models/randomized_smoothing.pt").state_dict()
    assert facts["settings"]["model_digest"] == weights_digest(weights)


def test_json_twin_keeps_what_the_checklist_found(finished):
    keys = {"check", "seen", "norm", "epsilon", "images", "of", "advice"}
    twins = {
        name: json.loads((finished / "results" / f"{name}_attacks.json").read_text())["warnings"]
        for name in ("standard_training", "adversarial_training", "comparison")
    }
    assert set(twins["comparison"]) == {"standard", "adversarial", "smoothed"}
    for found in (*twins.pop("comparison").values(), *twins.values()):
        assert all(set(warning) == keys for warning in found)


def test_attack_rows_count_images(finished):
    rows = read_rows(finished / "results" / "standard_training_attacks.csv")
    table = [row for row in rows if row["part"] == "table"]
    # Clean, and two attacks and the worst known at each of five radii.
    assert len(table) == 16
    assert all(int(r["correct"]) <= int(r["images"]) == 100 for r in table)


@pytest.mark.parametrize("name", ["standard_training", "adversarial_training", "comparison"])
def test_no_number_shown_was_refuted_by_its_own_run(finished, name):
    rows = read_rows(finished / "results" / f"{name}_attacks.csv")
    key = ("part", "model", "norm", "epsilon")
    worst = {
        tuple(row.get(k) for k in key): int(row["correct"])
        for row in rows
        if row["attack"] == "worst known"
    }
    attacked = [row for row in rows if row["norm"]]
    assert len(worst) == len({tuple(row.get(k) for k in key) for row in attacked})
    assert all(worst[tuple(row.get(k) for k in key)] <= int(row["correct"]) for row in attacked)


@pytest.mark.parametrize("name", ["standard_training", "adversarial_training", "comparison"])
def test_curves_are_those_of_the_smallest_epsilons(finished, name):
    smallest = read_rows(finished / "results" / f"{name}_smallest_epsilons.csv")
    rows = read_rows(finished / "results" / f"{name}_attacks.csv")
    curve = [row for row in rows if row["part"] == "curve"]
    # 21 radii, for PGD alone and for the worst known.
    assert len(curve) == 2 * 21 * (3 if name == "comparison" else 1)
    for row in curve:
        found = [
            s for s in smallest if all(s.get(k) == row.get(k) for k in ("norm", "model", "attack"))
        ]
        assert len(found) == int(row["images"]) == (10 if name == "comparison" else 50)
        standing = [s for s in found if float(s["smallest_epsilon"]) > float(row["epsilon"])]
        assert len(standing) == int(row["correct"])


def test_same_command_gives_the_same_bytes(finished, tmp_path, monkeypatch):
    (tmp_path / "data").symlink_to(finished / "data")
    monkeypatch.chdir(tmp_path)
    main_random_smoothing.main(["--quick", *HERE])
    name = "results/randomized_smoothing_certificates.csv"
    assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()
    weights = [load_checkpoint(f / "models/randomized_smoothing.pt") for f in (tmp_path, finished)]
    for one, other in zip(*(m.state_dict().values() for m in weights), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("script", [main_training, main_adv_training, main_random_smoothing])
def test_options_of_training_reach_it(mnist_root, tmp_path, monkeypatch, script):
    class Reached(Exception):
        pass

    def train(*_, **settings):
        given.update(settings)
        raise Reached

    given = {}
    wanted = {"batch_size": 64, "learning_rate": 0.003, "weight_decay": 0.2}
    wanted |= {"shift": 2, "warp": 0.07, "optimizer": "muon", "precision": "bfloat16", "seed": 5}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in wanted.items()]
    options = [word.replace("--precision", "--training-precision") for word in options]
    monkeypatch.setattr(script, "train_model", train)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Reached):
        script.main(["--quick", *HERE, f"--data={mnist_root}", *options])
    assert {name: given[name] for name in wanted} == wanted


def test_interrupted_certificates_go_on_without_training_again(finished, tmp_path, monkeypatch):
    for folder in ("models", "results"):
        (tmp_path / folder).mkdir()
    (tmp_path / "data").symlink_to(finished / "data")
    model, rows = "models/randomized_smoothing.pt", "results/randomized_smoothing_certificates.csv"
    for name in (model, rows, str(Path(rows).with_suffix(".json"))):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    whole = (tmp_path / rows).read_bytes()
    (tmp_path / rows).write_bytes(whole[: len(whole) // 2])
    stored = (tmp_path / model).stat().st_mtime_ns
    monkeypatch.chdir(tmp_path)
    main_random_smoothing.main(["--quick", *HERE, "--resume"])
    assert (tmp_path / rows).read_bytes() == whole
    assert (tmp_path / model).stat().st_mtime_ns == stored
    # Rows that were made again would have been set aside first.
    assert not list((tmp_path / "results").glob("*previous*"))
    for other, was in (
        ("--sigma=1", r"sigma = 0\.5"),
        ("--hidden=9", "hidden = None"),
        ("--weight-decay=0.1", r"weight_decay = 0\.01"),
    ):
        with pytest.raises(ValueError, match=f"was trained with {was}, which is not what"):
            main_random_smoothing.main(["--quick", *HERE, "--resume", other])
    # The checkpoint fits other votes, the rows do not.
    with pytest.raises(ValueError, match="precision was exact, is float32"):
        main_random_smoothing.main(["--quick", *HERE, "--resume", "--precision=float32"])
    assert (tmp_path / rows).read_bytes() == whole


def test_a_checkpoint_from_before_an_option_was_trained_with_its_default(finished, tmp_path):
    network = load_checkpoint(finished / "models/randomized_smoothing.pt")
    for name in ("optimizer", "warp", "weight_decay"):
        del network.facts["options"][name]
    old = save_checkpoint(tmp_path / "old.pt", network, **network.facts)
    parser = main_random_smoothing.option_parser()
    args = parser.parse_args(["--quick", "--epochs=1"])
    main_random_smoothing.trained(old, args, "cpu")
    for option in ("--optimizer=muon", "--warp=0.1", "--weight-decay=0.1"):
        args = parser.parse_args(["--quick", "--epochs=1", option])
        with pytest.raises(ValueError, match="was trained with"):
            main_random_smoothing.trained(old, args, "cpu")


def test_votes_that_a_device_lacks_are_refused_before_training(finished, monkeypatch):
    def refuse(network, precision):
        raise ValueError(f"no {precision} here")

    monkeypatch.chdir(finished)
    monkeypatch.setattr(main_random_smoothing.ConvNN, "inference_form", refuse)
    monkeypatch.setattr(main_random_smoothing, "train_model", lambda *_, **__: pytest.fail("late"))
    with pytest.raises(ValueError, match="no bfloat16 here"):
        main_random_smoothing.main(["--quick", *HERE, "--precision=bfloat16", "--name=other"])


@pytest.mark.parametrize("process", [0, 1])
def test_two_comparisons_do_not_write_one_folder(finished, monkeypatch, process):
    # Whatever the processes of one of them; the first reports, the others only certify.
    for name, value in (("process_count", 2), ("rank", process)):
        monkeypatch.setattr(main_compare, name, lambda value=value: value)
    monkeypatch.setattr(main_compare, "is_main", lambda: process == 0)
    monkeypatch.setattr(main_compare, "certify_models", lambda *_, **__: 1 / 0)
    monkeypatch.chdir(finished)
    error = OSError if process == 0 else ZeroDivisionError
    with lock_file(Path("results/comparison")), pytest.raises(error):
        main_compare.main(["--quick", *HERE])


def test_missing_checkpoint_names_the_script_that_makes_it(tmp_path, mnist_root):
    ended = start("main_compare", "--quick", *HERE, "--data", str(mnist_root), cwd=tmp_path)
    assert ended.returncode != 0
    sentence = (
        "error: There is no checkpoint models/standard_training.pt; "
        "run python main_training.py first."
    )
    assert ended.stderr.strip().splitlines()[-1] == sentence
    assert not (tmp_path / "results").exists()


def test_checkpoints_of_the_comparison_may_lie_anywhere(finished, tmp_path):
    own = tmp_path / "mine.pt"
    own.write_bytes((finished / "models" / "standard_training.pt").read_bytes())
    files = default_files(finished / "models", {"smoothed": own, "standard": None})
    models = load_models(files, "cpu")
    weights = [models[name].output.weight for name in ("standard", "smoothed", "adversarial")]
    assert torch.equal(weights[0], weights[1])
    assert weights[0].shape != weights[2].shape
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*absent\.pt"):
        load_models(files | {"standard": tmp_path / "absent.pt"}, "cpu")


def test_any_models_are_compared_from_any_directory(tmp_path, mnist_root):
    # Names that matplotlib would leave out, or read as mathematics.
    names = ["_mine", "theirs", "$x$", "d"]
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        facts = {"sigma": 0.25} if name == "theirs" else {}
        save_checkpoint(tmp_path / f"{seed}.pt", ConvNN((2, 3)), **facts)
    words = [f"--{name}={name}" for name in ("models", "results", "figures")]
    words += [f"--model={name}={seed}.pt" for seed, name in enumerate(names)]
    words += ["--quick", "--every=2000", "--steps=1", "--precision=float32"]
    ended = start("main_compare", *words, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    results, figures = tmp_path / "results", tmp_path / "figures"
    rows = {path.stem for path in results.glob("certificates_*.csv")}
    assert rows == {f"certificates_{name}" for name in names}
    attacks = read_rows(results / "comparison_attacks.csv")
    assert list(dict.fromkeys(row["model"] for row in attacks)) == names
    facts = json.loads((results / "comparison_attacks.json").read_text())
    assert set(facts["checkpoints"]) == set(names)
    weights = load_checkpoint(tmp_path / "0.pt").state_dict()
    assert facts["checkpoints"]["_mine"] == {"file": "0.pt", "digest": weights_digest(weights)}
    assert facts["options"]["data"] == "data"
    assert str(ROOT) not in json.dumps(facts)
    # The sigma of the one model that was trained under noise.
    assert facts["options"]["sigma"] == 0.25
    assert len(list(figures.iterdir())) == 4
    assert "Figures in figures/, rows in results/" in ended.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model", "a"], "not of the form NAME=FILE"),
        (["--model", "a="], "not of the form NAME=FILE"),
        (["--model", "=x.pt"], "beginning of a file name"),
        (["--model", "a/b=x.pt"], "beginning of a file name"),
        (["--model", "comparison=x.pt"], "main_compare"),
        (["--model", "a.shard-1-of-2=x.pt"], "other rows"),
        (["--model", "a=x.pt", "--model", "A=y.pt"], "same name"),
        ([f"--model={k}=x.pt" for k in range(9)], "at most 8"),
        (["--model", "a=x.pt", "--smoothed", "y.pt"], "--smoothed has no effect with --model"),
        (["--model", "a=absent.pt"], "no checkpoint absent.pt."),
        (["--image", "x.png", "--resume"], "--resume has no effect with --image"),
        (["--image", "a/x.png", "--image", "b/x.jpg"], "same name"),
    ],
)
def test_names_that_leave_something_open_are_refused(words, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((SystemExit, ValueError, OSError), match=sentence):
        main_compare.main(["--quick", *HERE, *words])
    assert list(tmp_path.iterdir()) == []


def test_the_sigma_of_the_comparison_is_that_of_the_first_model_that_has_one():
    def model(**facts):
        return SimpleNamespace(facts=facts)

    assert common_sigma({"a": model(), "b": model(sigma=0.25), "c": model(sigma=1.0)}) == 0.25
    assert common_sigma({"a": model(), "b": model()}) == 0.5


def test_a_digit_of_ones_own_is_read_attacked_and_certified(
    finished, tmp_path, monkeypatch, capsys
):
    before = {path: path.stat().st_mtime_ns for path in (finished / "results").iterdir()}
    page = Image.new("RGB", (400, 300), (240, 240, 230))
    ImageDraw.Draw(page).line([(150, 60), (250, 60), (180, 240)], fill=(20, 20, 90), width=16)
    page.save(tmp_path / "seven.png")
    monkeypatch.chdir(finished)
    network = load_checkpoint("models/randomized_smoothing.pt")
    with warnings.catch_warnings(action="ignore"):
        image = load_image(tmp_path / "seven.png")
    read = int(network(image[None]).argmax())
    capsys.readouterr()
    options = ["--quick", *HERE, f"--figures={tmp_path}", "--n=1000"]
    main_compare.main([*options, "--image", str(tmp_path / "seven.png")])
    told = capsys.readouterr().out
    for words in (
        "inverted",
        "cropped",
        "smallest attack found, l2",
    ):
        assert words in told
    assert "model standard adversarial smoothed" in " ".join(told.split())
    (line,) = [line for line in told.splitlines() if line.startswith("reads")]
    assert f"{read} (" in line.split("%)")[2]
    assert (tmp_path / "image_seven.png").read_bytes().endswith(b"IEND\xaeB`\x82")
    # No row of the comparison is touched.
    assert {path: path.stat().st_mtime_ns for path in (finished / "results").iterdir()} == before
    Image.new("L", (90, 90)).save(tmp_path / "blank.png")
    with pytest.raises(ValueError, match="is blank"):
        main_compare.main([*options, "--image", str(tmp_path / "blank.png")])
    assert not (tmp_path / "image_blank.png").exists()


@pytest.mark.parametrize(
    ("options", "epsilon", "thresholds"),
    [
        ([], 0.3, [0.4, 0.6]),
        (["--no-thresholds"], 0.3, None),
        (["--thresholds", "0.3", "0.7", "--epsilon", "0.2"], 0.2, [0.3, 0.7]),
        # Thresholds do not withstand in l2 what they withstand in linf.
        (["--norm", "l2"], 2.0, None),
        (["--norm", "l2", "--thresholds", "0.4", "0.6", "--epsilon", "1"], 1.0, [0.4, 0.6]),
    ],
)
def test_adversarial_training_has_the_defaults_of_its_norm(options, epsilon, thresholds):
    parsed = main_adv_training.option_parser().parse_args(options)
    args = main_adv_training.complete(parsed)
    assert (args.epsilon, args.thresholds) == (epsilon, thresholds)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("columns", ["20", "63", "200"])
def test_help_gives_units_and_defaults(script, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    ended = start(script, "--help", cwd=ROOT)
    assert ended.returncode == 0
    for option in ("--device", "--seed", "--quick"):
        assert option in ended.stdout
    assert "default: auto" in ended.stdout


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("main_random_smoothing", ["--sigma", "0"]),
        ("main_random_smoothing", ["--sigma", "nan"]),
        ("main_adv_training", ["--norm", "l1"]),
        ("main_training", ["--epochs", "0"]),
        ("main_training", ["--epoch", "1"]),  # No abbreviations.
        ("main_compare", ["--alpha", "1"]),
        ("main_training", ["--device", "tpu", "--quick"]),
        ("main_training", ["--held-out", "60000", "--quick"]),
    ],
)
def test_bad_option_is_one_sentence_and_a_failure(script, options, tmp_path, mnist_root):
    ended = start(script, *HERE, *options, "--data", str(mnist_root), cwd=tmp_path)
    assert ended.returncode != 0
    assert "error: " in ended.stderr
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []
