"""Anybody's network under attack and, with --sigma, certified: rows, figures, attacked images.

Command: python -m src.evaluate --network package.module:function --data file.npz \\
           --norm linf --epsilon 0.1 --sigma 0.25

Run it where the module can be imported; its function gives a torch.nn.Module with logits (B, K)
for images (B, C, H, W) in [0, 1]. The file has `images` and `labels` (numpy.savez). The network is
attacked without noise. Certificates are about its votes under Gaussian noise.
"""

from pathlib import Path

import numpy as np
from torch import nn

from src.certification import minimum_successes
from src.checks import NORMS
from src.command_line import Parser, count, number, parse, run, stem, when_interrupted
from src.engine.lattice import LEVELS, MOST_LEVELS
from src.files import check_target, drop_equal_copies, lock_file, set_aside, whole_file
from src.foreign import count_classes, load_images, load_network
from src.models import SmoothClassifier
from src.optimisation.processes import process_count
from src.provenance import provenance
from src.records import certify_dataset
from src.records.identity import model_identity
from src.records.rows import write_rows
from src.reports.output import Output, figure_title, save_attacks
from src.reports.plotting import plot_certified_accuracy
from src.reports.tables import certificate_lines, format_table, percent
from src.robustness.checklist import warning_lines
from src.robustness.fixed_radii import WORST_KNOWN
from src.robustness.one_ball import evaluate_in_ball
from src.utils import data_digest, get_device, seed_everything, spread_indices, subset

TABLES = ("stages", "attacks", "smallest_epsilons")


def main(argv=None):
    quick = {"images": 20, "n": 500, "steps": 10, "queries": 100}
    args = complete(parse(option_parser(), argv, **quick))
    device = get_device(args.device)
    # Before the network is made: it may have random weights.
    seed_everything(args.seed)
    dataset = load_images(args.data)
    model = load_network(args.network).to(device)
    classes = count_classes(model, dataset)
    numbers = range(0, len(dataset), args.every)
    indices = [numbers[k] for k in spread_indices(len(numbers), args.images or len(numbers))]
    facts = provenance("-m src.evaluate", args, argv) | {"classes": classes}
    title = figure_title(args.name, args.name, "")
    output = Output(args.name, title, facts, args.results, args.figures)
    paths = [output.rows(f"{table}.csv") for table in TABLES]
    for path in (*paths, output.rows("adversarial.npz"), output.rows("certificates.csv")):
        check_target(path)
    check_target(output.figure("accuracy_against_epsilon"))
    with lock_file(Path(args.results) / args.name):
        shape = tuple(dataset.tensors[0].shape[1:])
        print(f"{args.network}: {classes} classes, images {shape}")
        # First, because only certificates go on where an interrupted run stopped.
        if args.sigma:
            with when_interrupted("Finished certificates are kept; go on with --resume."):
                report_certificates(model, dataset, indices, args, output)
        for path in paths:
            set_aside(path)
        report_attacks(model, dataset, indices, args, output)
        for path in paths:
            drop_equal_copies(path)
    print(f"\nFigures in {args.figures}/, rows and attacked images in {args.results}/")


def report_certificates(model, dataset, indices, args, output: Output) -> None:
    """Certify the images of these numbers: rows with their twin, a table and a figure."""
    print(f"Certifying at sigma = {args.sigma:g}, n = {args.n:,}, alpha = {args.alpha:g}")
    path = output.rows("certificates.csv")
    rows = certify_dataset(
        SmoothClassifier(model, args.sigma, output.facts["classes"], levels=args.levels),
        dataset,
        path,
        **{name: getattr(args, name) for name in ("n0", "n", "alpha", "seed", "resume")},
        indices=indices,
        facts=output.facts,
    )
    radii = [step * args.sigma / 2 for step in range(6)]
    print("\n" + certificate_lines({output.title: rows}, radii))
    title = f"{output.title}, $\\sigma$ = {args.sigma:g}: {len(rows)} images, n = {args.n:,}"
    plot_certified_accuracy({output.title: rows}, output.figure("certified_accuracy"), title)
    print(f"\nTo check the certificates: python -m src.records verify {path}\n")


