"""The referee: AutoAttack (standard) by somebody else, then an attack of ours, per image the worst.

AutoAttack (Croce and Hein, ICML 2020) comes from torchattacks 3.5.1, the version of it on the
package index (its authors publish theirs as a repository). An extra, for this script, cures.py and
strongest.py:

    pip install --no-deps torchattacks==3.5.1

(--no-deps because it asks for an old requests, which it never imports.) Its class AutoAttack takes
10 steps where the paper's standard version takes 100, so the four attacks are called one by one
with the paper's numbers: APGD on the cross-entropy, 100 steps; targeted APGD, 9 targets x 100
steps; targeted FAB, 9 targets x 100 steps; Square, 5,000 queries. Each meets only the images that
are still standing, and its points are moved into the ball as stored before they are judged.

A network with thresholds hides from all four what a ball reaches behind them; so our
`thresholds_attack` comes last (margin from 5 starts, 9 targets), and for another network plain PGD
from many starts (100 steps up the margin from 10). The rows have the columns index, label, clean,
one for every attack (1: still classified correctly after it and all before), and robust. They grow
by a batch at a time; the same command takes up a run that was stopped, and more --images extend it,
also on another device or in other batches, which the twin notes. The images come in the order 0,
20, 40, ..., then 1, 21, ...: any first part of it is spread over the test set, whose first half is
harder than its second. `--strongest` adds a column of our own `strongest_attack`, from the clean
images.

Measured on networks of two epochs, first images of the test set: linf 0.3 without thresholds, 500
images, AutoAttack leaves 62.8 %, ours 62.4 %; l2 2.0 with thresholds, 200 images, AutoAttack leaves
51.0 %, ours 3.5 %; l2 2.0 without one, 200 images on which nothing was chosen, AutoAttack leaves
50.0 %, ours 49.0 %. In the first two ours had one start per target, not yet two. The four
attacks take 0.3 s of one core for an image that stands, all of it 1.1 s with 32-64 channels. On an
H100 that two or three of these runs shared, 5,000 images at once took 94 to 168 s in linf, 265 s in
l2, and 12 GB.

Run: python -m benchmarks.autoattack models/adversarial_training.pt --norm linf --epsilon 0.3 \\
         --rows results/autoattack.csv
"""

import argparse
import csv
import importlib
import io
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch

from src.attacks import pgd_attack
from src.balls import projection
from src.certification.intervals import accuracy_interval
from src.checkpoints import load_checkpoint, weights_digest
from src.command_line import count, number, run
from src.engine.untouched import evaluation_form
from src.files import lock_file, write_json
from src.provenance import code_commit
from src.records.rows import read_rows
from src.reports.tables import format_table, percent
from src.robustness.strongest import strongest_attack
from src.robustness.thresholds import thresholds_attack
from src.training_and_evaluation import correct
from src.utils import get_device, load_mnist, subset

VERSION = "3.5.1"
# Any first part of it is spread over the test set.
ORDER = sorted(range(10_000), key=lambda index: index % 20)
AUTOATTACK = ("apgd_ce", "apgd_t", "fab_t", "square")
ATTACKS = (*AUTOATTACK, "ours")


def main(argv=None):
    args = options(argv)
    model = load_checkpoint(args.checkpoint, get_device(args.device))
    test = load_mnist("test", args.data)
    order = [index for index in ORDER if index < len(test)][: args.images]
    columns = ["index", "label", "clean", *ATTACKS, "robust"]
    columns += ["strongest"] if args.strongest else []
    settings = {
        "digest": weights_digest(model.state_dict()),
        "columns": columns,
        "torchattacks": VERSION,
        "order": "0, 20, 40, ..., 1, 21, ...",
        **{name: getattr(args, name) for name in ("norm", "epsilon", "seed")},
    }
    Path(args.rows).parent.mkdir(parents=True, exist_ok=True)
    with lock_file(args.rows):
        done = finished(Path(args.rows), columns, settings)
        if done < len(order):
            log_run(Path(args.rows), done, args, sys.argv[1:] if argv is None else argv)
        for start in range(done, len(order), args.batch_size):
            indices = order[start : start + args.batch_size]
            batch = subset(test, indices)
            begin = time.perf_counter()
            hits = attacked(model, batch, args)
            append(Path(args.rows), indices, batch, hits)
            print(
                f"{start + len(batch):6d} images, {int(hits['robust'].sum())} of the last "
                f"{len(batch)} stand, {time.perf_counter() - begin:.0f} s",
                flush=True,
            )
        print(summary(read_rows(args.rows)[: len(order)]))


def options(argv):
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="the model, .pt")
    parser.add_argument("--norm", choices=("linf", "l2"), default="linf")
    parser.add_argument("--epsilon", type=number(), default=0.3, help="radius, pixel units")
    parser.add_argument("--images", type=count(), default=10_000, help="how many, in that order")
    parser.add_argument("--seed", type=count(0), default=0, help="of every attack")
    parser.add_argument("--batch-size", type=count(), default=250, help="images a batch")
    parser.add_argument("--rows", required=True, help="the file of rows, .csv")
    parser.add_argument("--strongest", action="store_true", help="our strongest_attack as well")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto")
    parser.add_argument("--data", help="folder of MNIST; default: data/ of the repository")
    args = parser.parse_args(argv)
    args.images = min(args.images, 10_000)
    return args


