"""Certificates on disk when runs are killed, restarted, altered or doubled."""

import contextlib
import csv
import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from src.certification import certified_radius, lower_confidence_bound, tight_radius
from src.records.__main__ import main
from src.records.merging import merge
from src.records.recording import is_same_draw, record_certificates
from src.records.rows import COLUMNS, OLDER, check_rows, csv_text, verify
from src.records.twins import indices_digest, read_twin, write_twin

ROOT = Path(__file__).resolve().parents[2]
INDICES = list(range(0, 400, 4))
SETTINGS = {"n0": 100, "n": 1000, "alpha": 0.001, "sigma": 0.5, "seed": 0}


def certify(left, delay=0.0):
    """Rows that depend on the index only, as the real ones do."""
    for index in left:
        time.sleep(delay)
        count = 400 + 6 * (index % 101)
        rival, test = min(60, 1000 - count), ("one-sided", "two-sided")[index % 8 // 4]
        p_lower = float(lower_confidence_bound(count, 1000, 0.001))
        label, prediction = index % 10, index % 10 if p_lower > 0.5 else -1
        facts = {
            "index": index,
            "label": label,
            "prediction": prediction,
            "correct": int(label == prediction),
            "radius": float(certified_radius(p_lower, 0.5)),
            "p_lower": p_lower,
            "top_count": count,
            "rival_count": rival,
            "radius_tight": tight(test, count, rival, 1000, 0.001, 0.5),
            "test": test,
        }
        yield facts | SETTINGS


def tight(test, top, rival, n, alpha, sigma):
    """The tight radius of a row: 0 where CERTIFY abstains."""
    stands = lower_confidence_bound(top, n, alpha) > 0.5
    return float(tight_radius(test, top, rival, n, alpha, sigma)) if stands else 0.0


def record(path, **options):
    return record_certificates(path, INDICES, certify, SETTINGS, {"command": "test"}, **options)


@pytest.fixture
def finished(tmp_path):
    record(tmp_path / "rows.csv")
    return tmp_path / "rows.csv"


def started(path, *options):
    """A process that records slowly: it can be killed half-way."""
    code = (
        "import functools, signal; from tests.records.test_recording import *;"
        # A shell that runs tests in the background has its children ignore SIGINT.
        "signal.signal(signal.SIGINT, signal.default_int_handler);"
        "certify = functools.partial(certify, delay=0.01);"
        f"record_certificates({str(path)!r}, INDICES, certify, SETTINGS, {{'command': 'test'}},"
        f" resume={'--resume' in options})"
    )
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_runs_end_in_the_same_bytes(kill, finished, tmp_path):
    path = tmp_path / "killed.csv"
    rng = random.Random(kill)
    process = started(path)
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(rng.uniform(0.05, 0.6))
    process.send_signal(kill)
    assert process.wait(30) != 0
    lines = path.read_text().count("\n") - 1
    assert 0 <= lines < len(INDICES)
    record(path, resume=True)
    assert path.read_bytes() == finished.read_bytes()
    assert verify(path) == []


@pytest.mark.parametrize("cut", [1, 7, 60, 200])
def test_torn_end_is_dropped(cut, finished):
    whole = finished.read_bytes()
    finished.write_bytes(whole[:-cut])
    record(finished, resume=True)
    assert finished.read_bytes() == whole


def test_the_twin_names_every_run_that_made_rows(finished):
    whole = finished.read_bytes()
    assert "resumed" not in read_twin(finished.with_suffix(".json"))
    for again in ("second", "third"):
        finished.write_bytes(whole[:-60])
        facts = {"command": again}
        record_certificates(finished, INDICES, certify, SETTINGS, facts, resume=True)
    # Nothing was left to do: no rows are of this one.
    record_certificates(finished, INDICES, certify, SETTINGS, {"command": "idle"}, resume=True)
    twin = read_twin(finished.with_suffix(".json"))
    assert twin["facts"] == {"command": "test"}
    assert twin["resumed"] == [{"command": "second"}, {"command": "third"}]
    assert verify(finished) == []


@pytest.mark.parametrize("rest", ["", "index,lab"])
def test_run_that_died_in_its_header_is_resumed(rest, finished):
    whole = finished.read_bytes()
    finished.write_text(rest)
    record(finished, resume=True)
    assert finished.read_bytes() == whole


def test_bad_arguments_are_refused_before_earlier_rows_are_touched(finished):
    def refuse(left):
        raise ValueError("'n' = 9")

    before = sorted((p.name, p.read_bytes()) for p in finished.parent.iterdir())
    with pytest.raises(ValueError, match="'n' = 9"):
        record_certificates(finished, INDICES, refuse, SETTINGS, {})
    left = [p for p in finished.parent.iterdir() if not p.name.endswith(".lock")]
    assert sorted((p.name, p.read_bytes()) for p in left) == before


def test_torn_middle_stops(finished):
    lines = finished.read_text().splitlines(keepends=True)
    lines[40] = lines[40][: len(lines[40]) // 2] + "\n"
    damaged = "".join(lines)
    finished.write_text(damaged)
    with pytest.raises(ValueError, match=r"damaged .*: line 41"):
        record(finished, resume=True)
    assert finished.read_text() == damaged


@pytest.mark.parametrize("key", ["sigma", "n", "alpha", "seed"])
def test_resuming_another_run_is_refused_and_named(key, finished):
    before = finished.read_bytes()
    other = SETTINGS | {key: 7}
    with pytest.raises(ValueError, match=f"{key} was .*, is 7"):
        record_certificates(finished, INDICES, certify, other, {}, resume=True)
    with pytest.raises(ValueError, match="indices was"):
        record_certificates(finished, INDICES[1:], certify, SETTINGS, {}, resume=True)
    assert finished.read_bytes() == before


def test_resuming_a_finished_run_certifies_nothing_again(finished):
    before = finished.read_bytes()
    record_certificates(finished, INDICES, lambda left: 1 / 0, SETTINGS, {}, resume=True)
    assert finished.read_bytes() == before


def test_new_run_keeps_other_rows_and_drops_equal_ones(finished, capsys):
    before = finished.read_bytes()
    record(finished)
    assert sorted(p.name for p in finished.parent.iterdir()) == ["rows.csv", "rows.json"]
    finished.write_bytes(before[:-300])
    record(finished)
    kept = finished.with_name("rows.previous-1.csv")
    assert kept.read_bytes() == before[:-300]
    assert str(kept) in capsys.readouterr().out
    assert finished.read_bytes() == before


def test_two_processes_cannot_write_one_file(tmp_path):
    path = tmp_path / "rows.csv"
    process = started(path)
    try:
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(OSError, match="Another process is writing"):
            record(path)
    finally:
        process.kill()
        process.wait(30)


def test_full_disk_leaves_rows_that_can_be_resumed(finished, tmp_path):
    # A limit on the size of files stands in for a full disk.
    path = tmp_path / "full.csv"
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000));"
        "from tests.records.test_recording import *; from pathlib import Path;"
        f"record(Path({str(path)!r}))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode != 0
    assert "File too large" in ended.stderr
    assert 0 < path.stat().st_size <= 3000
    record(path, resume=True)
    assert path.read_bytes() == finished.read_bytes()


