"""Standard training of ConvNN on MNIST, then its accuracy on clean and attacked images.

Writes models/standard_training.pt, results/standard_training_attacks.csv,
results/standard_training_smallest_epsilons.csv and figures.
"""

from pathlib import Path

from src.checkpoints import save_checkpoint
from src.command_line import parse, reserved, run, script_parser, training_options
from src.models import ConvNN
from src.optimisation.processes import is_main
from src.provenance import provenance
from src.reports.one_model import figure_title, report_attacks
from src.reports.plotting import plot_training
from src.training_and_evaluation import accuracy, train_model
from src.utils import get_device, load_training_data, seed_everything

NAME, TITLE = "standard_training", "Standard training"


def main(argv=None):
    parser = script_parser(__doc__, "python main_training.py --epochs 20 --name longer")
    training_options(parser, name=NAME, epochs=12)
    args = parse(parser, argv, epochs=1)
    device = get_device(args.device)
    seed_everything(args.seed)
    train, held_out, test = load_training_data(args.data, args.held_out, quick=args.quick)

    with reserved(args, "attacks", "smallest_epsilons"):
        # Before the training: the commit may change while it runs.
        facts = provenance(Path(__file__).stem, args, argv)
        print(f"Standard training of ConvNN {args.channels} on {len(train):,} images, {device}")
        model = ConvNN(args.channels, args.hidden).to(device)
        history = train_model(
            model,
            train,
            epochs=args.epochs,
            batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            weight_decay=args.weight_decay,
            shift=args.shift,
            warp=args.warp,
            precision=args.training_precision,
            optimizer=args.optimizer,
            seed=args.seed,
            watch=lambda model: {"clean": accuracy(model, held_out)},
        )
        if is_main():
            facts |= {"seconds": history["epochs"][-1]["seconds"]}
            report(model, history, test, args, facts)


def report(model, history, test, args, facts):
    """Save the model, then draw, evaluate and write what is known of it."""
    path = save_checkpoint(Path(args.models) / f"{args.name}.pt", model, **facts)
    title = figure_title(args.name, TITLE, NAME)
    plot_training(history, Path(args.figures) / f"{args.name}_curves.png", title)
    test_accuracy = accuracy(model, test)
    print(f"Test accuracy: {test_accuracy:.2%} of {len(test):,} images; saved {path}")
    report_attacks(
        model,
        test,
        name=args.name,
        title=title,
        figures=args.figures,
        results=args.results,
        facts=facts | {"test_accuracy": test_accuracy},
        images=100 if args.quick else 1000,
        curve_images=50 if args.quick else 500,
        steps=4 if args.quick else 40,
    )
    print(f"Figures in {args.figures}/, rows in {args.results}/")


if __name__ == "__main__":
    run(main)
