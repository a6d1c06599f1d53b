"""How near our strongest attack comes to AutoAttack, on the same images of several networks.

The reference models, seed 0; the single-step one with logits times 3,000, which saturates the
cross-entropy; its control without thresholds; the base network of a smoothed one; and, with --peer,
a network trained by others with PGD-40 in linf, epsilon = 0.3: `mnist_lenet5_advtrained.pt` in the
source distribution of advertorch 0.2.3 on the package index (Ding, Wang and Jin, arXiv:1902.07623):

    pip download --no-deps --no-build-isolation --no-binary advertorch advertorch==0.2.3
    tar xzf advertorch-0.2.3.tar.gz
    ls advertorch-0.2.3/advertorch_examples/trained_models

AutoAttack is that of benchmarks/autoattack.py, which says what it needs. Ours is
strongest_attack: Auto-PGD on the cross-entropy, on the margin from five starts and towards nine
classes from two, 100 steps each, in l2 from outside the ball too, then Square with 5,000 queries.
It has no FAB, but it knows the thresholds. `ours` is thorough: every stage attacks all images that
stand. `quick` is the default: a later stage stops at the first eighth of the images, in the order
of their margins, where it breaks nothing, and leaves an eighth after three starts or classes in a
row in vain.

All are timed, one after the other. None sees points of another; all attack the first --images in
the order 0, 20, 40, ..., 1, 21, ...; `both` is what stands after AutoAttack and ours. A network's
row is written to --rows as soon as it is finished and not made again.

With --quick the thorough attack is left out, and the table compares the times of the other two.

Run: python -m benchmarks.strongest --rows results/strongest.csv \\
         --peer advertorch-0.2.3/advertorch_examples/trained_models/mnist_lenet5_advtrained.pt
"""

import argparse
import copy
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks import autoattack
from src.checkpoints import load_checkpoint
from src.command_line import count, run
from src.provenance import code_commit
from src.records.rows import read_rows, write_rows
from src.reports.tables import format_table
from src.robustness import strongest_attack
from src.training_and_evaluation import correct
from src.utils import get_device, load_mnist, subset

MODELS = Path("reference/models")
PEER = "LeNet5 of advertorch 0.2.3"


def networks(peer: Path | None) -> dict[str, tuple]:
    """Name -> (norm, epsilon, what gives the network)."""

    def ours(name):
        return load_checkpoint(MODELS / f"{name}.pt", "cpu")

    single = "adversarial_single_step"
    found = {
        "single step": ("linf", 0.3, lambda: ours(single)),
        "single step, logits times 3,000": ("linf", 0.3, lambda: louder(ours(single), 3000)),
        "single step, no thresholds": ("linf", 0.3, lambda: ours("control_single_step")),
        "single step, no thresholds, l2": ("l2", 2.0, lambda: ours("control_single_step")),
        "multi-step": ("linf", 0.3, lambda: ours("adversarial_multi_step")),
        "multi-step, l2": ("l2", 2.0, lambda: ours("adversarial_l2")),
        "trained under noise, l2": ("l2", 2.0, lambda: ours("smoothing_gaussian_0.50")),
    }
    return found | ({PEER: ("linf", 0.3, lambda: peer_network(peer))} if peer else {})