def test_every_changed_character_is_found(finished):
    # 140 positions at random in both files; a digit becomes another, anything else a digit.
    rng = random.Random(0)
    for path in (finished, finished.with_suffix(".json")):
        whole = path.read_text()
        ends = [k for k, character in enumerate(whole) if character == "\n"]
        for position in rng.sample(range(len(whole)), 70) + ends[:10]:
            other = "7" if whole[position] != "7" else "3"
            other = "\r" if whole[position] == "\n" else other
            path.write_bytes((whole[:position] + other + whole[position + 1 :]).encode())
            try:
                found = verify(finished)
            except ValueError as error:
                found = [str(error)]
            assert found, f"{path.name}, character {position}: {whole[position]} -> {other}"
        path.write_bytes(whole.replace("\n", "\r\n").encode())
        with contextlib.suppress(ValueError):
            assert verify(finished), f"{path.name} with other line ends"
        path.write_text(whole)
    assert verify(finished) == []


def altered(path, line, **changes):
    """The problems of the rows alone, after a change of one of them."""
    rows = list(csv.DictReader(path.read_text().splitlines()))
    rows[line - 2] |= changes
    return check_rows(rows, csv_text([COLUMNS, *(row.values() for row in rows)]))


def test_an_altered_test_radius_or_count_of_the_rival_contradicts_the_row(finished):
    # Line 53, image 204, has 412 votes and abstains; line 72, image 280, has 868 for the class.
    row = dict(zip(COLUMNS, finished.read_text().splitlines()[71].split(","), strict=True))
    assert (row["top_count"], row["rival_count"], row["test"]) == ("868", "60", "one-sided")
    assert altered(finished, 72) == []
    wrong = [{"test": "two-sided"}, {"test": ""}, {"radius_tight": "0.6"}, {"rival_count": "133"}]
    for changes in [*wrong, {"radius_tight": "nan"}, {"rival_count": "-1"}, {"test": "one"}]:
        assert altered(finished, 72, **changes) == ["line 72 contradicts itself"], changes
    two = dict(zip(COLUMNS, finished.read_text().splitlines()[72].split(","), strict=True))
    assert (two["top_count"], two["rival_count"], two["test"]) == ("892", "60", "two-sided")
    for changes in [{"test": "one-sided"}, {"rival_count": "61"}, {"radius_tight": two["radius"]}]:
        assert altered(finished, 73, **changes) == ["line 73 contradicts itself"], changes
    # Where CERTIFY abstains, no radius of the other test may stand.
    assert altered(finished, 53, radius_tight="0.01") == ["line 53 contradicts itself"]


