"""What a run says of the code that made it."""

import json
import os
import re
import shutil
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
import torch

import main_adv_training
import main_compare
import main_random_smoothing
import main_training
from src.command_line import parse, reserved, script_parser, share, stem
from src.models import ConvNN
from src.provenance import code_commit, provenance
from src.utils import load_mnist
from tests.helpers import HERE

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "src").mkdir()
    for name in ("main.py", "src/kernel.c", "results.csv"):
        (tmp_path / name).write_text("first\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=n", "-c", "user.email=e@x", "commit", "-qm", "First")
    return tmp_path


def git(root, *words):
    ended = subprocess.run(["git", "-C", str(root), *words], capture_output=True, check=True)
    return ended.stdout.decode().strip()


@pytest.mark.parametrize(
    ("name", "mark"),
    [
        ("main.py", "+"),
        ("src/kernel.c", "+"),
        ("src/new.py", "+"),
        ("results.csv", ""),
        ("x.pt", ""),
    ],
)
def test_changed_and_new_code_is_marked_and_results_are_not(checkout, name, mark):
    head = git(checkout, "rev-parse", "--short", "HEAD")
    assert code_commit(checkout) == head
    (checkout / name).write_text("second\n")
    assert code_commit(checkout) == head + mark


def test_outside_of_a_checkout_the_commit_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert code_commit(tmp_path) == "unknown"


def test_a_copy_inside_another_repository_has_none_of_its_commits(checkout):
    shutil.copytree(checkout / "src", checkout / "copy" / "src")
    assert code_commit(checkout / "copy") == "unknown"


def test_the_repository_of_a_hook_is_not_taken_for_this_one(checkout, tmp_path, monkeypatch):
    head = git(checkout, "rev-parse", "--short", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(ROOT / ".git"))
    assert code_commit(checkout) == head


def test_the_command_can_be_pasted():
    parser = script_parser("", "")
    words = ["--models", "m d", "--quick"]
    assert provenance("main", parser.parse_args(words), words)["command"] == (
        "python main.py --models 'm d' --quick"
    )


FOLDERS = ("data", "models", "figures", "results")


@pytest.mark.parametrize(
    ("directory", "start"),
    [(ROOT, ""), (ROOT.parent, f"{ROOT.name}/"), (ROOT / "tests", f"{ROOT}/")],
)
def test_default_folders_are_those_of_the_repository(directory, start, monkeypatch):
    monkeypatch.chdir(directory)
    for script in (main_training, main_adv_training, main_random_smoothing, main_compare):
        args = script.option_parser().parse_args([])
        assert [getattr(args, name) for name in FOLDERS] == [start + name for name in FOLDERS]
        # Rows do not tell where the repository lies.
        facts = provenance("main", args, [])
        assert [facts["options"][name] for name in FOLDERS] == list(FOLDERS)
        assert str(ROOT) not in json.dumps(facts)


def test_folders_that_the_user_names_lie_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = main_compare.option_parser().parse_args(HERE)
    assert [getattr(args, name) for name in FOLDERS] == list(FOLDERS)


def test_the_help_says_where_the_default_folders_are():
    text = " ".join(main_compare.option_parser().format_help().split())
    for name in FOLDERS:
        assert f"default: {name}/ of the repository" in text


def test_mnist_is_found_from_any_working_directory(tmp_path, mnist_root, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for one, other in zip(
        load_mnist("test").tensors, load_mnist("test", mnist_root).tensors, strict=True
    ):
        assert torch.equal(one, other)
    assert list(tmp_path.iterdir()) == []


def test_what_the_user_gives_beats_quick(tmp_path):
    folders = [f"--{name}={tmp_path}" for name in ("models", "figures", "results")]
    for words, expected in ((["--every", "500"], (500, 500)), ([], (1000, 500))):
        args = parse(main_compare.option_parser(), ["--quick", *words, *folders], every=1000, n=500)
        assert (args.every, args.n) == expected
    args = main_compare.complete(
        parse(main_compare.option_parser(), ["--quick", "--steps", "9", *folders])
    )
    assert args.steps == 9


def completed(words):
    return main_adv_training.complete(main_adv_training.option_parser().parse_args(words))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--steps", "5"], "--steps has no effect without --attack pgd"),
        (["--attack", "pgd", "--stride", "1"], "--stride has no effect without --attack gradient"),
        (["--epsilon", "1.5"], "--epsilon 1.5 is more than pixels"),
    ],
)
def test_options_without_effect_or_sense_are_refused_in_adversarial_training(words, sentence):
    with pytest.raises(ValueError, match=sentence):
        completed(words)
    assert completed(["--attack", "pgd"]).steps == 7
    assert completed([]).stride == 2.0


