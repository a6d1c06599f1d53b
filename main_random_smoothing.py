"""Training under Gaussian noise: 86.8 % proven correct within l2 distance 1 by default.

Command: python main_random_smoothing.py, then main_compare.py for the figure above, which is on
500 test images with n = 10,000.

Trains the base classifier of a SmoothClassifier on MNIST. --method adds to the cross-entropy under
noise the terms of SmoothAdv and Consistency, or weights images by confidence. Reports the accuracy
of the base and of the smoothed classifier and certifies test images. Writes
models/randomized_smoothing.pt, results/randomized_smoothing_certificates.csv and figures.
"""

from pathlib import Path

from src.certification import minimum_successes
from src.checkpoints import load_checkpoint, save_checkpoint
from src.command_line import (
    count,
    number,
    parse,
    reserved,
    run,
    script_parser,
    training_arguments,
    training_options,
    when_interrupted,
)
from src.engine.parts import PRECISIONS
from src.methods.smoothing import METHODS, smoothing_loss_schedule
from src.models import ConvNN, SmoothClassifier
from src.optimisation.processes import from_main, is_main
from src.provenance import provenance
from src.reports.one_model import report_smoothing
from src.reports.output import Output, figure_title
from src.reports.plotting import plot_training
from src.training_and_evaluation import accuracy, train_model
from src.utils import get_device, load_training_data, seed_everything

NAME, TITLE = "randomized_smoothing", "Randomized smoothing"
ALPHA = 0.001  # Chance of a false certificate, per image.
# The options that decide what is trained.
TRAINING = ("sigma", "method", "epsilon", "seed", "epochs", "batch_size", "learning_rate", "shift")
TRAINING += ("consistency", "confidence", "channels", "hidden", "held_out")
TRAINING += ("training_precision", "optimizer", "warp", "attack_draws", "weight_decay", "quick")


def main(argv=None):
    args = parse(option_parser(), argv, epochs=1, every=50, n=500)
    minimum_successes(args.n, ALPHA)  # Refuses an n that could not certify anything.
    device = get_device(args.device)
    seed_everything(args.seed)
    *training, test = load_training_data(args.data, args.held_out, quick=args.quick)
    path = Path(args.models) / f"{args.name}.pt"
    resume = from_main(lambda: args.resume and path.exists())
    # Everything that may be refused comes before earlier rows are moved.
    smooth = trained(path, args, device) if resume else untrained(args, device)
    loss_schedule(args)
    with reserved(args, "certificates", resume=resume):
        facts = provenance(Path(__file__).stem, args, argv) | {"sigma": args.sigma}
        if resume:
            made = smooth.base_classifier.facts
            trained_by = [made.get("command"), made.get("commit")]
            facts |= {"seconds": made.get("seconds"), "trained": trained_by}
            print(f"Using {path}, which is not trained again")
        else:
            history = train(smooth, *training, args)
            facts |= {"seconds": history["epochs"][-1]["seconds"]}
        if is_main():
            title = figure_title(args.name, TITLE, NAME)
            output = Output(args.name, title, facts, args.results, args.figures)
            if not resume:
                save_checkpoint(path, smooth.base_classifier, **facts)
                print(f"Saved {path}")
                words = f"{title}, $\\sigma$ = {args.sigma:g}"
                plot_training(history, output.figure("curves"), words)
            with when_interrupted("The checkpoint and finished rows are kept; add --resume."):
                report_smoothing(
                    smooth,
                    test,
                    output,
                    images=50 if args.quick else 1000,
                    indices=range(0, len(test), args.every),
                    n=args.n,
                    alpha=ALPHA,
                    seed=args.seed,
                    resume=resume,
                )
            print(f"Figures in {args.figures}/, rows in {args.results}/")


def trained(path, args, device):
    """The smoothed classifier of an earlier run; ValueError if other options trained it."""
    network = load_checkpoint(path, device)
    # Older checkpoints lack these options, which then had no other value.
    older = {"optimizer": "adamw", "warp": 0, "weight_decay": 0.01}
    was, now = older | network.facts.get("options", {}), vars(args)
    # In older checkpoints --precision was that of the training.
    was.setdefault("training_precision", was.get("precision"))
    different = [name for name in TRAINING if was.get(name) != now[name]]
    if different:
        trained_with = ", ".join(f"{name} = {was.get(name)}" for name in different)
        raise ValueError(
            f"{path} was trained with {trained_with}, which is not what the options say; "
            "give the same options, or leave out --resume to train again."
        )
    return SmoothClassifier(network, args.sigma, precision=args.precision)


def untrained(args, device):
    """The smoothed classifier before its training."""
    network = ConvNN(args.channels, args.hidden)
    smooth = SmoothClassifier(network, args.sigma, precision=args.precision).to(device)
    # Refuse a precision that the device lacks before the training, not after it.
    network.inference_form(smooth.precision)
    return smooth


def loss_schedule(args):
    """The loss as a function of the progress of the training, as the options say."""
    return smoothing_loss_schedule(
        args.method,
        attack_draws=args.attack_draws,
        epsilon=args.epsilon,
        consistency=args.consistency,
        confidence=args.confidence,
    )


def train(smooth, images, held_out, args):
    """Train the base classifier as the options say; returns the history of its training."""
    print(
        f"Training of ConvNN {args.channels} under noise of sigma = {args.sigma:g}, "
        f"{args.method}, on {len(images):,} images"
    )
    return train_model(
        smooth,
        images,
        loss_schedule=loss_schedule(args),
        recorded=True,
        # On one noisy draw per image.
        watch=lambda model: {"clean": accuracy(model, held_out)},
        **training_arguments(args),
    )


def option_parser():
    parser = script_parser(__doc__, "python main_random_smoothing.py --sigma 0.25 --name quarter")
    training_options(parser, name=NAME, epochs=12)
    add = parser.adder("training")
    noise = number(high=10, with_high=True)
    add("--sigma", type=noise, default=0.5, help="standard deviation of the noise, pixel units")
    add("--method", choices=METHODS, default="gaussian", help="what the loss adds to noise")
    add("--consistency", type=number(), help="weight of Consistency; default: the method's")
    weight = "power of the weight of an image; default: the method's"
    add("--confidence", type=number(), help=weight)
    add = parser.adder("attack")
    step = "l2 length of the SmoothAdv step, pixel units; default: the method's"
    add("--epsilon", type=number(high=28, with_high=True), help=step)
    add("--attack-draws", type=count(), help="draws that the SmoothAdv step sees; default: all")
    add = parser.adder("certification")
    add("--every", type=count(), default=100, help="certify every N-th test image")
    add("--n", type=count(), default=10_000, help="noisy copies that bound a probability")
    votes = "arithmetic of the votes; default: exact on a CPU, else float32"
    add("--precision", choices=PRECISIONS, help=votes)
    resume = "take the checkpoint of --name if it is there, and go on with its interrupted rows"
    parser.adder("run")("--resume", action="store_true", help=resume)
    return parser


if __name__ == "__main__":
    run(main)