@pytest.mark.parametrize(("change", "sound"), [(1e-14, True), (1e-9, False)])
def test_bounds_may_differ_in_the_last_digits_only(change, sound, finished):
    # Releases of scipy differ by some units in the last place: 1.13 refused the rows of 1.17.
    lines = finished.read_text().splitlines(keepends=True)
    cells = lines[51].split(",")
    cells[5] = repr(float(cells[5]) * (1 + change))
    text = "".join([*lines[:51], ",".join(cells), *lines[52:]])
    problems = check_rows(list(csv.DictReader(text.splitlines())), text)
    assert problems == ([] if sound else ["line 52 contradicts itself"])


def test_unfinished_run_does_not_verify(finished):
    twin = finished.with_suffix(".json")
    assert json.loads(twin.read_text())["finished"] is True
    lines = finished.read_text().splitlines(keepends=True)
    finished.write_text("".join(lines[:-1]))
    assert verify(finished) == ["the rows do not match the digest in the twin"]


def test_merged_shards_are_what_one_process_writes(finished, tmp_path):
    shards = [tmp_path / f"rows.shard-{k}-of-3.csv" for k in (1, 2, 3)]
    for k, shard in enumerate(shards):
        settings = SETTINGS | {"shard": f"{k + 1}/3"}
        record_certificates(shard, INDICES[k::3], certify, settings, {"command": k})
    cut = shards[1].read_bytes()[:-60]
    shards[1].write_bytes(cut)
    again = {"command": "again"}
    settings = SETTINGS | {"shard": "2/3"}
    record_certificates(shards[1], INDICES[1::3], certify, settings, again, resume=True)
    merged = tmp_path / "merged.csv"
    assert merge(merged, shards[::-1]) == len(INDICES)
    assert merged.read_bytes() == finished.read_bytes()
    made = read_twin(merged.with_suffix(".json"))["facts"]
    assert [facts["command"] for facts in made] == [2, 1, "again", 0]
    # The script goes on from a merged file as from its own finished one.
    record_certificates(merged, INDICES, lambda left: 1 / 0, SETTINGS, {}, resume=True)
    with pytest.raises(ValueError, match="is in two of them"):
        merge(merged, [*shards, shards[0]])
    for given, problem in ((shards[:2], "3/3 is missing"), ([finished], "which part")):
        with pytest.raises(ValueError, match=problem):
            merge(merged, given)
    settings = SETTINGS | {"shard": "2/3", "precision": "x"}
    record_certificates(shards[1], INDICES[1::3], certify, settings, {})
    with pytest.raises(ValueError, match="another run"):
        merge(merged, shards)
    assert merged.read_bytes() == finished.read_bytes()


