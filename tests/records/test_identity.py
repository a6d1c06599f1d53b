"""Rows of other people's models: what their twins say, and what a resumed run refuses."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

from src.checkpoints import save_checkpoint, weights_digest
from src.models import ConvNN, SmoothClassifier
from src.records import certify_dataset, merge, read_rows, redraw, verify
from src.records.certify import certificate_settings
from src.records.identity import fixed_images
from src.records.rows import write_rows
from src.records.twins import different_settings, read_twin
from src.utils import data_digest

BUDGET = {"n0": 10, "n": 200, "progress": False}


class Net(nn.Module):
    """Two layers with a temperature, which no state holds."""

    def __init__(self, channels=3, classes=100, temperature=1.0, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.features = nn.Conv2d(channels, 4, 3, padding=1)
        self.output = nn.Linear(16, classes)
        self.temperature = temperature

    def forward(self, images):
        features = nn.functional.adaptive_avg_pool2d(self.features(images).relu(), 2)
        return self.output(features.flatten(1)) / self.temperature


class Masked(Net):
    """One class is out of the question, another undefined."""

    def forward(self, images):
        logits = super().forward(images)
        logits[:, 3], logits[:, 7] = -1e9, torch.nan
        return logits


class Other(Net):
    """The same, under another name."""


def data(shape=(3, 8, 6), classes=100, count=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, *shape), generator=generator) / 255
    return TensorDataset(images, torch.arange(count) % classes)


def certify(path, model=None, dataset=None, classes=100, sigma=0.5, **options):
    model = Net() if model is None else model
    smooth = SmoothClassifier(model, sigma, classes)
    dataset = data(classes=classes) if dataset is None else dataset
    return certify_dataset(smooth, dataset, path, **{**BUDGET, **options})


def hooked(model):
    model.features.register_forward_hook(lambda module, given, output: output * 1.01)
    return model


MODELS = {
    "3 channels, 100 classes": lambda: Net(),
    "1,000 classes": lambda: Net(classes=1000),
    "2 classes": lambda: Net(classes=2),
    "float64 in DataParallel": lambda: nn.DataParallel(Net().double()),
    "bfloat16": lambda: Net().bfloat16(),
    "hooks": lambda: hooked(Net()),
    "no weights": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
}


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_any_model_are_resumed_verified_and_drawn_again(name, tmp_path):
    model, path = MODELS[name](), tmp_path / "rows.csv"
    classes = {"1,000 classes": 1000, "2 classes": 2, "no weights": 3}.get(name, 100)
    rows = certify(path, model, classes=classes)
    assert (len(rows), verify(path)) == (5, [])
    whole = path.read_bytes()
    path.write_bytes(whole[:-70])
    assert certify(path, copy.deepcopy(model), classes=classes, resume=True) == rows
    assert path.read_bytes() == whole
    found = data(classes=classes)
    assert redraw(path, 9, model=model, dataset=found) == []
    assert redraw(path, 1, model=SmoothClassifier(model, 0.5, classes), dataset=found) == []
    rows[2]["top_count"] = str(int(rows[2]["top_count"]) - 1)
    write_rows(path, rows)
    assert verify(path) != []
    (problem,) = redraw(path, 9, model=model, dataset=found)
    assert problem.startswith("image 2 drawn again gives another row; a few votes")


def patched(model):
    model.forward = lambda images: Net.forward(model, images).roll(1, 1)
    return model


OTHERS = {
    "state": (lambda: Net(seed=1), "model_digest"),
    "class": (lambda: Other(), r"model_class was .*\.Net, is .*\.Other"),
    "type": (lambda: Net().double(), "model_digest"),
    "hook": (lambda: hooked(Net()), "outputs on fixed images"),
    "temperature": (lambda: Net(temperature=1.01), "outputs on fixed images"),
    "method": (lambda: patched(Net()), "outputs on fixed images"),
    "ours": (lambda: ConvNN(num_classes=100), "model_class was"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_is_refused_and_named(name, tmp_path):
    model, difference = OTHERS[name]
    path, dataset = tmp_path / "rows.csv", data((1, 28, 28))
    certify(path, Net(1), dataset)
    path.write_bytes(path.read_bytes()[:-70])
    before = path.read_bytes(), path.with_suffix(".json").read_bytes()
    model = model()
    if isinstance(model, Net):
        model.features = nn.Conv2d(1, 4, 3, padding=1).to(next(model.parameters()))
        source = Net(1, seed=int(name == "state"))
        model.load_state_dict(source.state_dict())
        model = hooked(model) if name == "hook" else model
    with pytest.raises(ValueError, match=f"cannot be resumed.*{difference}"):
        certify(path, model, dataset, resume=True)
    assert before == (path.read_bytes(), path.with_suffix(".json").read_bytes())
    (problem,) = redraw(path, 1, model=model, dataset=dataset)
    assert "the model given is not the model behind the rows" in problem


def test_other_data_settings_and_class_counts_are_refused_and_named(tmp_path):
    path = tmp_path / "rows.csv"
    certify(path, indices=range(4))
    other = {
        "data_digest": {"dataset": data(seed=1)},
        "sigma was 0.5, is 0.25": {"sigma": 0.25},
        "n was 200, is 300": {"n": 300},
        "seed was 0, is 1": {"seed": 1},
        "alpha": {"alpha": 0.01},
        "indices": {"indices": range(5)},
    }
    for difference, options in other.items():
        with pytest.raises(ValueError, match=f"cannot be resumed.*{difference}"):
            certify(path, **({"indices": range(4)} | options), resume=True)
    images, labels = data().tensors
    shifted = TensorDataset(images, labels + 1)
    assert redraw(path, 1, model=Net(), dataset=shifted) == [
        "the images are not those behind the rows"
    ]
    # Fewer classes are another number of logits, so another network.
    with pytest.raises(ValueError, match=r"give num_classes=100, not 10, to the SmoothClassifier"):
        certify(path, Net(), classes=10, resume=True)
    with pytest.raises(ValueError, match="num_classes was 100, is 50"):
        certify(path, Net(classes=50), data(classes=50), classes=50, indices=range(4), resume=True)


def test_nothing_is_written_of_what_is_refused(tmp_path):
    path, images = tmp_path / "rows.csv", data().tensors[0]
    changing = nn.Sequential(nn.Flatten(), nn.Linear(144, 100), Noise())
    refused = [
        (Net(classes=7), data(), "num_classes=7"),
        (ConvNN(), data((1, 28, 28)), "num_classes=10"),
        (changing, data(), "answers differently when it is asked"),
        (Net(), Subset(data(), [0]), "must be a TensorDataset"),
        (Net(), TensorDataset(images), "of images and labels"),
        (Net(), TensorDataset(images * 2, torch.arange(5)), r"outside \[0, 1\]"),
        (Net(), TensorDataset(images, torch.arange(5) + 97), "has the class 101"),
        (nn.Flatten(0), data(), "expected floating-point logits"),
    ]
    for model, dataset, sentence in refused:
        with pytest.raises(ValueError, match=sentence):
            certify(path, model, dataset)
        assert not path.with_suffix(".json").exists()
        assert not path.exists()


class Noise(nn.Module):
    def forward(self, logits):
        return logits + torch.randn_like(logits)


def test_the_twin_of_an_unaltered_network_stays_as_it_was():
    smooth = SmoothClassifier(ConvNN(), 0.5)
    found = certificate_settings(smooth, data((1, 28, 28), 10), n0=5, n=7)
    known = {"network", "model_digest", "data_digest", "sigma", "device", "num_classes"}
    added = {"exact", "levels", "off_grid", "sampler_cost"}
    assert found.keys() == known | added | {"precision", "form", "n0", "n"}
    assert found["network"] == smooth.base_classifier.config
    wrapped = SmoothClassifier(nn.DataParallel(smooth.base_classifier), 0.5)
    assert certificate_settings(wrapped, data((1, 28, 28), 10), n0=5, n=7) == found


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
def test_outputs_may_differ_by_rounding_only():
    def settings(model, **changes):
        smooth = SmoothClassifier(model, 0.5, 100)
        return certificate_settings(smooth, data(), **({"n0": 5, "n": 7} | changes))

    model = Net()
    made = json.loads(json.dumps(settings(model)))
    assert different_settings(made, settings(nn.DataParallel(model))) == []
    with torch.backends.mkldnn.flags(enabled=False):
        assert different_settings(made, settings(model)) == []
    for factor, expected in ((1 + 1e-6, []), (1 + 1e-2, ["outputs"])):
        model.temperature = 1 / factor
        assert different_settings(made, settings(model)) == expected
    # NaN equals NaN, and a class that is never chosen hides no other.
    model = Masked()
    made = settings(model)
    assert different_settings(made, settings(model)) == []
    model.temperature = 1.01
    assert different_settings(made, settings(model)) == ["outputs"]
    for damage in ({}, {"logits": []}, {"logits": made["outputs"]["logits"][:3]}, None):
        assert different_settings(made, made | {"outputs": damage}) == ["outputs"]


def test_outputs_are_asked_for_without_a_trace():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(144, 100))
    model[1].eval()
    state, before = torch.get_rng_state(), weights_digest(model.state_dict())
    settings = certificate_settings(SmoothClassifier(model, 0.5, 100), data(), n0=5, n=7)
    assert torch.equal(state, torch.get_rng_state())
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert weights_digest(model.state_dict()) == before == settings["model_digest"]


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 32, 32), (2, 5, 7)])
def test_fixed_images_are_of_any_shape_and_go_beyond_the_pixels(shape):
    images = fixed_images(shape)
    assert images.shape == (4, *shape)
    assert torch.equal(images, fixed_images(shape))
    assert images[:3].min() >= 0
    assert images[:3].max() <= 1
    assert len(images.flatten(1).unique(dim=0)) > 1


def test_digests_take_tensors_of_any_kind():
    values = torch.arange(6.0).view(2, 3)
    kinds = [values, values.bfloat16(), values.half(), values.bool(), values.T, values[:0]]
    kinds += [values[0, 0], values.to_sparse(), values.requires_grad_(), values + 1j, None, "text"]
    digests = [weights_digest({"value": tensor}) for tensor in kinds]
    # The digest of an empty state; sparse, with gradient or without, the values are the same.
    assert len(set(digests)) == len(kinds) - 2
    assert weights_digest({}) == weights_digest({})
    for images in (torch.rand(2, 3, 4, 4).bfloat16(), torch.rand(2, 1, 2, 2, dtype=torch.float64)):
        twin = images.clone(memory_format=torch.channels_last)
        labels = torch.arange(2)
        digest = data_digest(TensorDataset(images, labels))
        assert digest == data_digest(TensorDataset(twin.requires_grad_(), labels))
        assert digest != data_digest(TensorDataset(images, labels + 1))


def test_shards_of_a_foreign_model_are_merged(tmp_path):
    whole, parts = tmp_path / "whole.csv", [tmp_path / f"{k}.csv" for k in (1, 2)]
    certify(whole)
    for k, path in enumerate(parts, 1):
        certify(path, shard=(k, 2))
    assert merge(tmp_path / "merged.csv", parts) == 5
    assert (tmp_path / "merged.csv").read_bytes() == whole.read_bytes()
    certify(parts[1], hooked(Net()), shard=(2, 2))
    with pytest.raises(ValueError, match="of another run"):
        merge(tmp_path / "merged.csv", parts)


def test_a_checkpoint_of_ours_is_not_the_foreign_model(tmp_path):
    path, dataset = tmp_path / "rows.csv", data((1, 28, 28), 10)
    certify(path, Net(1, 10), dataset, classes=10)
    save_checkpoint(tmp_path / "ours.pt", ConvNN())
    (problem,) = redraw(path, 1, tmp_path / "ours.pt", dataset=dataset)
    assert "is not the model behind the rows (it differs in class and state and outputs)" in problem
    with pytest.raises(ValueError, match=r"redraw\(path, rows, model=\.\.\., dataset=\.\.\.\)"):
        redraw(path, 1)
    assert read_twin(path.with_suffix(".json"))["settings"]["image_shape"] == [1, 28, 28]
    assert len(read_rows(path)) == 5
