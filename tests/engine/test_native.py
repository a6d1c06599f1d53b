"""The convolutions in C: the function of the network, whatever the vectors, and doing without."""

import os
import shlex
import shutil
import time
from pathlib import Path

import pytest
import torch

from src.engine.exact_native import exact_library
from src.engine.folded import FoldedConvNN
from src.engine.forms import form_name, voting_form
from src.engine.native import NativeConvNN, float_library
from src.models import ConvNN, SmoothClassifier

# Where there is no compiler, the project does without these convolutions as well.
COMPILER = (shlex.split(os.environ.get("CC", "cc")) or ["none"])[0]
pytestmark = pytest.mark.skipif(shutil.which(COMPILER) is None, reason="there is no compiler")

SHAPES = [
    {"channels": (8, 24)},
    {"channels": (16, 32)},
    {"channels": (32, 48), "hidden": 48},
    {"channels": (8, 8), "hidden": 8},
    {"channels": (16, 16)},
    {"channels": (32, 16), "thresholds": (0.4, 0.6)},
]
# Built for vectors of either length: the compiler makes do with what the processor has.
CASES = [
    (lanes, options)
    for lanes in (8, 16)
    for options in SHAPES
    if not any(width % lanes for width in options["channels"])
]


def trained(seed=0, **options):
    """A network whose normalisation does something."""
    torch.manual_seed(seed)
    network = ConvNN(**options).eval()
    for norm in (network.norm1, network.norm2):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    return network


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def images_of(count):
    return 2 * torch.rand(count, 1, 28, 28, generator=seeded(1)) - 0.5


@pytest.fixture(params=CASES, ids=str)
def case(request):
    """(the form of a network through torch, its form in C)."""
    lanes, options = request.param
    library = float_library(f"-DLANES={lanes}")
    assert library.lanes() == lanes
    form = trained(**options).inference_form("float32")
    return form, NativeConvNN(form, library)


@pytest.mark.parametrize("count", [1, 5, 6, 8, 17])
def test_it_is_the_function_of_the_network(case, count):
    through_torch, form = case
    images = images_of(count)
    with torch.no_grad():
        expected = through_torch(images)
        tolerance = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(form(images), expected, rtol=1e-5, atol=tolerance)


def test_features_of_an_image_do_not_depend_on_its_batch(case):
    # The fully connected layers are torch's matrix products and not looked at here.
    form = case[1].features
    images = images_of(20)
    together = form(images)
    assert together.abs().max() > 0
    for part in (images[:1], images[3:4], images[7:20], images[13:]):
        start = (images == part[0]).flatten(1).all(1).nonzero().item()
        assert torch.equal(form(part), together[start : start + len(part)])
    # Nor on what was there before, nor on the order in memory.
    assert torch.equal(form(images.flip(0).flip(0)), together)
    assert torch.equal(form(images.repeat(1, 1, 1, 2)[..., :28]), together)
    assert torch.equal(form(images.double()), together)
    assert form(images[:0]).shape == (0, together.shape[1])


def test_a_nan_stays_one(case):
    # It must not become a zero on the way and then a vote.
    images = images_of(8)
    images[3, 0, 14, 14] = float("nan")
    with torch.no_grad():
        logits = case[1](images)
    assert logits[3].isnan().all()
    assert not logits[[0, 1, 2, 4, 5, 6, 7]].isnan().any()


def test_votes_are_cast_by_it_and_nearly_those_of_the_folded_network(monkeypatch):
    network = trained()
    assert isinstance(voting_form(network, "float32"), NativeConvNN)
    assert form_name(network, "float32") == "batch normalisation folded, convolutions in C"
    smooth = SmoothClassifier(network, 1.0, precision="float32")
    images = images_of(2).clamp(0, 1)
    with_it = smooth.certify(images, n0=100, n=4000, alpha=0.05)
    monkeypatch.setattr("src.engine.forms.float_library", lambda: None)
    assert not isinstance(voting_form(network, "float32"), NativeConvNN)
    assert form_name(network, "float32") == "batch normalisation folded"
    without_it = smooth.certify(images, n0=100, n=4000, alpha=0.05)
    assert torch.equal(with_it.prediction, without_it.prediction)
    # Rounding decides one vote in some hundred thousand.
    assert (with_it.top_count - without_it.top_count).abs().max() <= 1


