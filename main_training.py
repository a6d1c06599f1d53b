"""Standard training: 99.4 % of clean test images, none under PGD at linf 0.2.

Command: python main_training.py

Trains ConvNN on MNIST and attacks it. Writes
models/standard_training.pt, results/standard_training_attacks.csv,
results/standard_training_smallest_epsilons.csv and figures.
"""

from pathlib import Path

from src.checkpoints import save_checkpoint
from src.command_line import (
    number,
    parse,
    reserved,
    run,
    script_parser,
    training_arguments,
    training_options,
)
from src.models import ConvNN
from src.optimisation.processes import is_main
from src.provenance import provenance
from src.reports.one_model import report_attacks
from src.reports.output import Output, figure_title
from src.reports.plotting import plot_training
from src.training_and_evaluation import accuracy, train_model
from src.utils import get_device, load_training_data, seed_everything

NAME, TITLE = "standard_training", "Standard training"


def main(argv=None):
    args = parse(option_parser(), argv, epochs=1)
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
            output = Output(args.name, title, facts, args.results, args.figures)
            plot_training(history, output.figure("curves"), title)
            report_attacks(model, test, output, quick=args.quick)
            print(f"Figures in {args.figures}/, rows in {args.results}/, model in {args.models}/")


def train(model, images, held_out, args):
    """Train the network as the options say; returns the history of its training."""
    device = next(model.parameters()).device
    print(f"Standard training of ConvNN {args.channels} on {len(images):,} images, {device}")
    return train_model(
        model,
        images,
        watch=lambda model: {"clean": accuracy(model, held_out)},
        **training_arguments(args),
    )


def option_parser():
    parser = script_parser(__doc__, "python main_training.py --epochs 20 --name longer")
    training_options(parser, name=NAME, epochs=12)
    cuts = "pixels become 0 up to the first, 1 from the second on; default: left as they are"
    unit = number(0, 1, with_low=True, with_high=True)
    parser.adder("training")("--thresholds", type=unit, nargs=2, help=cuts)
    return parser


if __name__ == "__main__":
    run(main)