def report_attacks(model: nn.Module, dataset, indices, args, output: Output) -> None:
    """Attack the images of these numbers by all that we have: print, write rows, draw."""
    ball, labels = f"{args.norm} {args.epsilon:g}", subset(dataset, indices).tensors[1]
    print(f"Attacking within {ball}")
    options = {"steps": args.steps, "queries": args.queries, "seed": args.seed}
    options["thorough"] = args.thorough
    found, attacked, classes = evaluate_in_ball(
        model, dataset, indices, args.epsilon, args.norm, **options
    )
    print(f"\nThe strongest attack within {ball}, on {len(indices):,} images")
    print(stage_lines(found["stages"]))
    arrays = {"images": attacked, "labels": labels, "predictions": classes}
    arrays = {name: tensor.numpy() for name, tensor in arrays.items()}
    with whole_file(output.rows("adversarial.npz")) as temporary:
        np.savez_compressed(temporary, **arrays, indices=np.array(indices))
    write_rows(output.rows("stages.csv"), found["stages"])
    chance = float(labels.bincount().max() / len(labels))
    facts = {"clean_accuracy": found["stages"][0]["accuracy"], "data_digest": data_digest(dataset)}
    facts |= model_identity(model, attacked, output.facts["classes"])
    save_attacks({output.title: found}, output, facts, chance=chance)
    print("\n" + warning_lines(found["warnings"]))


def stage_lines(rows: list[dict]) -> str:
    """Rows of `stages`, as of `evaluate_in_ball`, for the console."""
    lines = [
        (
            "other attacks" if row["attack"] == WORST_KNOWN else row["attack"],
            "" if row["attack"] == "clean" else str(row["broken"]),
            percent(row["accuracy"], row["low"], row["high"]),
        )
        for row in rows
    ]
    return format_table(("stage", "images broken", "still correct % [95 % interval]"), lines)


def complete(args):
    """Fill in the default of --name.

    Raises:
        ValueError: if `n` can certify nothing, or an option has no effect.
    """
    if process_count() > 1:
        raise ValueError("src.evaluate runs in one process; leave out torchrun.")
    if args.sigma:
        minimum_successes(args.n, args.alpha)
    elif args.resume:
        raise ValueError("--resume has no effect without --sigma: only certificates can go on.")
    args.name = args.name or args.network.rpartition(":")[2]
    return args


def option_parser():
    example = "python -m src.evaluate --network package.module:function --data file.npz"
    parser = Parser(
        usage=f"{example} --norm linf --epsilon 0.1 [--sigma 0.25]", description=__doc__
    )
    add = parser.adder("data")
    add("--network", required=True, help="what gives the network: package.module:function")
    files = (
        "an .npz file with `images`, (N, C, H, W), floats in [0, 1] or bytes, and `labels`, (N,)"
    )
    add("--data", required=True, help=files)
    add("--every", type=count(), default=1, help="take every N-th image of the file")
    add("--images", type=count(), help="of these, only this many, evenly spread; default: all")
    add = parser.adder("attack")
    add("--norm", choices=NORMS, default="linf", help="of the ball that attacks stay in")
    radius = "radius of that ball, in pixel units"
    add("--epsilon", type=number(high=1000), required=True, help=radius)
    add("--steps", type=count(), default=100, help="gradient steps per start")
    add("--queries", type=count(), default=5000, help="queries of the attack without gradients")
    every = "give every stage all images that stand, not the most fragile first"
    add("--thorough", action="store_true", help=every)
    add = parser.adder("certification")
    noise = "standard deviation of the noise, pixel units; without it nothing is certified"
    add("--sigma", type=number(high=10, with_high=True), help=noise)
    add("--n0", type=count(), default=100, help="noisy copies that choose the class")
    add("--n", type=count(), default=10_000, help="fresh copies that bound its probability")
    grid = "steps of the grid per unit that images and noise are rounded to; 255: bytes"
    add("--levels", type=count(1, MOST_LEVELS), default=LEVELS, help=grid)
    odds = "chance of a false certificate, per image"
    add("--alpha", type=number(0, 1), default=0.001, help=odds)
    add = parser.adder("output")
    add("--figures", default="figures", help="folder of the figures")
    add("--results", default="results", help="folder of the result rows")
    names = "first part of the names of the files written; default: what stands after the colon"
    add("--name", type=stem, help=names)
    add = parser.adder("run")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto")
    add("--seed", type=count(0, 2**63 - 1), default=0, help="seed of everything that is random")
    add("--resume", action="store_true", help="keep the certificates of an interrupted run")
    add("--quick", action="store_true", help="a test run of seconds on 20 images")
    return parser


if __name__ == "__main__":
    run(main)