def interrupted(path, rows=40, **options):
    """A run that was stopped after so many rows."""

    def stop(left):
        yield from certify(left[:rows])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record_certificates(path, INDICES, stop, SETTINGS, {"command": "test"}, **options)


def consistent(row, **changes):
    """Another row whose bound, radius, prediction and correctness follow from its count."""
    row = row | changes
    bound = float(lower_confidence_bound(int(row["top_count"]), int(row["n"]), float(row["alpha"])))
    row |= {"p_lower": bound, "radius": float(certified_radius(bound, float(row["sigma"])))}
    counts = (int(row[key]) for key in ("top_count", "rival_count", "n"))
    row["radius_tight"] = tight(row["test"], *counts, float(row["alpha"]), float(row["sigma"]))
    row["prediction"] = row["prediction"] if bound > 0.5 else -1
    return row | {"correct": int(str(row["prediction"]) == str(row["label"]))}


# Of each column: index, label, prediction, counts, and what the settings repeat.
ALTERED = [
    {"top_count": 777},
    {"top_count": 100},
    {"rival_count": 59},
    {"test": "two-sided"},
    {"label": 9, "prediction": 9},
    {"prediction": 9},
]
ALTERED += [{"index": 1}, {"n": 2000}, {"n0": 7}, {"alpha": 0.01}, {"sigma": 1.0}, {"seed": 1}]


@pytest.mark.parametrize("changes", ALTERED, ids=str)
@pytest.mark.parametrize("state", ["finished", "interrupted", "cut"])
def test_an_altered_row_is_never_signed_anew(changes, state, finished, tmp_path):
    path = tmp_path / "altered.csv"
    if state == "interrupted":
        interrupted(path)
    else:
        record(path)
    lines = path.read_text().splitlines(keepends=True)
    lines = lines[:61] if state == "cut" else lines
    row = consistent(dict(zip(COLUMNS, lines[21].strip().split(","), strict=True)), **changes)
    lines[21] = ",".join(str(row[column]) for column in COLUMNS) + "\n"
    path.write_text("".join(lines))
    twin = path.with_suffix(".json").read_bytes()
    with pytest.raises(ValueError, match=r"altered|damaged|drawn again"):
        record(path, resume=True)
    signed = read_twin(path.with_suffix(".json"))
    assert signed.get("rows_sha256") == json.loads(twin).get("rows_sha256")
    assert verify(path) != []


def test_labels_on_disk_are_compared_with_the_data(tmp_path):
    path, labels = tmp_path / "rows.csv", [index % 10 for index in INDICES]
    interrupted(path, labels=labels)
    labels[7] += 1
    with pytest.raises(ValueError, match="line 9: the data set has another label"):
        record(path, labels=labels, resume=True)


def test_rows_that_were_not_signed_yet_are_drawn_again(finished, tmp_path):
    # A kill between a row and its signature; what stands there then may be anything.
    path = tmp_path / "rows.csv"
    interrupted(path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[-1].replace(",", ",7", 1)]))
    record(path, resume=True)
    assert path.read_bytes() == finished.read_bytes()


