"""Updates a second of training under noise on CUDA, with its gradients recorded as a graph and not.

The network and method of the best model at sigma = 0.5, two epochs a run, of which the second is
timed; recorded and plain runs take turns, medians of --repeat of each.

Run: python -m benchmarks.recorded
"""

import argparse
import statistics

from src.command_line import count, run
from src.methods.smoothing import smoothing_loss_schedule
from src.models import ConvNN, SmoothClassifier
from src.training_and_evaluation import train_model
from src.utils import get_device, load_mnist, seed_everything


def updates_a_second(dataset, recorded: bool) -> float:
    seed_everything(0)
    smooth = SmoothClassifier(ConvNN(channels=(32, 64), hidden=256), 0.5).to("cuda")
    history = train_model(
        smooth,
        dataset,
        epochs=2,
        loss_schedule=smoothing_loss_schedule(
            "smoothadv-consistency", attack_draws=1, epsilon=0.8, consistency=2
        ),
        shift=0,
        warp=0.1,
        precision="bfloat16",
        optimizer="muon",
        recorded=recorded,
        progress=False,
    )
    first, second = (epoch["seconds"] for epoch in history["epochs"])
    return len(history["step_loss"]) / 2 / (second - first)


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--repeat", type=count(), default=5, help="runs of each")
    parser.add_argument("--data", help="folder of MNIST; default: data/ of the repository")
    args = parser.parse_args()
    get_device("cuda")  # Says that there is none, if so.
    dataset = load_mnist("train", args.data)
    rates = {True: [], False: []}
    for _ in range(args.repeat):
        for graph, found in rates.items():
            found.append(updates_a_second(dataset, graph))
    recorded, plain = (statistics.median(found) for found in rates.values())
    print(f"recorded {recorded:.0f} updates/s, plain {plain:.0f}/s, ratio {recorded / plain:.2f}")


if __name__ == "__main__":
    run(main)
