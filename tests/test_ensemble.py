"""Several networks as one: their mean, in floats and whole numbers, on disk and under attack."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from src import checkpoints
from src.checkpoints import load_checkpoint, save_checkpoint
from src.engine.exact import ExactConvNN, ExactEnsemble
from src.engine.exact_native import NativeExact, draw_copies, exact_library
from src.engine.forms import attacked_form, form_name, voting_form
from src.engine.noise import STAGES, Noise
from src.engine.parts import PRECISIONS, apply_thresholds
from src.engine.untouched import alteration, evaluation_form, is_untouched
from src.ensemble import main
from src.models import ConvNN, Ensemble, SmoothClassifier
from src.records import certify_dataset, redraw
from src.robustness.strongest import hits_by_stage
from src.robustness.thresholds import thresholds_attack
from tests.helpers import bits

CUTS = (0.4, 0.6)
# Sizes, hidden layers and thresholds of three members.
MEMBERS = {
    "alike": [{"channels": (16, 32), "hidden": 16}] * 3,
    "different": [{}, {"channels": (5, 20), "hidden": 24}, {"channels": (8, 16)}],
    "with thresholds": [{"thresholds": CUTS}, {"hidden": 8, "thresholds": CUTS}, {}],
}
every = pytest.mark.parametrize("members", MEMBERS.values(), ids=MEMBERS)


def network(seed=0, scale=1.0, **options):
    """A network whose normalisation does something, with logits around zero: all classes vote."""
    torch.manual_seed(seed)
    model = ConvNN(**options).eval()
    for norm in (model.norm1, model.norm2):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight)
    model.output.bias.data -= model(images_of(50)).mean(0)
    for values in model.output.parameters():
        values.data *= scale
    return model


def made(members=MEMBERS["different"]):
    return Ensemble([network(seed, **options) for seed, options in enumerate(members)]).eval()


def images_of(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 1, 28, 28), generator=generator) / 255


def own_answers(model, count=12):
    images = images_of(count)
    return TensorDataset(images, model(images).argmax(1))


def same(first, second):
    return all(torch.equal(*pair) for pair in zip(first, second, strict=True))


# --- In floats ------------------------------------------------------------------------------


@every
def test_logits_and_gradients_are_the_mean_of_those_of_the_members(members):
    model, images = made(members), images_of(6).requires_grad_()
    each = [member(images) for member in model.networks]
    assert torch.equal(model(images), torch.stack(each).mean(0))
    weights = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))

    def gradient(logits):
        return torch.autograd.grad((logits * weights).sum(), images)[0]

    expected = torch.stack([gradient(member(images)) for member in model.networks]).mean(0)
    for form in (model, model.inference_form(), attacked_form(model, "float32")):
        torch.testing.assert_close(form(images), model(images), rtol=1e-4, atol=1e-4)
        found = gradient(form(images))
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    torch.testing.assert_close(voting_form(model, "float32")(images), model(images))
    # The parameters of the members are its own.
    assert {*map(id, model.parameters())} == {
        id(values) for member in model.networks for values in member.parameters()
    }


def test_it_votes_as_its_only_member():
    (member,) = (model := Ensemble([network(hidden=16)]).eval()).networks
    for precision in (None, *PRECISIONS):
        found, expected = (
            SmoothClassifier(of, 0.5, precision=precision).certify(images_of(2), n=600)
            for of in (model, member)
        )
        assert same(found, expected)


def test_what_is_no_ensemble_is_refused():
    for networks, sentence in (
        ([], "'networks' are none"),
        ([nn.Linear(2, 2)], "no Linear"),
        ([network(), made()], "no Ensemble"),
        ([network(), network(num_classes=3)], "have 3 and 10 classes"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Ensemble(networks)
    with pytest.raises(ValueError, match="28"):
        made()(torch.zeros(2, 1, 27, 28))
    with pytest.raises(ValueError, match="28"):
        SmoothClassifier(made(), 0.5).predict(torch.zeros(2, 1, 27, 28))


# --- In whole numbers -----------------------------------------------------------------------


@every
@pytest.mark.parametrize("flags", [(), ("-mno-avx512f",)], ids=str)
def test_c_and_torch_give_the_same_bits(flags, members):
    library = exact_library(*flags)
    if library is None:
        pytest.skip("needs a C compiler")
    form = made(members).inference_form("exact")
    native = NativeExact(form, library)
    noise, stage, steps = Noise(5, 7, 0.7), STAGES["estimate"], (images_of(1)[0] * 255).int()
    for count in (1, 8, 21):
        copies = draw_copies(library, steps, noise, stage, 3, count)
        assert torch.equal(native.logits(copies), form.logits(copies))
        votes = form.classes(copies).bincount(minlength=10)
        assert votes.tolist() == native.votes(steps, noise, stage, 3, count).tolist()
    assert votes.max() < count


@every
def test_whole_logits_are_the_mean_of_the_logits_nearly(members):
    model, images = made(members), images_of(40)
    form = model.inference_form("exact")
    with torch.no_grad():
        error = (form(images) - model(images)).abs().max()
    # The sums that cancel to logits are as large as the biases.
    assert error < 0.05 * max(member.output.bias.abs().max() for member in model.networks)
    each = [ExactConvNN(member)(images) for member in model.networks]
    # Nearly all of that is of the members themselves.
    assert (form(images) - torch.stack(each).mean(0)).abs().max() < error / 100
    # The order of the members does not count.
    turned = Ensemble([*model.networks][::-1]).eval()
    assert torch.equal(turned.inference_form("exact")(images), form(images))
    assert form(torch.full((1, 1, 28, 28), torch.nan)).isnan().all()


def test_members_of_any_size_are_brought_to_one_scale():
    # From logits of a hundredth to those of a hundred; two sizes, whose steps per unit differ.
    members = [network(seed, 10.0**seed, hidden=seed % 2 * 64 or None) for seed in range(-2, 3)]
    form, images = ExactEnsemble(members), images_of(20)
    alone = [ExactConvNN(member) for member in members]
    mean = torch.stack([member(images) for member in alone]).mean(0)
    largest = 2**31 / min(member.unit for member in alone)
    assert (form(images) - mean).abs().max() <= largest * 2.0**-21
    assert max(form.multipliers) == 2**20


def test_no_sum_leaves_64_bits():
    # Logits of nearly 2**31: all weights of the output of one sign, and all features large.
    member = network()
    member.norm2.bias.data.fill_(9)
    member.norm2.weight.data.fill_(1)
    member.output.weight.data.fill_(1)
    form, steps = ExactEnsemble([member] * 50), (images_of(3) * 255).round().int()
    sums = form.logits(steps)
    assert torch.equal(sums, 50 * 2**20 * ExactConvNN(member).logits(steps).long())
    assert sums.min() > 50 * 2**50
    if library := exact_library():
        assert torch.equal(NativeExact(form, library).logits(steps), sums)
    with pytest.raises(ValueError, match="4,097 networks are too many"):
        ExactEnsemble([member] * 4097)


def test_equal_sums_are_decided_for_the_lowest_class():
    first, second = network(), network()
    for values in second.output.parameters():
        # The classes 2 and 3 change places, so that their sums are equal.
        values.data[[2, 3]] = values.data[[3, 2]]
    for member in (first, second):
        member.output.bias.data[2:4] += 1.5
    smooth = SmoothClassifier(Ensemble([first, second]), 0.5)
    votes = [0] * 10
    for stage in ("select", "estimate"):
        with smooth._noisy(images_of(3), 0, None) as (noisy, _):
            votes = np.add(votes, sum(one.votes(stage, 200) for one in noisy))
    assert votes[2] > 100
    assert votes[3] == 0


def test_certificates_are_exact_and_drawn_again(tmp_path, monkeypatch):
    model, data = made(), own_answers(made(), 4)
    smooth = SmoothClassifier(model, 0.5)
    assert smooth.exact
    assert form_name(model, "exact") == "whole numbers"
    path, options = tmp_path / "rows.csv", {"n": 300, "progress": False}
    rows = certify_dataset(smooth, data, path, **options)
    assert all(int(row["rival_count"]) > 0 for row in rows)
    saved = save_checkpoint(tmp_path / "m.pt", model)
    assert redraw(path, 4, model=load_checkpoint(saved), dataset=data) == []
    (problem,) = redraw(path, 4, model=model.networks[0], dataset=data)
    assert "not the model behind the rows" in problem
    for module in ("src.engine.noise", "src.engine.forms"):
        monkeypatch.setattr(f"{module}.exact_library", lambda *_: None)
    assert certify_dataset(smooth, data, tmp_path / "again.csv", **options) == rows


def test_the_form_in_floats_says_how_many_members_are_in_c(monkeypatch):
    names = {name: form_name(made(members), "float32") for name, members in MEMBERS.items()}
    if exact_library():
        assert names["alike"] == "batch normalisation folded, convolutions in C"
        assert names["different"] == "batch normalisation folded, some convolutions in C"
    monkeypatch.setattr("src.engine.forms.float_library", lambda: None)
    assert form_name(made(), "float32") == "batch normalisation folded"


# --- Altered members ------------------------------------------------------------------------


class Negative(ConvNN):
    def forward(self, images):
        return -super().forward(images)


def negate(module, given, logits):
    return -logits


ALTERATIONS = {
    "hook": lambda m: m.register_forward_hook(negate),
    "hook on a member": lambda m: m.networks[1].register_forward_hook(negate),
    "hook within": lambda m: m.networks[1].output.register_forward_hook(negate),
    "forward": lambda m: setattr(m, "forward", lambda images: -Ensemble.forward(m, images)),
    "forward of a member": lambda m: setattr(m.networks[0], "forward", lambda x: x[:, 0, 0, :10]),
    "subclass": lambda m: m.networks.__setitem__(0, Negative().eval()),
    "another": lambda m: m.networks.append(nn.Sequential(nn.Flatten(), nn.Linear(784, 10))),
    "layer": lambda m: setattr(m.networks[2], "norm1", nn.Identity()),
    "added": lambda m: setattr(m, "extra", nn.Identity()),
    "double": lambda m: m.double(),
    "thresholds": lambda m: setattr(m.networks[2], "thresholds", (0.6, 0.4)),
}


@pytest.mark.parametrize("change", ALTERATIONS.values(), ids=ALTERATIONS)
def test_with_an_altered_member_it_is_its_own_form_and_says_so(change, tmp_path):
    model = made()
    assert is_untouched(model)
    change(model)
    assert alteration(model)
    with evaluation_form(model) as form:
        assert form is model
    smooth, data = SmoothClassifier(model, 1e-6), images_of(3)
    assert (smooth.precision, smooth.exact) == ("float32", False)
    expected = model(data.to(next(model.parameters()).dtype)).argmax(1)
    assert torch.equal(smooth.certify(data, n=50).prediction, expected)
    with pytest.raises(ValueError, match="'precision'"):
        SmoothClassifier(model, 0.5, precision="exact")
    with pytest.raises(ValueError, match="cannot be kept in a checkpoint"):
        save_checkpoint(tmp_path / "m.pt", model)
    assert not [*tmp_path.iterdir()]


def test_a_forward_pass_that_was_changed_for_the_class_is_found(monkeypatch):
    plain, model = Ensemble.forward, Ensemble([ConvNN(), ConvNN((16, 16))]).eval()
    assert SmoothClassifier(model, 0.5).exact
    monkeypatch.setattr(Ensemble, "forward", lambda self, images: -plain(self, images))
    assert not SmoothClassifier(model, 0.5).exact
    with evaluation_form(model, probe=True) as form:
        assert form is model


# --- Thresholds -----------------------------------------------------------------------------

QUICK = {"steps": 2, "restarts": 1, "targets": 1, "queries": 5, "progress": False}


def test_thresholds_of_all_members_are_attacked_as_those_of_one():
    model = Ensemble([network(seed, thresholds=CUTS) for seed in range(2)]).eval()
    assert model.thresholds == CUTS
    data = own_answers(model)
    assert any("thresholds" in stage for stage in hits_by_stage(model, data, 0.1, **QUICK))
    with evaluation_form(model) as form:
        cut = apply_thresholds(data.tensors[0], CUTS)
        torch.testing.assert_close(form(data.tensors[0]), model(data.tensors[0]))
        # Without them it is the rest of the network.
        form.thresholds = None
        torch.testing.assert_close(form(cut), model(data.tensors[0]))
    # The form is a copy.
    assert model.thresholds == CUTS
    one = Ensemble([network(thresholds=CUTS)]).eval()
    attacks = [thresholds_attack(m, *data.tensors, 0.1, steps=3) for m in (one, one.networks[0])]
    assert torch.equal(*attacks)


def test_different_thresholds_are_warned_of():
    model = made(MEMBERS["with thresholds"])
    assert model.thresholds is None
    data = own_answers(model, 4)
    with pytest.warns(UserWarning, match="members of an Ensemble need the same thresholds"):
        stages = hits_by_stage(model, data, 0.05, **QUICK)
    assert not any("thresholds" in stage for stage in stages)
    with warnings.catch_warnings(action="error"):
        hits_by_stage(made(), data, 0.05, **QUICK)
    # A hook may do anything before the thresholds or after them.
    hooked = Ensemble([network(thresholds=CUTS)] * 2).eval()
    hooked.register_forward_hook(negate)
    with pytest.raises(ValueError, match="does not apply its thresholds"):
        thresholds_attack(hooked, *data.tensors, 0.1, steps=2)


# --- On disk --------------------------------------------------------------------------------


@every
def test_round_trip_is_exact(members, tmp_path):
    model = made(members)
    facts = [{"sigma": 0.5, "seed": seed} for seed in range(3)]
    for member, of in zip(model.networks, facts, strict=True):
        member.facts = of
    path = save_checkpoint(tmp_path / "m.pt", model, sigma=0.5)
    loaded = load_checkpoint(path)
    assert isinstance(loaded, Ensemble)
    assert bits(loaded.state_dict()) == bits(model.state_dict())
    assert loaded.config == model.config
    assert loaded.facts == {"sigma": 0.5, "members": facts}
    assert [member.facts for member in loaded.networks] == facts
    assert torch.equal(loaded(images_of(3)), model(images_of(3)))
    assert not any(module.training for module in loaded.modules())
    # And once more, by the facts that it has now.
    again = save_checkpoint(tmp_path / "n.pt", loaded, **loaded.facts)
    assert again.read_bytes() == path.read_bytes()


def test_thresholds_set_later_are_not_saved(tmp_path):
    model = made()
    model.networks[1].thresholds = CUTS
    with pytest.raises(ValueError, match="thresholds were set after"):
        save_checkpoint(tmp_path / "m.pt", model)


def with_entries(content, **entries):
    """A checkpoint changed by someone who knows how to sign it."""
    content |= entries
    parts = (content[entry] for entry in ("config", "facts", "weights"))
    return content | {"digest": checkpoints._digest(*parts)}


SMALL = {"channels": [1, 2], "hidden": None, "num_classes": 10}
BAD = {
    "a member less": {"config": {"networks": [SMALL]}},
    "a member more": {"config": {"networks": [SMALL] * 3}},
    "another size": {"config": {"networks": [SMALL, SMALL | {"channels": [2, 2]}]}},
    "classes that differ": {"config": {"networks": [SMALL, SMALL | {"num_classes": 2}]}},
    "no member": {"config": {"networks": []}},
    "no list": {"config": {"networks": 3}},
    "no configs": {"config": {"networks": "ab"}},
    "absurd": {"config": {"networks": [SMALL, SMALL | {"channels": [10**5, 10**5]}]}},
    "both kinds": {"config": SMALL | {"networks": [SMALL] * 2}},
    "a config within": {"config": {"networks": [{"networks": [SMALL]}] * 2}},
    "no facts": {"facts": {}},
    "facts of one": {"facts": {"members": [{}]}},
    "facts of none": {"facts": {"members": [1, 2]}},
    "wrong facts": {"facts": {"members": [{}, {"sigma": -1}]}},
    "other weights": {"weights": {}},
}


@pytest.mark.parametrize("name", [*BAD, "unsigned"])
def test_a_damaged_one_is_refused_in_one_sentence(name, tmp_path):
    path = save_checkpoint(tmp_path / "m.pt", made([{"channels": (1, 2)}] * 2))
    content = torch.load(path, weights_only=True)
    if name == "unsigned":
        content["weights"]["networks.1.output.bias"][0] += 1
    else:
        content = with_entries(content, **BAD[name])
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"is damaged|another architecture") as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def files(tmp_path):
    """Checkpoints of two members."""
    balls = [{"norm": "linf", "epsilon": 0.3, "seed": seed} for seed in range(2)]
    return [
        str(save_checkpoint(tmp_path / f"{k}.pt", network(k), sigma=0.5, options=ball))
        for k, ball in enumerate(balls)
    ]


def test_the_command_makes_one_of_checkpoints(files, tmp_path, capsys):
    out = tmp_path / "deep" / "both.pt"
    main([*files, "--out", str(out)])
    model = load_checkpoint(out)
    assert torch.equal(model(images_of(2)), Ensemble(map(load_checkpoint, files))(images_of(2)))
    assert model.facts["command"].startswith("python -m src.ensemble ")
    assert model.facts["sigma"] == 0.5
    ball = {name: model.facts["options"].get(name) for name in ("norm", "epsilon", "seed")}
    assert ball == {"norm": "linf", "epsilon": 0.3, "seed": None}
    assert [of["options"]["seed"] for of in model.facts["members"]] == [0, 1]
    assert f"main_compare.py --model both={out}" in capsys.readouterr().out


def test_the_command_refuses_what_makes_none(files, tmp_path):
    other = str(save_checkpoint(tmp_path / "other.pt", network(num_classes=3)))
    before = sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir())
    for words, error, sentence in (
        ([files[0], "--out", str(tmp_path / "x.pt")], ValueError, "two or more"),
        ([*files, "--out", files[1]], ValueError, "is one of the checkpoints"),
        ([files[0], other, "--out", str(tmp_path / "x.pt")], ValueError, "3 and 10 classes"),
        ([*files, "--out", str(tmp_path)], OSError, "cannot be written"),
        ([files[0], "none.pt", "--out", str(tmp_path / "x.pt")], FileNotFoundError, "none.pt"),
    ):
        with pytest.raises(error, match=sentence):
            main(words)
    assert sorted((path.name, path.read_bytes()) for path in tmp_path.iterdir()) == before
