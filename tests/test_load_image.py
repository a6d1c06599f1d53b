"""One's own digit: files of any kind, any polarity and size, photographs, and what is no digit."""

import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from src.checkpoints import load_checkpoint
from src.mnist.digits import read_digit
from src.utils import load_image, load_mnist
from tests.helpers import ROOT


@pytest.fixture(scope="module")
def digits(mnist_root):
    """10 test images, uint8 (28, 28), and their labels."""
    images, labels = (tensor[:1000:100] for tensor in load_mnist("test", mnist_root).tensors)
    return (images[:, 0] * 255).round().byte().numpy(), labels


@pytest.fixture(scope="module")
def digit(digits):
    return digits[0][0]


def loaded(path):
    """The image as the networks want it, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = load_image(path)
    assert image.shape == (1, 28, 28)
    assert image.dtype == torch.float32
    # Exactly the float32 that MNIST's bytes have.
    whole = np.rint(image.numpy() * 255).astype(np.uint8)
    assert np.array_equal(image.numpy(), np.divide(whole, 255, dtype=np.float32))
    return whole[0], [str(warning.message) for warning in caught]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P"])
@pytest.mark.parametrize("ending", ["png", "bmp", "gif", "tiff"])
def test_images_in_the_form_of_mnist_come_back_bit_for_bit(digits, tmp_path, mode, ending):
    # BMP has no grey with transparency; for GIF Pillow makes a palette of its own choice.
    mode = {"bmp LA": "L", "gif RGBA": "LA"}.get(f"{ending} {mode}", mode)
    for digit in digits[0]:
        Image.fromarray(digit).convert(mode).save(tmp_path / f"x.{ending}")
        pixels, told = loaded(tmp_path / f"x.{ending}")
        assert np.array_equal(pixels, digit)
        assert told == []


def saved(kind, digit, path):
    """The digit in an image file of another kind, in which each pixel can be told."""
    if kind == "16 bits":
        Image.fromarray(digit.astype(np.uint16) * 257).save(path)
    elif kind == "floats":
        Image.fromarray((digit / 255).astype(np.float32)).save(path.with_suffix(".tiff"))
        path.with_suffix(".tiff").rename(path)
    elif kind == "dark on light":
        Image.fromarray(255 - digit).save(path)
    else:
        ink = 0 if kind == "black ink on nothing" else 255
        plane = Image.new("L", digit.shape, ink)
        Image.merge("LA", [plane, Image.fromarray(digit)]).save(path)


@pytest.mark.parametrize(
    ("kind", "inverted"),
    [
        ("16 bits", False),
        ("floats", False),
        ("white ink on nothing", False),
        ("black ink on nothing", True),
        ("dark on light", True),
    ],
)
def test_depth_polarity_and_transparency_change_no_pixel(digit, tmp_path, kind, inverted):
    saved(kind, digit, tmp_path / "x.png")
    pixels, told = loaded(tmp_path / "x.png")
    assert np.array_equal(pixels, digit)
    assert ["inverted" in sentence for sentence in told] == [True] * inverted


def large(digit, size=280):
    return Image.fromarray(digit).resize((size, size), Image.Resampling.BICUBIC)


def photograph(digit, chalk, seed):
    """A digit somewhere on paper or a blackboard, the light from one side, with noise."""
    random = np.random.default_rng(seed)
    ink, (y, x) = np.zeros((320, 420)), random.integers(0, (120, 220))
    ink[y : y + 200, x : x + 200] = np.asarray(large(digit, 200)) / 255
    rows, columns = np.meshgrid(np.linspace(-1, 1, 320), np.linspace(-1, 1, 420), indexing="ij")
    angle = random.uniform(0, 2 * np.pi)
    light = 0.75 - 0.17 * (np.cos(angle) * rows + np.sin(angle) * columns) - 0.1 * rows**2
    grey = light * (40 + 170 * ink if chalk else 225 - 165 * ink) + random.normal(0, 6, ink.shape)
    grey = grey.clip(0, 255)
    return Image.fromarray(np.stack([grey, 0.93 * grey, 0.8 * grey], -1).astype(np.uint8))


PICTURES = {
    "light on dark": lambda digit, _: large(digit),
    "dark on light": lambda digit, _: large(255 - digit),
    "smaller": lambda digit, _: large(digit, 20),
    "off centre": lambda digit, _: Image.fromarray(
        np.pad(255 - np.asarray(large(digit)), ((10, 200), (300, 30)), constant_values=255)
    ),
    "up to the edge": lambda digit, _: large(digit).crop(
        large(digit).point(lambda v: 255 * (v > 20)).getbbox()
    ),
    "blue on grey": lambda digit, _: Image.composite(
        Image.new("RGB", (280, 280), (30, 60, 180)),
        Image.new("RGB", (280, 280), (190, 190, 180)),
        large(digit),
    ),
    "photograph of paper": lambda digit, seed: photograph(digit, False, seed),
    "photograph of chalk": lambda digit, seed: photograph(digit, True, seed),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures_of_digits_are_brought_into_the_form_of_mnist(digits, tmp_path, kind):
    found = []
    for seed, digit in enumerate(digits[0]):
        PICTURES[kind](digit, seed).save(tmp_path / "x.png")
        pixels, told = loaded(tmp_path / "x.png")
        assert any("cropped" in sentence for sentence in told)
        dark = kind in ("dark on light", "off centre", "blue on grey", "photograph of paper")
        assert any("inverted" in sentence for sentence in told) == dark
        found.append(torch.from_numpy(pixels[None] / np.float32(255)))
        rows, columns = np.nonzero(pixels)
        assert max(np.ptp(rows), np.ptp(columns)) in (18, 19)
        masses = [pixels.sum(axis=axis) / pixels.sum() @ np.arange(28) for axis in (1, 0)]
        assert np.abs(np.array(masses) - 14).max() <= 0.51
    network = load_checkpoint(ROOT / "reference" / "models" / "standard.pt")
    assert (network(torch.stack(found)).argmax(dim=1) == digits[1]).sum() >= 9
    assert (torch.stack(found)[:, 0] - torch.tensor(digits[0]) / 255).abs().mean() < 0.06


def test_a_picture_lies_as_its_exif_data_say(digit, tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    large(digit).rotate(90).save(tmp_path / "x.jpg", exif=exif, quality=95)
    large(digit).save(tmp_path / "y.jpg", quality=95)
    turned, upright = (loaded(tmp_path / name)[0] for name in ("x.jpg", "y.jpg"))
    assert np.abs(turned.astype(int) - upright).mean() < 4


def test_thin_strokes_are_thickened(tmp_path):
    page = Image.new("L", (800, 800), 255)
    ImageDraw.Draw(page).line([(250, 200), (550, 200), (350, 650)], fill=0, width=4)
    page.save(tmp_path / "seven.png")
    pixels, told = loaded(tmp_path / "seven.png")
    assert any("thickened" in sentence for sentence in told)
    network = load_checkpoint(ROOT / "reference" / "models" / "standard.pt")
    assert int(network(torch.tensor(pixels / np.float32(255))[None, None]).argmax()) == 7


def drawn(shape):
    image = Image.new("L", (300, 300), 255)
    draw = ImageDraw.Draw(image)
    if shape == "disc":
        draw.ellipse((50, 50, 250, 250), fill=0)
    elif shape == "dash":
        draw.line((50, 150, 250, 150), fill=0, width=20)
    elif shape == "two bars":
        for x in (100, 200):
            draw.line((x, 50, x, 250), fill=0, width=25)
    elif shape == "noise":
        pixels = np.random.default_rng(0).integers(0, 256, (300, 300), dtype=np.uint8)
        image = Image.fromarray(pixels)
    elif shape == "slope":
        image = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (200, 1)))
    else:
        small = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((400, 300), Image.Resampling.BICUBIC)
    return image


@pytest.mark.parametrize("shape", ["disc", "dash", "two bars", "noise", "slope", "landscape"])
def test_what_is_no_digit_is_said_to_be_none(tmp_path, shape):
    drawn(shape).save(tmp_path / "x.png")
    assert any("does not look like a digit" in told for told in loaded(tmp_path / "x.png")[1])


def bomb(width, height):
    """A PNG of a few bytes that says it has so many pixels."""

    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = {b"IHDR": header, b"IDAT": zlib.compress(bytes(1000)), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts.items())


def png(path, *arguments):
    Image.new(*arguments).save(path)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda _: b"not an image", "not an image that can be read"),
        (lambda _: b"", "not an image that can be read"),
        (lambda path: png(path, "L", (90, 90))[:-40], "not an image that can be read"),
        (lambda path: png(path, "L", (28, 28), 0), "is blank"),
        (lambda path: png(path, "RGB", (300, 200), "white"), "is blank"),
        (lambda path: png(path, "RGBA", (30, 20)), "is blank"),
        (lambda path: png(path, "L", (2, 300)), "too small"),
        (lambda _: bomb(9000, 9000), "too large"),
        (lambda _: bomb(2**30, 2**30), "too large"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(tmp_path, content, words):
    path = tmp_path / "x.png"
    path.write_bytes(content(path))
    with pytest.raises(ValueError, match=words) as refused:
        load_image(path)
    assert str(refused.value).startswith(f"{path} ")
    assert "\n" not in str(refused.value)
    with pytest.raises(FileNotFoundError, match="no image"):
        load_image(tmp_path / "absent.png")
    with pytest.raises(ValueError, match="not an image"):
        load_image(tmp_path)


def test_images_of_mnist_are_hardly_ever_doubted(mnist_root, tmp_path):
    # 14 of the 10,000 test images are; none of these, which are fixed.
    for image in load_mnist("test", mnist_root).tensors[0][:1000:10]:
        Image.fromarray((image[0] * 255).round().byte().numpy()).save(tmp_path / "x.png")
        assert read_digit(tmp_path / "x.png").notes == []
