"""A file that is not a whole checkpoint is refused in one sentence, and runs no code."""

import io
import json
import pickle
import random
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from src import checkpoints
from src.checkpoints import load_checkpoint, save_checkpoint, weights_digest
from src.models import ConvNN
from tests.helpers import bits

FACTS = {"seed": 2**62 + 1, "sigma": 0.1 + 0.2, "yes": True, "epochs": [{"epoch": 1, "clean": 0.9}]}


def network(seed=0):
    """A network none of whose weights or statistics has its initial value."""
    torch.manual_seed(seed)
    model = ConvNN((1, 2))
    for tensor in model.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape).abs() * 10)
    return model


@pytest.fixture
def path(tmp_path):
    return save_checkpoint(tmp_path / "model.pt", network(), **FACTS)


def edit(path, change):
    """Rewrite a checkpoint after `change(content)`."""
    content = torch.load(path, weights_only=True)
    changed = change(content)
    torch.save(content if changed is None else changed, path)


def refused(path, reason=None):
    """Whether loading gives one sentence that names the file, whatever is wrong with it."""
    with pytest.raises(ValueError, match=reason) as error:
        load_checkpoint(path)
    text = str(error.value)
    # A chained error would be printed as well, and torch's suggests to load unsafely.
    chained = error.value.__context__ and not error.value.__suppress_context__
    return str(path) in text and "\n" not in text and not chained


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*absent\.pt"):
        load_checkpoint(tmp_path / "absent.pt")


def attempt(path):
    """The ValueError and the network of loading a file: one of them is None."""
    try:
        return None, load_checkpoint(path)
    except ValueError as error:
        return error, None


def test_every_truncation_is_refused(path):
    whole = path.read_bytes()
    for length in sorted({0, 1, 4, 100, len(whole) - 1, *range(0, len(whole), 211)}):
        path.write_bytes(whole[:length])
        assert refused(path), length


def test_a_flipped_bit_is_refused_or_without_effect(path):
    # The zip reader of torch does not check its CRCs; half of the file is padding, though.
    whole, expected = path.read_bytes(), bits(network().state_dict())
    pickled = whole.index(b"PK", 4)
    draw, seen = random.Random(0), {"refused": 0, "without effect": 0}
    for position in [*range(pickled), *range(pickled, len(whole), 13)]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        error, loaded = attempt(path)
        if error is not None:
            assert str(path) in str(error), position
            seen["refused"] += 1
        else:
            assert bits(loaded.state_dict()) == expected, position
            assert json.dumps(loaded.facts) == json.dumps(FACTS), position
            seen["without effect"] += 1
    assert min(seen.values()) > 100


FOREIGN = {
    "text": b"sigma = 0.5\n",
    "random": random.Random(1).randbytes(5000),
    "zeros": bytes(5000),
    "pickled number": pickle.dumps(3),
    "end of an empty zip": b"PK\x05\x06" + bytes(18),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
# A warning of torch's about pickle protocols would be more than one sentence.
@pytest.mark.filterwarnings("error")
def test_foreign_bytes_are_refused(tmp_path, content):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    assert refused(path, "not a checkpoint that can be read safely")


def test_foreign_zip_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("archive/data.txt", "3")
    assert refused(tmp_path / "model.pt", "safely")


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize(
    "content", [torch.ones(3), [1], {}, {"format": "other"}, nn.Linear(2, 2).state_dict()]
)
def test_foreign_torch_files_are_refused(tmp_path, content, legacy):
    torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    assert refused(tmp_path / "m.pt", "not a checkpoint of this project")


@pytest.mark.parametrize("entry", ["config", "facts", "digest", "weights"])
def test_missing_and_malformed_entries_are_named(path, entry):
    edit(path, lambda content: content.update({entry: 3}))
    assert refused(path, f"'{entry}' is missing or malformed")
    edit(path, lambda content: content.pop(entry) and None)
    assert refused(path, f"'{entry}' is missing or malformed")


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["weights"].update({"output.bias": [0.0] * 10}),
        lambda c: c["weights"].update({"output.bias": torch.zeros(10)}),
        lambda c: c["weights"].update({"output.bias": torch.zeros(10).to_sparse()}),
        lambda c: c["weights"].update({"output.bias": torch.zeros(10, device="meta")}),
        lambda c: c["weights"].update({7: torch.zeros(10)}),
        lambda c: c["weights"].pop("norm1.running_mean") and None,
        lambda c: c["facts"].update(sigma=0.25),
        lambda c: c["facts"].update(extra=torch.zeros(1)),
        lambda c: c["facts"].update(yes=1),
        lambda c: c["facts"].pop("seed") and None,
        lambda c: c["config"].update(num_classes=11),
        lambda c: c.update(digest="0" * 64),
        lambda c: c.update(digest=weights_digest(c["weights"])),
    ],
)
def test_altered_content_is_refused(path, change):
    edit(path, change)
    assert refused(path, "is damaged")


