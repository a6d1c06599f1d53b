"""Comparison of three models: 7.8, 3.6 and 86.8 % proven correct within l2 distance 1.

Command: python main_compare.py, after the three scripts that train the models.

Smooths the standard, the adversarial and the smoothed model, or any that --model names, with the
same noise and certifies the same test images, then attacks the models without noise. Writes
results/certificates_<model>.csv, results/comparison_attacks.csv,
results/comparison_smallest_epsilons.csv and figures. With --image it only reads that image.
"""

from pathlib import Path

from src.certification import minimum_successes
from src.command_line import (
    count,
    named_file,
    number,
    parse,
    run,
    script_parser,
    share,
    when_interrupted,
)
from src.engine.parts import PRECISIONS
from src.files import check_target, lock_file
from src.optimisation.processes import is_main, process_count, rank, restarted, wait_for_all
from src.provenance import provenance
from src.reports.comparison import (
    MODELS,
    MOST_MODELS,
    attack_models,
    certify_models,
    challenge_models,
    checkpoint_facts,
    common_sigma,
    default_files,
    drop_shards,
    load_models,
    merge_shards,
    report_comparison,
    set_targets_aside,
)
from src.reports.own_image import report_image
from src.utils import get_device, load_mnist, seed_everything


def main(argv=None):
    args = complete(parse(option_parser(), argv, every=1000, n=500))
    device = get_device(args.device)
    seed_everything(args.seed)
    chosen = {name: getattr(args, name) for name in MODELS}
    files = dict(args.model or default_files(args.models, chosen))
    models = load_models(files, device)
    args.sigma = args.sigma or common_sigma(models)
    if args.image:
        report_images(models, args)
        return
    facts = provenance(Path(__file__).stem, args, argv)
    facts["checkpoints"] = checkpoint_facts(files, models)
    compare(models, args, facts)


def compare(models, args, facts):
    """Certify and attack the models on test images, and report."""
    test = load_mnist("test", args.data)
    indices = range(0, len(test), args.every)
    shard = args.shard or (rank() + 1, process_count())
    results = Path(args.results)
    resume = args.resume or restarted()
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


def report_images(models, args):
    """Report what the models read in images of one's own; no file of a comparison is touched."""
    names = ("sigma", "precision", "n0", "n", "alpha", "seed", "steps")
    for path in args.image:
        figure = Path(args.figures) / f"image_{Path(path).stem}.png"
        report_image(models, path, figure, **{name: getattr(args, name) for name in names})
        print(f"Figure in {figure}\n")


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
    if args.image and process_count() > 1:
        raise ValueError("--image takes one process, not several of torchrun.")
    for name in ("shard", "challenge", "resume"):
        if args.image and getattr(args, name):
            raise ValueError(f"--{name} has no effect with --image, which writes no rows.")
    check_names(args)
    args.steps = args.steps or (4 if args.quick else 40)
    return args


def check_names(args):
    """ValueError if the names of models or images leave open which is which."""
    if given := [name for name in MODELS if args.model and getattr(args, name)]:
        raise ValueError(
            f"--{given[0]} has no effect with --model; give --model {given[0]}=FILE instead."
        )
    # Some file systems do not tell capitals from small letters.
    names = [name.casefold() for name, _ in args.model or []]
    if len(set(names)) < len(names):
        raise ValueError("Two models have the same name; give each --model its own NAME.")
    figures = [Path(path).stem.casefold() for path in args.image or []]
    if len(set(figures)) < len(figures):
        raise ValueError("Two images have the same name, and so would their figures; rename one.")
    if len(names) > MOST_MODELS:
        raise ValueError(
            f"{len(names)} models are too many for the figures: at most {MOST_MODELS}."
        )


def option_parser():
    parser = script_parser(__doc__, "python main_compare.py --every 100 --n 1000")
    named = "a model of that name from this checkpoint, in place of the three; may be repeated"
    own = {"action": "append", "metavar": "NAME=FILE", "type": named_file}
    parser.adder("data")("--model", **own, help=named)
    for name, (stem, _) in MODELS.items():
        checkpoint = f"checkpoint of the {name} model; default: {stem}.pt in --models"
        parser.adder("data")(f"--{name}", metavar="FILE", help=checkpoint)
    add = parser.adder("data")
    photo = "only report what the models read in this image of a digit; may be repeated"
    add("--image", action="append", metavar="FILE", help=photo)
    add("--every", type=count(), default=20, help="take every N-th test image")
    parser.adder("attack")("--steps", type=count(), help="steps of PGD; default: 40")
    add = parser.adder("certification")
    noise = "standard deviation of the noise, pixel units; default: that of the first model "
    noise += "trained under noise, else 0.5"
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
