"""Training of the base classifier of a SmoothClassifier under Gaussian noise on MNIST.

--method adds to the cross-entropy under noise what SmoothAdv and Consistency add, and may weight
images by confidence. Reports the accuracy of the base and of the smoothed classifier and a first
certified-accuracy curve. Writes models/randomized_smoothing.pt,
results/randomized_smoothing_certificates.csv and figures.
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
    training_options,
    when_interrupted,
)
from src.engine.parts import PRECISIONS
from src.methods.smoothing import METHODS, smoothing_loss_schedule
from src.models import ConvNN, SmoothClassifier
from src.optimisation.processes import from_main, is_main
from src.provenance import provenance
from src.reports.one_model import figure_title, report_smoothing
from src.reports.plotting import plot_training
from src.training_and_evaluation import accuracy, train_model
from src.utils import get_device, load_training_data, seed_everything

NAME, TITLE = "randomized_smoothing", "Randomized smoothing"
ALPHA = 0.001  # Failure odds of one certificate.
# The options that a checkpoint is the outcome of.
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
    with reserved(args, "certificates", resume=resume):
        facts = provenance(Path(__file__).stem, args, argv) | {"sigma": args.sigma}
        if resume:
            smooth = trained(path, args, device)
            made = smooth.base_classifier.facts
            facts |= {"seconds": made["seconds"], "trained": [made["command"], made["commit"]]}
            print(f"Going on with {path}, which is not trained again")
        else:
            smooth, history = train(*training, args, device)
            facts |= {"seconds": history["epochs"][-1]["seconds"]}
        if is_main():
            if not resume:
                save(path, smooth, history, args, facts)
            with when_interrupted("The checkpoint and finished rows are kept; add --resume."):
                report(smooth, test, args, facts, resume=resume)


def save(path, smooth, history, args, facts):
    """Save the base classifier, then draw its training."""
    save_checkpoint(path, smooth.base_classifier, **facts)
    print(f"Saved {path}")
    curves = Path(args.figures) / f"{args.name}_curves.png"
    title = figure_title(args.name, TITLE, NAME)
    plot_training(history, curves, f"{title}, $\\sigma$ = {args.sigma:g}")


def report(smooth, test, args, facts, *, resume):
    """Certify test images; print, write and draw what is known of the smoothed classifier."""
    report_smoothing(
        smooth,
        test,
        name=args.name,
        title=figure_title(args.name, TITLE, NAME),
        figures=Path(args.figures),
        results=Path(args.results),
        facts=facts,
        images=50 if args.quick else 1000,
        indices=range(0, len(test), args.every),
        n=args.n,
        alpha=ALPHA,
        seed=args.seed,
        resume=resume,
    )
    print(f"Figures in {args.figures}/, rows in {args.results}/")


def trained(path, args, device):
    """The smoothed classifier of an earlier run.

    Raises:
        ValueError: if it was trained with other options.
    """
    network = load_checkpoint(path, device)
    # Older checkpoints know of no other optimizer or weight decay and of no warps.
    older = {"optimizer": "adamw", "warp": 0, "weight_decay": 0.01}
    was, now = older | network.facts.get("options", {}), vars(args)
    # Their --precision was that of the training, which has an option of its own now.
    was.setdefault("training_precision", was.get("precision"))
    different = [name for name in TRAINING if was.get(name) != now[name]]
    if different:
        trained_with = ", ".join(f"{name} = {was.get(name)}" for name in different)
        raise ValueError(
            f"{path} was trained with {trained_with}, which is not what the options say; "
            "give the same options, or leave out --resume to train again."
        )
    return SmoothClassifier(
        network, args.sigma, precision=args.precision or args.training_precision
    )


def train(images, held_out, args, device):
    """The smoothed classifier trained as the options say, and the history of its training."""
    print(
        f"Training of ConvNN {args.channels} under noise of sigma = {args.sigma:g}, "
        f"{args.method}, on {len(images):,} images, {device}"
    )
    network = ConvNN(args.channels, args.hidden)
    precision = args.precision or args.training_precision
    smooth = SmoothClassifier(network, args.sigma, precision=precision).to(device)
    # Refuses a precision that the device lacks now, not after the training.
    network.inference_form(precision)
    history = train_model(
        smooth,
        images,
        loss_schedule=smoothing_loss_schedule(
            args.method,
            attack_draws=args.attack_draws,
            epsilon=args.epsilon,
            consistency=args.consistency,
            confidence=args.confidence,
        ),
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        shift=args.shift,
        warp=args.warp,
        precision=args.training_precision,
        optimizer=args.optimizer,
        recorded=True,
        seed=args.seed,
        # One noisy draw per image: what the smoothed classifier averages over.
        watch=lambda model: {"clean": accuracy(model, held_out)},
    )
    return smooth, history


def option_parser():
    parser = script_parser(__doc__, "python main_random_smoothing.py --sigma 0.25 --name quarter")
    training_options(parser, name=NAME, epochs=12)
    add = parser.about("training")
    noise = number(high=10, with_high=True)
    add("--sigma", type=noise, default=0.5, help="standard deviation of the noise, pixel units")
    add("--method", choices=METHODS, default="gaussian", help="of training under noise")
    add("--consistency", type=number(), help="weight of Consistency; default: the method's")
    weight = "power of the weight of an image; default: the method's"
    add("--confidence", type=number(), help=weight)
    add = parser.about("attack")
    step = "l2 length of the SmoothAdv step, pixel units; default: the method's"
    add("--epsilon", type=number(high=28, with_high=True), help=step)
    add("--attack-draws", type=count(), help="draws that the SmoothAdv step sees; default: all")
    add = parser.about("certification")
    add("--every", type=count(), default=100, help="certify every N-th test image")
    add("--n", type=count(), default=10_000, help="noisy copies that bound a probability")
    votes = "of the network that votes and is certified; default: that of the training"
    add("--precision", choices=PRECISIONS, help=votes)
    resume = "take the checkpoint of --name if it is there, and go on with its interrupted rows"
    parser.about("run")("--resume", action="store_true", help=resume)
    return parser


if __name__ == "__main__":
    run(main)
