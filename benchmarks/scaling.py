"""Certification by two processes of one thread each against one process of one thread.

Both certify the same images with the same seed through torchrun, as main_compare.py does, and
must arrive at the same votes. The time of certification proper, from the moment all processes are
ready until the last is done, and that of the whole command are compared; both sides alternate.

Run: python -m benchmarks.scaling
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

import torch

from src.models import ConvNN, SmoothClassifier
from src.optimisation.processes import process_count, process_group, rank, wait_for_all
from src.utils import load_mnist, seed_everything


def work(images, n):
    """One process's share; the first prints the seconds that all took and the sum of its votes."""
    seed_everything(0)
    smooth = SmoothClassifier(ConvNN().eval(), 0.5)
    mine = range(rank() * 20, images * 20, process_count() * 20)
    test = load_mnist("test").tensors[0][list(mine)]
    smooth.certify(test[:1], n=2000, indices=[0])
    wait_for_all()
    start = time.perf_counter()
    votes = smooth.certify(test, n=n, indices=mine).top_count.sum()
    wait_for_all()
    seconds = time.perf_counter() - start
    if process_count() > 1:
        torch.distributed.all_reduce(votes)
    print(f"{seconds} {int(votes)}")


def measured(count, images, n):
    """(seconds of certification, seconds of the command, votes) with `count` processes."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}"]
    command += ["--standalone", "-m", "--", "benchmarks.scaling", "--work"]
    command += ["--images", str(images), "--copies", str(n)]
    start = time.perf_counter()
    ended = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, votes = ended.stdout.split()
    return float(seconds), time.perf_counter() - start, int(votes)


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--copies", type=int, default=20_000, help="n of each image")
    parser.add_argument("--repeat", type=int, default=5, help="alternations")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        with process_group():
            work(args.images, args.copies)
        return
    pairs = [
        [measured(count, args.images, args.copies) for count in (1, 2)] for _ in range(args.repeat)
    ]
    if len({votes for pair in pairs for *_, votes in pair}) != 1:
        sys.exit("error: the votes differ between one process and two")
    for side, name in enumerate(("certification", "whole command")):
        one, two = (statistics.median(pair[k][side] for pair in pairs) for k in (0, 1))
        ratio = statistics.median(pair[0][side] / pair[1][side] for pair in pairs)
        print(f"{name}: one process {one:.1f} s, two {two:.1f} s, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