def attacked(model, batch, args, attacks=ATTACKS):
    """Name of the column -> whether each image of the batch still stands, bool (N,).

    Of `args` it reads norm, epsilon, seed, batch_size and strongest.
    """
    hits = {"clean": correct(model, batch)}
    standing = hits["clean"].clone()
    for name in attacks:
        chosen = standing.nonzero()[:, 0]
        if len(chosen):
            attack = partial(one_attack, name, args=args)
            # All at once: a GPU takes many images hardly slower than few.
            standing[chosen] = correct(
                model, subset(batch, chosen), attack=attack, batch_size=args.batch_size
            )
        hits[name] = standing.clone()
    hits["robust"] = standing.clone()
    if args.strongest:
        ours = partial(strongest_attack, epsilon=args.epsilon, norm=args.norm, thorough=True)
        hits["strongest"] = correct(model, batch, attack=partial(ours, generator=seeded(args)))
    return hits


def seeded(args):
    return torch.Generator().manual_seed(args.seed)


def one_attack(name, model, images, labels, *, args):
    """The points of one attack, in the ball as stored."""
    if name in AUTOATTACK:
        with evaluation_form(model) as network:
            points = published(name, network, args)(images, labels)
    else:
        points = images.clone()
        for attack in our_attacks(model):
            found = attack(model, images, labels, args.epsilon, args.norm, generator=seeded(args))
            broken = ~correct(model, torch.utils.data.TensorDataset(found, labels))
            points[broken] = found[broken]
    return projection(images, args.epsilon, args.norm, (0.0, 1.0))(points.detach())


def our_attacks(model):
    """What follows AutoAttack, see above."""
    if getattr(model, "thresholds", None) is None:
        return [partial(pgd_attack, loss="margin", steps=100, restarts=10, early_stop=True)]
    return [partial(thresholds_attack, restarts=5), partial(thresholds_attack, targets=9)]


def published(name, network, args):
    """One of the four attacks with the numbers of the paper's standard version."""
    package = torchattacks()
    common = {
        "norm": {"linf": "Linf", "l2": "L2"}[args.norm],
        "eps": args.epsilon,
        "seed": args.seed,
        "n_restarts": 1,
    }
    if name == "apgd_ce":
        return package.APGD(network, steps=100, loss="ce", **common)
    if name == "apgd_t":
        return package.APGDT(network, steps=100, n_classes=10, **common)
    if name == "fab_t":
        return package.FAB(network, steps=100, multi_targeted=True, n_classes=10, **common)
    return package.Square(network, n_queries=5000, **common)


def torchattacks():
    """The package torchattacks, imported when it is needed.

    Raises:
        RuntimeError: if it is missing.
    """
    try:
        return importlib.import_module("torchattacks")
    except ImportError:
        raise RuntimeError(
            f"torchattacks is missing; pip install --no-deps torchattacks=={VERSION}"
        ) from None


def finished(path, columns, settings):
    """Number of rows that are there; a line cut short is removed.

    Raises:
        ValueError: if they are of another model or other settings.
    """
    twin = path.with_suffix(".json")
    if not path.exists():
        write_json(twin, settings | {"runs": []})
        path.write_text(",".join(columns) + "\n")
        return 0
    was = json.loads(twin.read_text()) if twin.exists() else {}
    if {name: value for name, value in was.items() if name != "runs"} != settings:
        raise ValueError(f"{path} is of another model or other settings; choose another --rows.")
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        os.truncate(path, len(whole.encode()))
    return whole.count("\n") - 1


def log_run(path, done, args, words):
    """Note in the twin from which row on this command, commit and device made them."""
    twin = path.with_suffix(".json")
    noted = json.loads(twin.read_text())
    command = " ".join(["python -m benchmarks.autoattack", *words])
    one = {"from_row": done, "command": command, "commit": code_commit()}
    # Neither is a setting: a run may go on elsewhere, with other draws of what is random.
    one |= {"batch_size": args.batch_size, "device": get_device(args.device).type}
    write_json(twin, noted | {"runs": [*noted.get("runs", []), one]})


def append(path, indices, batch, hits):
    """Add the rows of a batch and wait until they are on disk."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    results = torch.stack([*hits.values()], dim=1).int().tolist()
    for index, label, result in zip(indices, batch.tensors[1].tolist(), results, strict=True):
        writer.writerow([index, label, *result])
    with path.open("a") as stream:
        stream.write(text.getvalue())
        stream.flush()
        os.fsync(stream.fileno())


def summary(rows):
    """Accuracy after each attack, the worst case with its interval of test sampling."""
    lines = []
    for name in [name for name in rows[0] if name not in ("index", "label")]:
        hits = sum(int(row[name]) for row in rows)
        low, high = map(float, accuracy_interval(hits, len(rows)))
        bounds = (low, high) if name in ("robust", "strongest") else ()
        lines.append((name, str(hits), percent(hits / len(rows), *bounds)))
    return format_table(("after", f"of {len(rows)}", "accuracy % [95 % interval]"), lines)


if __name__ == "__main__":
    run(main)