@pytest.mark.parametrize("words", [["--challenge"], ["--challenge", "9"], ["--steps", "4"]])
def test_options_without_effect_on_a_shard_are_refused(words):
    args = main_compare.option_parser().parse_args(["--shard", "1/2", *words])
    with pytest.raises(ValueError, match="has no effect with --shard"):
        main_compare.complete(args)


@pytest.mark.parametrize("text", ["1/1", "0/2", "3/2", "1/", "-1/2", "1/2/3"])
def test_shards_are_parts(text):
    with pytest.raises(ArgumentTypeError, match="k/n"):
        share(text)
    assert share("2/2") == (2, 2)


@pytest.mark.parametrize(
    "text", ["", "comparison", "../x", "a/b", ".x", "a\0b", "a\nb", "a\\b", "/x"]
)
def test_names_are_beginnings_of_files(text):
    with pytest.raises(ArgumentTypeError, match=r"beginning of a file name|main_compare"):
        stem(text)
    assert stem("a 1.00-b_c") == "a 1.00-b_c"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (main_adv_training, ["--epsilon", "80"]),
        (main_adv_training, ["--norm", "l2", "--epsilon", "28.1"]),
        (main_adv_training, ["--no-thresholds", "--thresholds", "0.4", "0.6"]),
        (main_adv_training, ["--beta", "1e308"]),
        (main_adv_training, ["--warp", "1"]),
        (main_training, ["--warp", "1e308"]),
        (main_training, ["--thresholds", "0.4", "1.1"]),
        (main_training, ["--shift", "28"]),
        (main_training, ["--channels", "16", str(10**30)]),
        (main_training, ["--hidden", str(10**30)]),
        (main_training, ["--seed", str(2**63)]),
        (main_training, ["--learning-rate", "1e308"]),
        (main_training, ["--name", "../x"]),
        (main_random_smoothing, ["--sigma", "128"]),
        (main_random_smoothing, ["--sigma", "1e308"]),
        (main_random_smoothing, ["--n", str(2**53)]),
        (main_random_smoothing, ["--epsilon", "29"]),
        (main_compare, ["--sigma", "1e38"]),
        (main_compare, ["--n0", str(2**53)]),
        (main_compare, ["--shard", "1/1"]),
    ],
)
def test_values_without_sense_are_refused_by_the_parser(script, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        script.main([*words, "--quick", *HERE, "--data", str(tmp_path / "absent")])
    flag = [word for word in words if word.startswith("--")][-1]
    # A message as the code means exit status 1.
    assert re.fullmatch(rf"error: argument {flag}.*; see --help", ended.value.code)
    assert list(tmp_path.iterdir()) == []


def test_the_ends_of_the_pixels_are_thresholds():
    assert completed(["--thresholds", "0", "1"]).thresholds == [0.0, 1.0]


def options(folder, name="x"):
    words = [f"--{part}={folder / part}" for part in ("models", "figures", "results")]
    parser = script_parser("", "")
    parser.add_argument("--name", default=name)
    return parser.parse_args(words)


def test_a_name_belongs_to_one_run(tmp_path):
    args = options(tmp_path)
    with reserved(args, "attacks"):
        for tables in (["attacks"], ["certificates"]):
            with (
                pytest.raises(OSError, match="Another process is writing"),
                reserved(args, *tables),
            ):
                pass
        with reserved(options(tmp_path, "y"), "attacks"):
            pass
    with reserved(args, "certificates"):
        pass
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["figures", "models", "results"]


@pytest.mark.parametrize("resume", [False, True])
def test_earlier_rows_of_a_name_are_out_of_the_way_before_the_training(tmp_path, resume):
    rows = tmp_path / "results" / "x_attacks.csv"
    rows.parent.mkdir()
    rows.write_text("a\n1\n")
    rows.with_suffix(".json").write_text("{}")
    with reserved(options(tmp_path), "attacks", resume=resume):
        assert rows.exists() == rows.with_suffix(".json").exists() == resume
        rows.write_text("a\n2\n")
    kept = rows.with_name("x_attacks.previous-1.csv")
    assert kept.exists() == kept.with_suffix(".json").exists() == (not resume)


@pytest.mark.parametrize("fault", ["a folder for the model", "a long name", "a file for a folder"])
def test_what_cannot_be_written_is_refused_before_the_training(tmp_path, fault):
    name = "x" * 245 if fault == "a long name" else "x"
    if fault == "a folder for the model":
        (tmp_path / "models" / "x.pt").mkdir(parents=True)
    if fault == "a file for a folder":
        (tmp_path / "figures").write_text("x")
    with (
        pytest.raises(OSError, match="cannot be written"),
        reserved(options(tmp_path, name), "attacks"),
    ):
        pytest.fail("The training has begun.")


@pytest.mark.parametrize("script", ["main_training", "main_adv_training", "main_random_smoothing"])
def test_every_script_checks_before_it_trains(script, tmp_path, mnist_root):
    (tmp_path / "models" / "x.pt").mkdir(parents=True)
    words = [f"{script}.py", "--quick", "--name=x", f"--data={mnist_root}"]
    words += [f"--{part}={tmp_path / part}" for part in ("models", "figures", "results")]
    ended = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert (
        ended.stderr
        == f"error: {tmp_path}/models/x.pt cannot be written (is a folder); choose another.\n"
    )
    assert ended.stdout == ""


def test_too_few_copies_are_refused_before_the_training(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main_random_smoothing, "train_model", lambda *_, **__: pytest.fail("late"))
    for script in (main_random_smoothing, main_compare):
        with pytest.raises(ValueError, match="'n' = 9 can never certify"):
            script.main(["--quick", *HERE, "--n", "9"])


@pytest.mark.parametrize("saved", [False, True])
def test_resume_is_advised_where_it_works(saved, tmp_path, mnist_root):
    where = "report_smoothing" if saved else "train_model"
    code = (
        "import main_random_smoothing as script; from src.command_line import run\n"
        "def stop(*_, **__): raise KeyboardInterrupt\n"
        f"script.{where} = stop\n"
        f"run(lambda: script.main(['--quick', *{HERE}, '--data', {str(mnist_root)!r}]))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 130
    assert ("add --resume" in ended.stderr) == saved == bool(list(tmp_path.rglob("*.pt")))


def test_rows_of_another_script_do_not_stay_beside_a_new_model(tmp_path):
    rows = tmp_path / "results" / "x_certificates.csv"
    rows.parent.mkdir()
    rows.write_text("a\n1\n")
    with reserved(options(tmp_path), "attacks"):
        assert not rows.exists()
    assert rows.with_name("x_certificates.previous-1.csv").exists()


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (main_random_smoothing, ["--epsilon", "1"]),
        (main_random_smoothing, ["--consistency", "2"]),
        (main_adv_training, ["--thresholds", "1", "0"]),
        (main_training, ["--thresholds", "1", "0"]),
    ],
)
def test_what_is_refused_late_moves_no_rows(script, words, tmp_path, mnist_root, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = tmp_path / "results" / f"{script.NAME}_certificates.csv"
    rows.parent.mkdir()
    rows.write_text("a\n1\n")
    with pytest.raises(ValueError, match=r"epsilon|consistency|thresholds"):
        script.main(["--quick", *HERE, "--data", str(mnist_root), *words])
    assert [p.name for p in rows.parent.iterdir()] == [rows.name]


@pytest.mark.parametrize("fault", ["a dangling link", "a folder for the tables"])
def test_the_comparison_knows_at_its_start_that_it_cannot_write(
    fault, tmp_path, mnist_root, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main_compare, "certify_models", lambda *_, **__: pytest.fail("late"))
    monkeypatch.setattr(main_compare, "load_models", lambda *_: {"smoothed": ConvNN((2, 2))})
    if fault == "a dangling link":
        (tmp_path / "figures").symlink_to(tmp_path / "nowhere" / "x")
    else:
        (tmp_path / "results" / "comparison_attacks.json").mkdir(parents=True)
    with pytest.raises(OSError, match="written"):
        main_compare.main(["--quick", *HERE, "--sigma", "0.5", "--data", str(mnist_root)])