def louder(model: nn.Module, factor: float) -> nn.Module:
    """The same classifier with logits `factor` times as large."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.output.weight *= factor
        model.output.bias *= factor
    return model


def peer_network(path: Path) -> nn.Module:
    """advertorch's LeNet5 with the weights in the file.

    Raises:
        RuntimeError, ValueError: if they are of another network.
    """
    network = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(7 * 7 * 64, 200), nn.ReLU(), nn.Linear(200, 10)),
    )
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    # Their layers have names and ours numbers, in the same order.
    network.load_state_dict(dict(zip(network.state_dict(), theirs.values(), strict=True)))
    return network.eval()


def judged(name: str, norm: str, epsilon: float, network: nn.Module, batch, args) -> dict:
    """The row of one network."""
    settings = argparse.Namespace(
        norm=norm, epsilon=epsilon, seed=0, batch_size=args.batch_size, strongest=False
    )
    device = get_device(args.device)
    network = network.to(device)
    hits, seconds = {}, {}

    def timed(way, call):
        start = time.perf_counter()
        hits[way] = call()
        seconds[way] = time.perf_counter() - start

    theirs = partial(autoattack.attacked, network, batch, settings, autoattack.AUTOATTACK)
    timed("autoattack", lambda: theirs()["robust"])
    for way in ("quick",) if args.quick else ("ours", "quick"):
        options = {"epsilon": epsilon, "norm": norm, "thorough": way == "ours"}
        generator = torch.Generator().manual_seed(0)
        attack = partial(strongest_attack, **options, generator=generator)
        timed(way, partial(correct, network, batch, attack=attack))
    standing = {way: int(of.sum()) for way, of in hits.items()}
    if "ours" in hits:
        standing["both"] = int((hits["autoattack"] & hits["ours"]).sum())
    return {
        "model": name,
        "norm": norm,
        "epsilon": epsilon,
        "images": len(batch),
        "clean": int(correct(network, batch).sum()),
        **standing,
        "autoattack_quick_differ": int((hits["autoattack"] != hits["quick"]).sum()),
        **{f"{way}_seconds": round(took, 1) for way, took in seconds.items()},
        "threads": torch.get_num_threads(),
        "device": device.type,
        "commit": code_commit(),
    }


def share(row, name) -> float:
    """What stands, in % of the images."""
    return 100 * int(row[name]) / int(row["images"])


def strongest_lines(rows) -> str:
    """The table, in % of the images."""
    lines = [
        (
            row["model"],
            f"{row['norm']} {float(row['epsilon']):g}",
            f"{int(row['images']):,}",
            *(f"{share(row, name):.1f}" for name in ("clean", "autoattack", "ours", "both")),
            f"{share(row, 'ours') - share(row, 'autoattack'):+.1f}",
        )
        for row in rows
    ]
    header = ("network", "ball", "images", "clean %", "AutoAttack %", "ours %", "both %")
    return format_table((*header, "ours - AutoAttack"), lines)


def quick_lines(rows) -> str:
    """The table of the times, in seconds, and of how much the two verdicts differ."""
    lines = []
    for row in rows:
        took = [float(row[f"{way}_seconds"]) for way in ("autoattack", "quick")]
        cells = [row["model"], f"{row['norm']} {float(row['epsilon']):g}"]
        cells += [f"{share(row, name):.1f}" for name in ("autoattack", "quick")]
        cells += [row["autoattack_quick_differ"], *(f"{value:,.0f}" for value in took)]
        lines.append((*cells, f"{took[0] / took[1]:.2f}"))
    header = ("network", "ball", "AutoAttack %", "quick %", "images that differ")
    return format_table((*header, "AutoAttack s", "quick s", "times faster"), lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=Path, required=True, help="file of the rows, .csv")
    parser.add_argument("--peer", type=Path, help="advertorch's mnist_lenet5_advtrained.pt")
    parser.add_argument("--images", type=count(), default=1000, help="how many, in that order")
    parser.add_argument(
        "--batch-size", type=count(), default=1000, help="images at once, of AutoAttack"
    )
    parser.add_argument("--quick", action="store_true", help="leave out the thorough attack")
    parser.add_argument("--only", choices=[*networks(None), PEER], help="one network alone")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto")
    parser.add_argument("--data", help="folder of MNIST; default: data/ of the repository")
    args = parser.parse_args()
    if args.only == PEER and not args.peer:
        parser.error(f"{PEER} needs --peer.")
    batch = subset(load_mnist("test", args.data), autoattack.ORDER[: args.images])
    rows = read_rows(args.rows) if args.rows.exists() else []
    if rows and ("ours" in rows[0]) == args.quick:
        parser.error(f"{args.rows} has rows {'without' if args.quick else 'with'} --quick.")
    if rows and int(rows[0]["images"]) != len(batch):
        parser.error(f"{args.rows} has rows of --images {rows[0]['images']}.")
    lines = quick_lines if args.quick else strongest_lines
    for name, (norm, epsilon, network) in networks(args.peer).items():
        if args.only in (None, name) and name not in [row["model"] for row in rows]:
            rows.append(judged(name, norm, epsilon, network(), batch, args))
            write_rows(args.rows, rows)
            print(lines(rows), flush=True)
    print(lines(rows))


if __name__ == "__main__":
    run(main)