@pytest.mark.parametrize(
    "config", [{"channels": [2, 2]}, {"depth": 3}, {"hidden": 4}, {"num_classes": -1}]
)
def test_another_architecture_is_refused(tmp_path, monkeypatch, config):
    # Whole and unaltered, but written by a network that lies about itself.
    monkeypatch.setattr(checkpoints, "alteration", lambda network: "")
    model = network()
    model.config |= config
    assert refused(save_checkpoint(tmp_path / "m.pt", model), "another architecture")


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return Path.touch, (self.flag,)


@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy", "facts", "weights"])
def test_a_pickle_that_would_run_code_does_not_run(path, kind):
    flag = path.with_name("ran")
    bomb = Bomb(flag)
    if kind == "pickle":
        path.write_bytes(pickle.dumps(bomb))
    elif kind in ("zip", "legacy"):
        torch.save(bomb, path, _use_new_zipfile_serialization=kind == "zip")
    else:
        edit(path, lambda content: content[kind].update(bomb=bomb))
    assert refused(path, "safely")
    assert not flag.exists()
    # The bomb is live: an unsafe reader sets it off.
    if kind == "pickle":
        pickle.load(io.BytesIO(path.read_bytes()))
    else:
        torch.load(path, weights_only=False)
    assert flag.exists()


WRONG = {
    "sigma": [[0.5], 10**400, True, -0.5, 0, float("nan"), float("inf"), "0.5", None],
    "epsilon": [-1, "0.3", {}],
    "seconds": ["1", -1.0, [], 10**400],
    "options": [[], "x", 3, None],
    "seed": [0.5, -1, True, "0", 10**400],
    "command": [3, [], None],
    "commit": [0, {}],
    "versions": [["3.11"]],
}
wrong = pytest.mark.parametrize(("name", "value"), [(n, v) for n in WRONG for v in WRONG[n]])


def rewrite(path, **entries):
    """Entries of a checkpoint changed by someone who knows how to sign it."""
    content = torch.load(path, weights_only=True)
    for entry, values in entries.items():
        content[entry] |= values
    parts = (content[entry] for entry in ("config", "facts", "weights"))
    torch.save(content | {"digest": checkpoints._digest(*parts)}, path)


@wrong
def test_facts_of_the_wrong_kind_are_refused(path, name, value):
    rewrite(path, facts={name: value})
    assert refused(path, f"'{name}'")
    with pytest.raises(ValueError, match=f"'{name}'"):
        save_checkpoint(path.with_name("new.pt"), network(), **{name: value})
    assert not path.with_name("new.pt").exists()


@pytest.mark.parametrize(
    "config",
    [
        *({"channels": value} for value in (["a", 2], [10**30, 2], [10**5, 10**5], 3, "12", None)),
        *({"hidden": value} for value in ("4", 10**30, 10**6, [3], True)),
        *({"thresholds": value} for value in ([0.1], ["a", "b"], 3, [10**400, 1], {})),
        *({"pooled": value} for value in (1, "yes")),
        {"num_classes": 10**30},
    ],
)
def test_configs_of_the_wrong_kind_are_refused(path, config):
    rewrite(path, config=config)
    assert refused(path, "another architecture")


def test_weights_of_another_type_are_refused(path):
    weights = torch.load(path, weights_only=True)["weights"]
    rewrite(path, weights={"output.bias": weights["output.bias"].double()})
    assert refused(path, "another architecture")
