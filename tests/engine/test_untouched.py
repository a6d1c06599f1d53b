"""What is judged is the function that the user holds: fast forms only of untouched networks."""

import re
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import TensorDataset

from src.attacks import gradient_attack, pgd_attack
from src.checkpoints import load_checkpoint, save_checkpoint
from src.checks import check_function
from src.engine.forms import default_precision, form_name, inference_form, voting_form
from src.engine.parts import PRECISIONS, TOLERANCES
from src.engine.untouched import (
    agrees,
    alteration,
    evaluation_form,
    is_untouched,
    unwrapped,
)
from src.models import ConvNN, SmoothClassifier
from src.robustness.challenge import challenge_certificates
from src.robustness.smallest_epsilon import smallest_epsilons
from src.robustness.strongest import hits_by_stage, strongest_attack
from src.robustness.thresholds import thresholds_attack
from src.training_and_evaluation import accuracy

QUICK = {"steps": 2, "restarts": 1, "targets": 1, "queries": 5, "progress": False}


def network(seed=0, channels=(16, 16), **options):
    torch.manual_seed(seed)
    return ConvNN(channels, **options).eval()


def images_of(count, seed=0, side=28):
    """On the grid of bytes: with hardly any noise, another image would be too far from it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 1, side, side), generator=generator) / 255


def own_answers(model, count=24):
    images = images_of(count)
    with torch.no_grad():
        return TensorDataset(images, model(images).argmax(1))


def negate(module, given, logits):
    return -logits


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def through(change):
    """`change(network)` and the network that was changed."""

    def altered(**options):
        model = network(**options)
        change(model)
        return model.eval()

    return altered


def replace_head(model):
    model.output = nn.Sequential(nn.Linear(784, 10))


def override(model):
    kept = model.forward
    model.forward = lambda images: -kept(images)


def override_a_child(model):
    kept = model.output.forward
    model.output.forward = lambda features: -kept(features)


ALTERATIONS = {
    "hook": lambda m: m.output.register_forward_hook(negate),
    "hook with keywords": lambda m: m.register_forward_hook(
        lambda module, given, named, logits: -logits, with_kwargs=True, always_call=True
    ),
    "hook before": lambda m: m.register_forward_pre_hook(lambda module, given: (1 - given[0],)),
    "hook inside": lambda m: m.norm1.register_forward_hook(negate),
    "hook backward": lambda m: m.conv2.register_full_backward_hook(lambda *given: None),
    "hook backward before": lambda m: m.register_full_backward_pre_hook(lambda *given: None),
    "parametrization": lambda m: nn.utils.parametrize.register_parametrization(
        m.conv1, "weight", Doubled()
    ),
    "pruned": lambda m: prune.random_unstructured(m.output, "weight", 0.5),
    "forward": override,
    "forward of a child": override_a_child,
    "head": replace_head,
    "layer": lambda m: setattr(m, "conv2", nn.Sequential(m.conv2)),
    "layer where there is none": lambda m: setattr(m, "hidden", nn.Identity()),
    "layer added": lambda m: setattr(m, "extra", nn.Identity()),
    "activation": lambda m: setattr(m, "norm1", nn.Sequential(m.norm1, nn.Tanh())),
    "epsilon": lambda m: setattr(m.norm1, "eps", 1.0),
    "stride": lambda m: setattr(m.conv1, "padding_mode", "reflect"),
    "double": lambda m: m.double(),
    "thresholds": lambda m: setattr(m, "thresholds", (0.6, 0.4)),
    "config": lambda m: m.config.update(channels=[2, 2]),
}
altered = pytest.mark.parametrize("change", ALTERATIONS.values(), ids=ALTERATIONS)


@pytest.mark.parametrize(
    "options",
    [{}, {"hidden": np.int64(3)}, {"thresholds": (0.4, 0.6)}, {"num_classes": 2}],
)
def test_a_network_as_it_is_made_is_untouched(options):
    model = network(**options)
    state = torch.get_rng_state()
    for mode in (True, False):
        assert is_untouched(model.train(mode))
    assert torch.equal(torch.get_rng_state(), state)
    model.thresholds = [0.2, 0.3]
    with evaluation_form(model, probe=True) as form:
        assert form is not model


@altered
def test_an_altered_network_is_its_own_form_everywhere(change):
    model = through(change)()
    assert not is_untouched(model)
    images = images_of(2)
    with evaluation_form(model) as form:
        assert form is model
    data = own_answers(model)
    assert accuracy(model, data) == 1.0
    smooth = SmoothClassifier(model, 1e-6)
    assert torch.equal(smooth.certify(data.tensors[0][:4], n=50).prediction, data.tensors[1][:4])
    assert torch.equal(smooth.predict(images, n=20), model(images).argmax(1))
    assert form_name(model, "float32") == "its own forward pass"
    assert default_precision(model) == smooth.precision == "float32"
    for call in (model.inference_form, partial(voting_form, model, "float32")):
        with pytest.raises(ValueError, match="Only a ConvNN as it is made has other forms"):
            call()
    for precision in set(PRECISIONS) - {"float32"}:
        with pytest.raises(ValueError, match="'precision'"):
            SmoothClassifier(model, 0.5, precision=precision)
        late = SmoothClassifier(network(), 0.5, precision=precision)
        late.base_classifier = model
        with pytest.raises(ValueError, match="'precision'"):
            late.predict(images, n=20)


@altered
def test_what_a_checkpoint_cannot_keep_is_refused_on_saving(change, tmp_path):
    with pytest.raises(ValueError, match="'model' cannot be kept in a checkpoint"):
        save_checkpoint(tmp_path / "m.pt", through(change)())
    assert not [*tmp_path.iterdir()]


def test_hooks_on_all_modules_count_too():
    model, hook = network(), nn.modules.module.register_module_forward_hook(lambda *given: None)
    try:
        assert "hooks" in alteration(model)
        SmoothClassifier(model, 0.5).certify(images_of(1), n=50)
    finally:
        hook.remove()
    assert is_untouched(model)


def test_subclasses_and_later_thresholds_are_not_saved(tmp_path):
    class Sub(ConvNN):
        def forward(self, images):
            return -super().forward(images)

    assert not is_untouched(Sub())
    later, gone = network(), network(thresholds=(0.4, 0.6))
    later.thresholds, gone.thresholds = (0.4, 0.6), None
    for model, reason in ((Sub(), "a Sub"), (later, "thresholds"), (gone, "thresholds")):
        with pytest.raises(ValueError, match=reason):
            save_checkpoint(tmp_path / "m.pt", model)
    # The same values in another form are kept.
    gone.thresholds = (0.4, 0.6)
    assert load_checkpoint(save_checkpoint(tmp_path / "m.pt", gone)).thresholds == [0.4, 0.6]


def test_the_probe_finds_a_forward_pass_that_was_changed_for_the_class(monkeypatch):
    plain, model = ConvNN.forward, network()
    monkeypatch.setattr(ConvNN, "forward", lambda self, images: -plain(self, images))
    with evaluation_form(model, probe=True) as form:
        assert form is model
    data = own_answers(model)
    assert accuracy(model, data) == 1.0
    certificate = SmoothClassifier(model, 1e-6).certify(data.tensors[0][:4], n=50)
    assert torch.equal(certificate.prediction, data.tensors[1][:4])
    assert hits_by_stage(model, data, 1e-6, **QUICK)["clean"].all()
    assert default_precision(model) == "float32"
    for precision in set(PRECISIONS) - {"float32"}:
        with pytest.raises(ValueError, match=r"'precision'.*other answers"):
            SmoothClassifier(model, 0.5, precision=precision).certify(data.tensors[0][:1], n=50)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_probe_never_rejects_an_honest_network(precision):
    assert set(TOLERANCES) == set(PRECISIONS)
    for seed in range(4):
        for options in ({}, {"channels": (1, 1)}, {"hidden": 2}, {"thresholds": (0.4, 0.6)}):
            model = network(seed, **options)
            for wild in (False, True):
                if wild:
                    for norm in (model.norm1, model.norm2):
                        for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
                            tensor.normal_()
                        norm.running_var.uniform_(0.2, 3)
                    # Logits around zero, so that the bias alone is large.
                    model.output.bias.data -= model(images_of(50)).detach().mean(0)
                make = inference_form if precision == "exact" else voting_form
                assert agrees(make(model, precision), model, precision)
    model.output.bias.data[3] = torch.nan
    if precision != "exact":
        assert agrees(model.inference_form(precision), model, precision)


# --- Wrappers -------------------------------------------------------------------------------

WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "compiled": partial(torch.compile, backend="eager"),
    "twice": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_are_seen_through(wrap):
    model = network(thresholds=(0.4, 0.6))
    wrapped, data = wrap(model).eval(), own_answers(model)
    assert is_untouched(unwrapped(wrapped))
    expected = hits_by_stage(model, data, 0.05, **QUICK)
    found = hits_by_stage(wrapped, data, 0.05, **QUICK)
    assert any("thresholds" in stage for stage in expected)
    assert all(torch.equal(found[stage], hits) for stage, hits in expected.items())
    assert found.keys() == expected.keys()
    points = [thresholds_attack(m, *data.tensors, 0.05, steps=2) for m in (model, wrapped)]
    assert torch.equal(*points)
    counts = [
        SmoothClassifier(m, 1.0).certify(data.tensors[0][:2], n=200) for m in (model, wrapped)
    ]
    assert torch.equal(counts[0].top_count, counts[1].top_count)
    SmoothClassifier(wrapped, 1.0, precision="bfloat16").predict(data.tensors[0][:1], n=20)


def hooked_wrapper(model):
    wrapped = nn.DataParallel(model)
    wrapped.register_forward_hook(negate)
    return wrapped


def inverted(model):
    model.register_forward_pre_hook(lambda module, given: (1 - given[0] / 2,))
    return model


@pytest.mark.parametrize("wrap", [nn.Sequential, hooked_wrapper, inverted])
def test_a_ramp_out_of_reach_is_warned_of(wrap):
    model = wrap(network(thresholds=(0.4, 0.6)))
    data = own_answers(model)
    with pytest.warns(UserWarning, match="thresholds that cannot be taken away"):
        hits = hits_by_stage(model, data, 0.05, **QUICK)
    assert hits["clean"].all()
    assert "apgd margin" in hits
    assert not any("thresholds" in stage for stage in hits)


def test_a_model_without_thresholds_is_not_warned_of():
    with warnings.catch_warnings(action="error"):
        hits_by_stage(nn.Sequential(network()), own_answers(network(), 4), 0.05, **QUICK)


# --- One answer for an image ----------------------------------------------------------------


class Random(nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = scale

    def forward(self, images):
        logits = images.flatten(1)[:, :3]
        return logits + self.scale * torch.rand_like(logits)


def of_its_batch():
    norm = nn.BatchNorm2d(1, track_running_stats=False)
    return nn.Sequential(norm, nn.Flatten(), nn.Linear(784, 10)).eval()


class LessItsMean(nn.Module):
    def forward(self, images):
        return (images - images.mean(0)).flatten(1)[:, :10]


@pytest.mark.parametrize("model", [of_its_batch(), LessItsMean()])
@pytest.mark.parametrize("count", [1, 24])
@pytest.mark.parametrize("grey", [True, False])
def test_an_answer_that_depends_on_the_batch_is_refused(model, count, grey):
    images = torch.full((count, 1, 28, 28), 0.5) if grey else images_of(count)
    data = TensorDataset(images, torch.zeros(count, dtype=torch.int64))
    smooth, attack = SmoothClassifier(model, 0.5), partial(gradient_attack, epsilon=0.1)
    for call in (
        lambda: smooth.certify(images, n=50),
        lambda: smooth.certify(images[0], n=50),
        lambda: smooth.predict(images, n=50),
        lambda: smooth.certify_radius(images, 0.1),
        lambda: accuracy(model, data),
        lambda: accuracy(smooth, data),
        lambda: accuracy(model, data, attack=attack),
        lambda: hits_by_stage(model, data, 0.1, **QUICK),
        lambda: strongest_attack(model, *data.tensors, 0.1),
        lambda: smallest_epsilons(model, data, "linf", progress=False),
    ):
        with pytest.raises(ValueError, match="alone and in a batch"):
            call()


@pytest.mark.parametrize("model", [Random(), SmoothClassifier(network(), 0.25)])
def test_an_answer_that_changes_is_refused(model):
    images = images_of(6)
    data = TensorDataset(images, torch.zeros(6, dtype=torch.int64))
    smooth, attack = SmoothClassifier(model, 0.5, 3), partial(gradient_attack, epsilon=0.1)
    for call in (
        lambda: smooth.certify(images, n=50),
        lambda: smooth.predict(images[0], n=50),
        lambda: smooth.certify_radius(images, 0.1),
        lambda: accuracy(model, data, attack=attack),
        lambda: hits_by_stage(model, data, 1e-9, **QUICK),
        lambda: strongest_attack(model, *data.tensors, 0.1),
        lambda: smallest_epsilons(model, data, "l2", progress=False),
    ):
        state = torch.get_rng_state()
        with pytest.raises(ValueError, match=r"about the same images again.*base_classifier"):
            call()
        assert torch.equal(torch.get_rng_state(), state)


def test_one_draw_is_said_without_an_attack_and_meant_of_a_smoothed_classifier():
    data = own_answers(network())
    images, labels = data.tensors
    with pytest.warns(UserWarning, match="that of one draw"):
        accuracy(Random(), TensorDataset(images, labels % 3))
    with warnings.catch_warnings(action="error"):
        accuracy(SmoothClassifier(network(), 0.25), data)


def test_the_check_of_answers_leaves_everything_as_it_was():
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(), nn.Flatten(), nn.Linear(784, 10)).train()
    model[1].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    check_function(model, images_of(3))
    check_function(model, images_of(0))
    assert [m.training for m in model.modules()] == modes
    assert model[0].num_batches_tracked == 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "behind",
    [
        lambda z: z / 0 * 0,
        lambda z: 1e6 * z - 1e9,
        lambda z: (100 * z).softmax(1),
        lambda z: (100 * z).log_softmax(1),
        lambda z: torch.cat([z[:, :2], 0 * z[:, :1] - torch.inf], 1),
        lambda z: (z > 0).long(),
        lambda z: z.bfloat16(),
        lambda z: 0 * z,
    ],
)
def test_honest_outputs_of_every_kind_pass(behind):
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 3))

    class Behind(nn.Module):
        def forward(self, images):
            return behind(inner(images))

    for count in (1, 8):
        check_function(Behind(), images_of(count))


def test_a_dependence_that_a_large_constant_hides_is_seen():
    class Masked(nn.Module):
        def forward(self, images):
            logits = LessItsMean()(images)
            return torch.cat([logits, torch.full((len(images), 1), -1e9)], 1)

    with pytest.raises(ValueError, match="alone and in a batch"):
        check_function(Masked(), images_of(4))


def test_hooks_that_the_votes_would_miss_are_refused():
    smooth = SmoothClassifier(network(), 0.5)
    hook = smooth.register_forward_pre_hook(lambda module, given: (1 - given[0],))
    with pytest.raises(ValueError, match="hook base_classifier"):
        smooth.certify(images_of(1), n=50)
    hook.remove()
    smooth.certify(images_of(1), n=50)


# --- Types and shapes -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float64, torch.float32])
def test_networks_and_images_of_any_precision_work(dtype, given):
    model, images = network(thresholds=(0.4, 0.6)).to(dtype), images_of(8).to(given)
    assert model(images).dtype == dtype
    labels = model(images).argmax(1)
    data = TensorDataset(images, labels)
    assert pgd_attack(model, images, labels, 0.1, steps=2).dtype == given
    assert accuracy(model, data) == 1.0
    hits = hits_by_stage(model, data, 0.05, **QUICK)
    assert "thresholds apgd margin" in hits
    smooth = SmoothClassifier(model, 0.1)
    certificate = smooth.certify(images[:2], n=50)
    assert smooth.certify_radius(images[0], 0.01).samples > 0
    rows = [{"index": 0, "prediction": int(labels[0]), "radius": 0.01}]
    assert challenge_certificates(smooth, data, rows, images=1, n=50, progress=False)[1] == 1
    assert certificate.radius.dtype == torch.float64


def test_a_hook_may_change_the_size_of_the_images():
    model = network()
    model.register_forward_pre_hook(lambda module, given: (given[0][..., 2:30, 2:30],))
    (image,) = images_of(1, seed=1, side=32)
    expected = model(image[None]).argmax(1)[0]
    assert SmoothClassifier(model, 1e-6).certify(image, n=50).prediction == expected


def test_another_network_in_float64_votes_in_it():
    seen = []

    class Recorder(nn.Linear):
        def forward(self, images):
            seen.append(images.dtype)
            return super().forward(images.flatten(1))

    smooth = SmoothClassifier(Recorder(784, 10).double(), 0.5)
    smooth.certify(images_of(1), n=50)
    smooth.predict(images_of(1).double(), n=50)
    assert set(seen) == {torch.float64}


@pytest.mark.parametrize("shape", [(1, 32, 32), (2, 1, 32, 32), (3, 28, 28), (2, 3, 28, 28)])
@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel])
def test_the_shape_that_was_given_is_named(shape, wrap):
    smooth, images = SmoothClassifier(wrap(network()), 0.5), torch.rand(shape)
    for call in (smooth.certify, smooth.predict, partial(smooth.certify_radius, radius=0.1)):
        with pytest.raises(ValueError, match=re.escape(f"shape {shape}; expected (B, 1, 28, 28)")):
            call(images)


@pytest.mark.parametrize("options", [{"channels": (10**30, 2)}, {"hidden": 10**30}])
def test_absurd_widths_are_refused(options):
    with pytest.raises(ValueError, match="at most 1,048,576"):
        ConvNN(**options)