@pytest.mark.parametrize("given", ["another", "fewer", "more", "again"])
def test_rows_of_other_images_are_refused(given, tmp_path):
    def wrong(left):
        rows = list(certify(left))
        other = {"another": rows[:5] + rows[6:], "fewer": rows[:-1], "again": rows[:1] * len(left)}
        yield from other.get(given, [*rows, rows[-1]])

    path = tmp_path / "rows.csv"
    with pytest.raises(ValueError, match="'certify' gave"):
        record_certificates(path, INDICES, wrong, SETTINGS, {})
    assert not read_twin(path.with_suffix(".json"))["finished"]


def test_verify_knows_the_images_that_were_asked_for(finished):
    twin = finished.with_suffix(".json")
    content = read_twin(twin)
    content["settings"]["indices"] = indices_digest(range(100))
    write_twin(twin, content)
    assert verify(finished) == ["the rows are not those of the images that were asked for"]


def test_the_number_of_classes_is_in_the_twin(tmp_path):
    def many(left):
        return (row | {"label": 57, "correct": 0} for row in certify(left))

    path = tmp_path / "rows.csv"
    record_certificates(path, INDICES, many, SETTINGS | {"num_classes": 100}, {})
    assert verify(path) == []
    record_certificates(path, INDICES, many, SETTINGS, {})
    assert "line 2 contradicts itself" in verify(path)


def test_a_twin_moved_without_its_rows_is_not_overwritten(finished):
    # The kill came between moving the twin and moving the rows.
    before = finished.read_bytes()
    twin = finished.with_suffix(".json")
    kept = finished.with_name("rows.previous-1.json")
    content = twin.read_bytes()
    twin.replace(kept)
    finished.write_bytes(before[:-300])
    record(finished)
    assert kept.read_bytes() == content
    assert finished.with_name("rows.previous-1.csv").read_bytes() == before[:-300]


def test_rows_survive_a_checkout_with_other_line_ends():
    rows = sorted((ROOT / "reference" / "results").rglob("*.csv"))
    names = [str(path.relative_to(ROOT)) for path in rows]
    command = ["git", "-C", str(ROOT), "check-attr", "text", "--", *names]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told.count("text: unset") == len(names) > 20


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("rows.csv", None, "There is no file .*rows.csv"),
        ("rows.json", None, "There is no file .*rows.json"),
        ("rows.json", b"[" * 200_000, "not the twin"),
        ("rows.json", b"{}", "not the twin"),
        (
            "rows.json",
            b'{"sha256": "", "settings": 3, "facts": {}, "finished": true}',
            "not the twin",
        ),
        ("rows.csv", b"\xff\xfe", "not text"),
        ("rows.csv", b'index,"' + b"x" * 200_000 + b"\n", "not a table"),
        ("rows.csv", "\ufeffindex,label\n1,2\n".encode(), "contradicts itself"),
        ("rows.csv", b"", "expected columns"),
    ],
)
@pytest.mark.parametrize("what", ["verify", "resume"])
def test_damaged_files_are_one_sentence(name, content, sentence, what, finished, capsys):
    path = finished.with_name(name)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    if what == "verify":
        with pytest.raises(SystemExit) as ended:
            main(["verify", str(finished)])
        assert re.search(sentence, ended.value.code)
    elif content:
        with pytest.raises(ValueError, match=str(finished.with_suffix(""))):
            record(finished, resume=True)


def test_merging_never_writes_over_what_it_reads(finished, tmp_path):
    before = {p.name: p.read_bytes() for p in finished.parent.iterdir()}
    for target in (finished.with_suffix(".json"), finished, finished.with_name("rows")):
        with pytest.raises(ValueError, match=r"must end in \.csv|is one of the shards"):
            merge(target, [finished])
    assert {p.name: p.read_bytes() for p in finished.parent.iterdir()} == before
    with pytest.raises(ValueError, match=r"must end in \.csv"):
        record(tmp_path / "new.json")
    assert not (tmp_path / "new.json").exists()


