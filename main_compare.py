"""Comparison of three models: 7.2, 3.4 and 85.6 % proven correct within l2 distance 1.

Command: python main_compare.py, after the three scripts that train the models.

Smooths the standard, the adversarial and the smoothed model with the same noise and certifies the
same test images, then attacks the models without noise. Writes results/certificates_<model>.csv,
results/comparison_attacks.csv, results/comparison_smallest_epsilons.csv and figures.
"""

from pathlib import Path

from src.certification import minimum_successes
from src.command_line import count, number, parse, run, script_parser, share, when_interrupted
from src.engine.parts import PRECISIONS
from src.files import check_target, lock_file
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
    facts = provenance(Path(__file__).stem, args, argv)

    reports = is_main() and not args.shard
    # One run at a time: tables and figures must be of the rows that lie beside them.
    name = "comparison" if reports else "comparison-{}-of-{}".format(*shard)
    results.mkdir(parents=True, exist_ok=True)
    with lock_file(results / name):
        if reports:
            check_target(Path(args.figures) / "comparison_accuracy_against_epsilon.png")
        set_targets_aside(models, results, shard, tables=reports, resume=resume)
        with when_interrupted("Finished rows are kept; go on with --resume."):
            certificates = certify_models(
                models,
                test,
                indices,
                results,
                sigma=args.sigma,
                precision=args.precision,
                facts=facts,
                shard=shard,
                **{name: getattr(args, name) for name in ("n0", "n", "alpha", "seed")},
                resume=resume,
            )
            wait_for_all()
            if reports:
                report(models, test, indices, certificates, args, facts)


def report(models, test, indices, certificates, args, facts):
    """Attack the models, then write and draw the results."""
    results = Path(args.results)
    if process_count() > 1:
        certificates = merge_shards(models, results, process_count())
    evaluations = attack_models(models, test, indices, steps=args.steps)
    folders = {"results": results, "figures": args.figures}
    report_comparison(evaluations, certificates, test, sigma=args.sigma, facts=facts, **folders)
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
    """Fill in the default of --steps.

    Raises:
        ValueError: if `n` can certify nothing, or an option has no effect beside the others.
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
        parser.adder("data")(f"--{name}", metavar="FILE", help=checkpoint)
    add = parser.adder("data")
    add("--every", type=count(), default=20, help="take every N-th test image")
    parser.adder("attack")("--steps", type=count(), help="steps of PGD; default: 40")
    add = parser.adder("certification")
    noise = "standard deviation of the noise, pixel units; default: the smoothed model's"
    add("--sigma", type=number(high=10, with_high=True), help=noise)
    add("--n0", type=count(), default=100, help="noisy copies that choose the class")
    add("--n", type=count(), default=10_000, help="fresh copies that bound its probability")
    odds = "chance of a false certificate, per image"
    add("--alpha", type=number(0, 1), default=0.001, help=odds)
    votes = "arithmetic of the votes; default: exact on a CPU, else float32"
    add("--precision", choices=PRECISIONS, help=votes)
    attacked = "attack this many certificates of each model (50 if no number is given)"
    add("--challenge", type=count(0), nargs="?", const=50, default=0, help=attacked)
    add("--shard", type=share, help="k/n: certify the k-th of n parts of the images, then stop")
    parser.adder("run")("--resume", action="store_true", help="keep the rows of an interrupted run")
    return parser


if __name__ == "__main__":
    run(main)