def test_widths_that_do_not_fill_the_vectors_are_left_to_torch():
    assert not isinstance(voting_form(trained(channels=(16, 20)), "float32"), NativeConvNN)
    # The hidden layer is torch's product of matrices anyway.
    assert isinstance(voting_form(trained(hidden=20), "float32"), NativeConvNN)


def test_bfloat16_is_left_to_torch(recwarn):
    network, images = trained(), images_of(4)
    form = voting_form(network, "bfloat16")
    assert isinstance(form, FoldedConvNN)
    assert form_name(network, "bfloat16") == "batch normalisation folded"
    # A NaN stays one there as well.
    images[2, 0, 14, 14] = float("nan")
    assert form(images).isnan().all(1).tolist() == [False, False, True, False]
    assert not recwarn.list


def test_images_elsewhere_than_on_the_cpu_are_refused():
    form = voting_form(trained(), "float32")
    with pytest.raises(ValueError, match="on the CPU"):
        form(torch.zeros(2, 1, 28, 28, device="meta"))


LIBRARIES = float_library, exact_library


@pytest.fixture
def fresh():
    """Whatever the test makes of the compiler is forgotten afterwards."""
    for library in LIBRARIES:
        library.cache_clear()
    yield
    for library in LIBRARIES:
        library.cache_clear()


# No such program, one that fails, a shell's half word, and no vectors.
@pytest.mark.parametrize("compiler", ["none-such", "false", '"', f"{COMPILER} -D__attribute__(x)="])
def test_without_a_good_compiler_there_is_no_library(compiler, fresh, monkeypatch):
    for library in LIBRARIES:
        assert library() is not None
        library.cache_clear()
    monkeypatch.setenv("CC", compiler)
    assert [library() for library in LIBRARIES] == [None, None]
    assert not isinstance(voting_form(trained(), "float32"), NativeConvNN)


def test_a_compiler_that_hangs_is_given_up_once_with_its_children(fresh, monkeypatch, tmp_path):
    compiler, started = tmp_path / "cc", tmp_path / "started"
    compiler.write_text(f"#!/bin/sh\nsleep 60 &\necho $! >> '{started}'\nwait\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setattr("src.engine.native.COMPILER_SECONDS", 0.5)
    start = time.monotonic()
    # Silence would cost a long run its speed.
    with pytest.warns(UserWarning, match=r"took more than 0\.5 s.* CC"):
        assert [library() for library in LIBRARIES] == [None, None]
    assert time.monotonic() - start < 5
    (child,) = started.read_text().split()
    # A moment later it has ended, or is a zombie that waits for its new parent.
    time.sleep(0.2)
    state = Path("/proc", child, "stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_workers_do_not_compile_the_noise_each_for_itself(monkeypatch):
    asked, threads = [], torch.get_num_threads()

    def slow(source, *_):
        asked.append(source)
        time.sleep(0.1)

    monkeypatch.setattr("src.engine.exact_native.compiled", slow)
    exact_library.cache_clear()
    try:
        torch.set_num_threads(4)
        smooth = SmoothClassifier(trained(), 0.5, precision="float32")
        smooth.certify(torch.zeros(1, 28, 28), n0=512, n=512)
    finally:
        torch.set_num_threads(threads)
        exact_library.cache_clear()
    assert asked == ["exact.c"]


def test_another_shape_is_refused():
    with pytest.raises(ValueError, match="28"):
        voting_form(trained(), "float32")(torch.zeros(2, 1, 27, 28))