def test_columns_are_the_contract():
    assert ",".join(COLUMNS) == (
        "index,label,prediction,correct,radius,p_lower,top_count,"
        "rival_count,radius_tight,test,n0,n,alpha,sigma,seed"
    )


def test_a_kill_before_the_last_signature_is_made_good(tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"

    def die(twin, content, **options):
        if content["finished"]:
            raise KeyboardInterrupt
        write_twin(twin, content, **options)

    monkeypatch.setattr("src.records.recording.write_twin", die)
    with pytest.raises(KeyboardInterrupt):
        record(path)
    monkeypatch.undo()
    assert verify(path) == ["the run is not finished"]
    record(path, resume=True)
    assert verify(path) == []


def test_facts_with_any_keys_are_recorded(tmp_path):
    facts = {"classes": {2: 1, 10: 2}}
    record_certificates(tmp_path / "rows.csv", INDICES, certify, SETTINGS, facts)
    assert verify(tmp_path / "rows.csv") == []


def test_equal_rows_of_another_model_are_kept(tmp_path):
    path = tmp_path / "rows[1].csv"
    for model in "ABB":
        settings = SETTINGS | {"model_digest": model}
        record_certificates(path, INDICES, certify, settings, {})
    kept = [p.name for p in sorted(tmp_path.iterdir()) if "previous" in p.name]
    assert kept == ["rows[1].previous-1.csv", "rows[1].previous-1.json"]
    assert read_twin(tmp_path / kept[1])["settings"]["model_digest"] == "A"


@pytest.mark.parametrize(
    "change", [{"rows": "x"}, {"rows": None}, {"resumed": 5}, {"settings": {"shard": 5}}], ids=str
)
def test_twins_with_entries_of_another_kind_are_refused(change, finished):
    twin = finished.with_suffix(".json")
    write_twin(twin, read_twin(twin) | change)
    for call in (verify, lambda path: record(path, resume=True)):
        with pytest.raises(ValueError, match="not the twin of a file of certificates"):
            call(finished)


def test_shards_of_other_images_are_not_merged(tmp_path):
    shards = [tmp_path / f"rows.shard-{k}-of-2.csv" for k in (1, 2)]
    for k, (shard, step) in enumerate(zip(shards, (4, 8), strict=True)):
        every = list(range(0, 400, step))
        settings = SETTINGS | {"shard": f"{k + 1}/2", "all_indices": indices_digest(every)}
        record_certificates(shard, every[k::2], certify, settings, {})
    with pytest.raises(ValueError, match="another run"):
        merge(tmp_path / "merged.csv", shards)
    assert not (tmp_path / "merged.csv").exists()


def test_rows_of_an_older_release_are_not_resumed(finished):
    rows = list(csv.DictReader(finished.read_text().splitlines()))
    older = csv_text([OLDER[0], *([row[column] for column in OLDER[0]] for row in rows)])
    finished.write_text(older)
    with pytest.raises(
        ValueError, match=r"older release and cannot be resumed; leave out --resume"
    ):
        record(finished, resume=True)
    assert finished.read_text() == older


def test_a_row_drawn_again_may_differ_in_the_last_digits_of_its_bounds_only(finished):
    row, *_ = csv.DictReader(finished.read_text().splitlines()[20:], COLUMNS)
    for column in ("radius", "p_lower", "radius_tight"):
        assert is_same_draw(row, row | {column: float(row[column]) * (1 + 1e-14)})
        assert not is_same_draw(row, row | {column: float(row[column]) * (1 + 1e-9)})
    for column in set(COLUMNS) - {"radius", "p_lower", "radius_tight"}:
        assert not is_same_draw(row, row | {column: "7"}), column
