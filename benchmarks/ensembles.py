"""What an ensemble costs: votes of three networks as one beside those of each, in one run.

The three seeds of each best smoothed model. All alternate; the ratio is the median over the rounds
of the ensemble's seconds to the mean of its members'.

Run: python -m benchmarks.ensembles
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from src.checkpoints import load_checkpoint
from src.command_line import count, run
from src.models import Ensemble, SmoothClassifier
from src.utils import load_mnist

MODELS = Path("reference/models")
SIGMAS = (0.25, 0.5, 1.0)


def seconds(smooth, image, n):
    start = time.perf_counter()
    smooth.certify(image, 100, n)
    return time.perf_counter() - start


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--n", type=count(), default=20_000, help="copies per image")
    parser.add_argument("--repeat", type=count(), default=7, help="rounds")
    args = parser.parse_args(argv)
    image = load_mnist("test").tensors[0][:1]
    print(f"{torch.get_num_threads()} threads, n = {args.n:,}, medians of {args.repeat} rounds")
    for sigma in SIGMAS:
        names = [f"smoothing_best_{sigma:.2f}{seed}.pt" for seed in ("", "_seed1", "_seed2")]
        members = [load_checkpoint(MODELS / name) for name in names]
        networks = [*members, Ensemble(members).eval()]
        smooth = [SmoothClassifier(network, sigma) for network in networks]
        rounds = [[seconds(one, image, args.n) for one in smooth] for _ in range(args.repeat + 1)]
        # The first round prepares what the others use.
        ratios = [took[-1] / statistics.mean(took[:-1]) for took in rounds[1:]]
        print(f"sigma = {sigma:g}: {statistics.median(ratios):.2f} times the time of one")


if __name__ == "__main__":
    run(main)
