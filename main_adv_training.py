"""Adversarial training in a single step: AutoAttack 93.9 % at linf 0.3, 4 minutes on one core.

Command: python main_adv_training.py

Trains ConvNN on MNIST with the gradient attack, or with PGD, and attacks the network. After each
epoch, PGD attacks held-out training images. The epoch with the best accuracy is saved, and
catastrophic overfitting is reported. AutoAttack is not part of this script; the figure is the mean
of three seeds in docs/results.md, on all test images. Writes models/adversarial_training.pt,
results/adversarial_training_attacks.csv, results/adversarial_training_smallest_epsilons.csv and
figures.
"""

from functools import partial
from pathlib import Path

from src.checkpoints import save_checkpoint
from src.command_line import (
    count,
    number,
    parse,
    reserved,
    run,
    script_parser,
    training_arguments,
    training_options,
)
from src.methods.adversarial import (
    adversarial_loss_schedule,
    collapsed_epochs,
    held_out_watch,
    trades_loss,
    training_attack,
)
from src.models import ConvNN
from src.optimisation.processes import is_main, own_seed
from src.provenance import provenance
from src.reports.one_model import report_attacks
from src.reports.output import Output, figure_title
from src.reports.plotting import plot_held_out_robustness, plot_training
from src.robustness.fixed_radii import radii_with
from src.training_and_evaluation import adversarial_loss, train_model
from src.utils import get_device, load_training_data, seed_everything, spread

NAME, TITLE = "adversarial_training", "Adversarial training"
# The thresholds cut away most changes of an l-infinity ball. An l2 attack gets past them by
# changing a few pixels a lot.
DEFAULTS = {
    "linf": {"epsilon": 0.3, "thresholds": [0.4, 0.6]},
    "l2": {"epsilon": 2.0, "thresholds": None},
}


def main(argv=None):
    args = complete(parse(option_parser(), argv, epochs=1))
    device = get_device(args.device)
    seed_everything(args.seed)
    *training, test = load_training_data(args.data, args.held_out, quick=args.quick)
    # Everything that may be refused comes before earlier rows are moved.
    model = ConvNN(args.channels, args.hidden, thresholds=args.thresholds).to(device)
    with reserved(args, "attacks", "smallest_epsilons"):
        # Before the training: the commit may change while it runs.
        facts = provenance(Path(__file__).stem, args, argv)
        history = train(model, *training, args)
        if is_main():
            facts |= {"seconds": history["epochs"][-1]["seconds"]}
            save_checkpoint(Path(args.models) / f"{args.name}.pt", model, **facts)
            title = figure_title(args.name, TITLE, NAME)
            facts |= {"epochs": history["epochs"]}
            output = Output(args.name, title, facts, args.results, args.figures)
            report_training(history, output)
            balls = radii_with((args.norm, args.epsilon))
            report_attacks(model, test, output, quick=args.quick, radii=balls)
            print(f"Figures in {args.figures}/, rows in {args.results}/, model in {args.models}/")


def train(model, images, held_out, args):
    """Train the network as the options say; returns the history of its training."""
    print(
        f"Adversarial training of ConvNN {args.channels} on {len(images):,} images: "
        f"{args.attack} attack, {args.norm}, epsilon = {args.epsilon:g}"
    )
    return train_model(
        model,
        images,
        loss_schedule=loss_schedule(args),
        watch=held_out_watch(spread(held_out, 1000), args.epsilon, args.norm),
        select="pgd",
        **training_arguments(args),
    )


def loss_schedule(args):
    """The loss as a function of the progress of the training, as the options say."""
    attack = training_attack(
        args.attack, args.norm, steps=args.steps, stride=args.stride, seed=own_seed(args.seed)
    )
    loss = adversarial_loss if args.beta is None else partial(trades_loss, beta=args.beta)
    return adversarial_loss_schedule(attack, args.epsilon, loss=loss)


def report_training(history, output):
    """Say whether the training collapsed, and draw its curves."""
    collapsed = collapsed_epochs(history["epochs"])
    if collapsed:
        print(
            f"ALARM: catastrophic overfitting in epochs {collapsed}: the network withstands the "
            "single step but not PGD. Try --attack pgd, a smaller --epsilon or fewer --epochs."
        )
    print(f"Kept epoch {history['best_epoch']}, the best under PGD on held-out training images")
    title, path = output.title, output.figure("curves")
    plot_training(history, path, title, held_out="held out, not attacked")
    path = output.figure("held_out")
    plot_held_out_robustness(history, path, f"{title}: held-out images", collapsed)


def complete(args):
    """Fill in the defaults that depend on the norm and on the attack.

    Raises:
        ValueError: if an option has no effect beside the others, or epsilon exceeds all pixels.
    """
    for name, value in DEFAULTS[args.norm].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.no_thresholds:
        args.thresholds = None
    if args.norm == "linf" and args.epsilon > 1:
        raise ValueError(f"--epsilon {args.epsilon:g} is more than pixels in [0, 1] can move by.")
    for attack, name, value in (("pgd", "steps", 7), ("gradient", "stride", 2.0)):
        if args.attack != attack and getattr(args, name) is not None:
            raise ValueError(f"--{name} has no effect without --attack {attack}; leave it out.")
        if args.attack == attack and getattr(args, name) is None:
            setattr(args, name, value)
    return args


def option_parser():
    parser = script_parser(__doc__, "python main_adv_training.py --epsilon 0.2 --name weaker")
    # With warps instead of shifts more held-out images withstood the attack; see docs/recipes.md.
    training_options(parser, name=NAME, epochs=14, hidden=256, shift=0, warp=0.15)
    add = parser.adder("training")
    add("--beta", type=number(), help="weight of the divergence in the TRADES loss; default: none")
    add = parser.groups["training"].add_mutually_exclusive_group().add_argument
    cuts = "pixels become 0 up to the first, 1 from the second on; default: 0.4 0.6, in l2 none"
    unit = number(0, 1, with_low=True, with_high=True)
    add("--thresholds", type=unit, nargs=2, help=cuts)
    add("--no-thresholds", action="store_true", help="leave pixels as they are")
    add = parser.adder("attack")
    add("--norm", choices=("linf", "l2"), default="linf", help="norm of the ball")
    epsilon = "radius of the ball, in pixel units; default: 0.3, in l2 2"
    add("--epsilon", type=number(high=28, with_high=True), help=epsilon)
    kinds = ("gradient", "pgd")
    add("--attack", choices=kinds, default="gradient", help="attack in training: a step or PGD")
    add("--steps", type=count(), help="steps of PGD in training; default: 7")
    stride = "length of the single step, as a multiple of epsilon; default: 2"
    add("--stride", type=number(high=100), help=stride)
    return parser


if __name__ == "__main__":
    run(main)
