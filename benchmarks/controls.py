"""What the thresholds give and what adversarial training gives: each with and without the other.

Three trainings: standard, in a single step, in several steps. Each with pixels cut at 0.4 and 0.6
and without, all else the same: networks, epochs, seed 0. Judged on the same 1,000 test images, in
linf 0.3 (the ball of the two adversarial trainings) and in l2 2. The images are the first in the
order 0, 20, 40, ..., 1, 21, ..., so they are spread over the test set. Columns of --rows:

- `clean`, and `pgd`: what stands under PGD, 40 steps from 2 starts
- `autoattack`: what stands under the four attacks of benchmarks/autoattack.py, which needs an extra
- `worst`: what stands under PGD, those, and our strongest attack, which knows the thresholds

The referee's rows, one for each image, are those of benchmarks/autoattack.py. They go to the folder
controls/ beside --rows; a run that was stopped goes on. Where the referee has judged a network on
all images, in reference/results, its first 1,000 are taken.

Run: python -m benchmarks.controls --rows results/controls.csv
"""

import argparse
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch

from benchmarks import autoattack
from src.attacks import pgd_attack
from src.checkpoints import load_checkpoint
from src.command_line import run
from src.provenance import code_commit
from src.records.rows import read_rows, write_rows
from src.reports.tables import format_table
from src.robustness import strongest_attack
from src.training_and_evaluation import correct
from src.utils import get_device, load_mnist, subset

REFERENCE = Path("reference")
# Training -> its checkpoint without thresholds, with them.
TRAININGS = {
    "standard": ("standard", "control_standard"),
    "single step": ("control_single_step", "adversarial_single_step"),
    "multi-step": ("control_multi_step", "adversarial_multi_step"),
}
BALLS = {"linf": 0.3, "l2": 2.0}
IMAGES = 1000


def judged(stem: str, norm: str, folder: Path, device: str) -> dict:
    """What stands of the images of one network in one ball, of `clean` and after each attack."""
    checkpoint = REFERENCE / "models" / f"{stem}.pt"
    path = REFERENCE / "results" / f"autoattack_{stem}.csv"
    if norm != "linf" or not path.exists():
        path = folder / f"{stem}_{norm}.csv"
        words = [str(checkpoint), "--norm", norm, "--epsilon", str(BALLS[norm]), "--device", device]
        autoattack.main([*words, "--images", str(IMAGES), "--rows", str(path)])
    rows = read_rows(path)[:IMAGES]
    model = load_checkpoint(checkpoint, get_device(device))
    batch = subset(load_mnist("test"), [int(row["index"]) for row in rows])
    ball = {"epsilon": BALLS[norm], "norm": norm}
    pgd = correct(model, batch, attack=partial(pgd_attack, **ball, steps=40, restarts=2))
    ours = correct(model, batch, attack=partial(strongest_attack, **ball))
    referee = [bool(int(row["robust"])) for row in rows]
    return {
        "images": len(rows),
        "clean": sum(int(row["clean"]) for row in rows),
        "pgd": int(pgd.sum()),
        "autoattack": sum(int(row["square"]) for row in rows),
        "worst": int((pgd & ours & torch.tensor(referee)).sum()),
    }


def control_lines(rows: Iterable[Mapping]) -> str:
    """The table, in % of the images: a line for each network, both balls beside each other."""

    def share(row, name):
        return f"{100 * int(row[name]) / int(row['images']):.1f}"

    networks: dict[tuple, list] = {}
    # In the order of the header, in which those of a network that was judged again are not.
    for row in sorted(rows, key=lambda row: list(BALLS).index(row["norm"])):
        first = (row["training"], row["thresholds"])
        cells = networks.setdefault(first, [*first, share(row, "clean")])
        cells += [share(row, name) for name in ("pgd", "autoattack", "worst")]
    header = ["training", "thresholds", "clean %"]
    for norm, epsilon in BALLS.items():
        header += [f"{norm} {epsilon:g}: PGD", "AutoAttack", "worst"]
    return format_table(header, list(networks.values()))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=Path, required=True, help="file of the rows, .csv")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto")
    args = parser.parse_args(argv)
    rows = read_rows(args.rows) if args.rows.exists() else []
    done = {(row["checkpoint"], row["norm"]) for row in rows}
    for training, stems in TRAININGS.items():
        for thresholds, stem in zip(("none", "0.4, 0.6"), stems, strict=True):
            for norm in BALLS:
                if (stem, norm) in done:
                    continue
                row = {"training": training, "thresholds": thresholds, "checkpoint": stem}
                row |= {"norm": norm, "epsilon": BALLS[norm]}
                row |= judged(stem, norm, args.rows.parent / "controls", args.device)
                rows.append(row | {"commit": code_commit()})
                write_rows(args.rows, rows)
    print(control_lines(rows))


if __name__ == "__main__":
    run(main)
