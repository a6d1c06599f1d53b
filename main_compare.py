"""Comparison of the three models: accuracy under attack, and certificates by smoothing.

Smooths the standard, the adversarial and the smoothed model with the same noise and certifies
the same test images. Writes results/certificates_<model>.csv, results/comparison_attacks.csv,
results/comparison_smallest_epsilons.csv and figures.
"""

from pathlib import Path

from src.certification import minimum_successes
from src.command_line import count, number, parse, run, script_parser, share, when_interrupted
from src.engine.forms import common_precision
from src.engine.parts import PRECISIONS
from src.files import lock_file
from src.optimisation.processes import is_main, process_count, rank, restarted, wait_for_all
from src.provenance import provenance
from src.reports.comparison import (
    MODELS,
    attack_models,
    certify_models,
    challenge_models,
    drop_shards,
    load_models,
    merge_shards,
    report_comparison,
    set_targets_aside,
    smoothing_sigma,
)
from src.utils import get_device, load_mnist, seed_everything


def main(argv=None):
    args = complete(parse(option_parser(), argv, every=1000, n=500))
    device = get_device(args.device)
    seed_everything(args.seed)
    test = load_mnist("test", args.data)
    indices = range(0, len(test), args.every)
    shard = args.shard or (rank() + 1, process_count())
    models = load_models(args.models, device, {name: getattr(args, name) for name in MODELS})
    args.sigma = args.sigma or smoothing_sigma(models["smoothed"])
    results = Path(args.results)
    resume = args.resume or restarted()
    args.precision = args.precision or common_precision(*models.values())
    facts = provenance(Path(__file__).stem, args, argv)

    reports = is_main() and not args.shard
    # One run at a time: tables and figures must be of the rows that lie beside them.
    name = "comparison" if reports else "comparison-{}-of-{}".format(*shard)
    results.mkdir(parents=True, exist_ok=True)
    with lock_file(results / name):
        if not resume:
            set_targets_aside(models, results, shard, tables=reports)
        with when_interrupted("Finished rows are kept; go on with --resume."):
            certificates = certify_models(
                models,
                test,
                indices,
                sigma=args.sigma,
                n0=args.n0,
                n=args.n,
                alpha=args.alpha,
                seed=args.seed,
                precision=args.precision,
                results=results,
                facts=facts,
                resume=resume,
                shard=shard,
                two_sided=args.two_sided,
            )
            wait_for_all()
            if reports:
                report(models, test, indices, certificates, args, facts)


def report(models, test, indices, certificates, args, facts):
    """Attack the models, and write and draw all that is known of them."""
    results = Path(args.results)
    if process_count() > 1:
        certificates = merge_shards(models, results, process_count())
    evaluations = attack_models(models, test, indices, steps=args.steps)
    report_comparison(
        evaluations,
        certificates,
        test,
        sigma=args.sigma,
        facts=facts,
        results=results,
        figures=args.figures,
    )
    if args.challenge:
        challenge_models(
            models,
            test,
            certificates,
            sigma=args.sigma,
            precision=args.precision,
            images=args.challenge,
            seed=args.seed,
        )
    if process_count() > 1:
        drop_shards(models, results, process_count())
    print(f"\nFigures in {args.figures}/, rows in {args.results}/")


def complete(args):
    """The options with their defaults filled in.

    Raises:
        ValueError: for options that cannot certify, or have no effect beside the others.
    """
    minimum_successes(args.n, args.alpha)
    if args.shard and process_count() > 1:
        raise ValueError("Give either --shard or several processes of torchrun, not both.")
    for name in ("steps", "challenge"):
        if args.shard and getattr(args, name):
            raise ValueError(f"--{name} has no effect with --shard, which only certifies.")
    args.steps = args.steps or (4 if args.quick else 40)
    return args


def option_parser():
    parser = script_parser(__doc__, "python main_compare.py --every 100 --n 1000")
    for name, (stem, _) in MODELS.items():
        checkpoint = f"checkpoint of the {name} model; default: {stem}.pt in --models"
        parser.about("data")(f"--{name}", metavar="FILE", help=checkpoint)
    add = parser.about("data")
    add("--every", type=count(), default=20, help="take every N-th test image")
    parser.about("attack")("--steps", type=count(), help="of PGD; default: 40")
    add = parser.about("certification")
    noise = "noise, pixel units; default: that of the smoothed model"
    add("--sigma", type=number(high=10, with_high=True), help=noise)
    add("--n0", type=count(), default=100, help="noisy copies that choose the class")
    add("--n", type=count(), default=10_000, help="fresh copies that bound its probability")
    odds = "chance of a false certificate, per image"
    add("--alpha", type=number(0, 1), default=0.001, help=odds)
    add(
        "--precision",
        choices=PRECISIONS,
        help="of the networks that vote; default: int8 where all of them can, else float32",
    )
    both = "bound the other classes as well: a second radius, in columns of its own"
    add("--two-sided", action="store_true", help=both)
    add(
        "--challenge",
        type=count(0),
        nargs="?",
        const=50,
        default=0,
        help="attack this many certificates of each model (50 if no number is given)",
    )
    add("--shard", type=share, help="k/n: certify the k-th of n parts of the images, then stop")
    parser.about("run")("--resume", action="store_true", help="go on with interrupted rows")
    return parser


if __name__ == "__main__":
    run(main)
