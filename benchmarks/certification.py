"""Certification side by side: the textbook loop, floats, whole numbers, their limit, older code.

The textbook loop takes one image at a time through the unchanged network in float32: batches of
400 copies, torch.randn, argmax, counts. The limit of whole numbers is what the machine could do if
all products ran at the measured peak of its instructions for dot products, and noise were drawn
without a pause. With --against an older checkout of this repository votes in int8 in a process of
its own. All ways alternate in one run; medians are printed.

Run: git worktree add ../before c98b53c
     python -m benchmarks.certification --against ../before
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from src.engine.exact_native import draw_copies, exact_library
from src.engine.native import compiled
from src.engine.noise import Noise
from src.engine.votes import single_threaded_workers
from src.models import ConvNN, SmoothClassifier
from src.utils import load_mnist, seed_everything

NETWORKS = {
    "16-32, default": {"channels": (16, 32)},
    "32-64": {"channels": (32, 64)},
    "32-64, hidden 256": {"channels": (32, 64), "hidden": 256},
}
# What the older checkout runs: seconds for each line "options of the network, n" that it reads.
OLDER = """
import json, sys, time, torch
from src.models import ConvNN, SmoothClassifier
for line in sys.stdin:
    options, n = json.loads(line)
    torch.manual_seed(0)
    smooth = SmoothClassifier(ConvNN(**options).eval(), 0.5, precision="int8")
    image = torch.rand((1, 28, 28), generator=torch.Generator().manual_seed(0))
    smooth.certify(image, 100, 1000)
    start = time.perf_counter()
    smooth.certify(image, 100, n)
    print(time.perf_counter() - start, flush=True)
"""


def textbook(network, image, sigma, n0, n, batch=400):
    """Counts of CERTIFY's two stages as the published loop takes them."""
    counts = []
    for total in (n0, n):
        count = np.zeros(10, int)
        with torch.no_grad():
            for start in range(0, total, batch):
                copies = image.repeat((min(batch, total - start), 1, 1, 1))
                votes = network(copies + torch.randn_like(copies) * sigma).argmax(1)
                for vote in votes.numpy():
                    count[vote] += 1
        counts.append(count)
    return counts


def dot_products(options, lanes):
    """Instructions for the products of one image, of four 8-bit or two 16-bit numbers a lane.

    Products with the padding do not count.
    """
    (first, second), hidden = options["channels"], options.get("hidden")
    inside = (14 * 5 - 3) ** 2 * first + (7 * 5 - 3) ** 2 * first * second
    inside += 49 * second * (hidden or 0)
    return inside / (4 * lanes) + 10 * (hidden or 49 * second) / (2 * lanes)


def rate(task, amount, seconds=1.0):
    """`amount` a second while all cores repeat `task`, all cores added up."""

    def repeat(_):
        done, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            task()
            done += 1
        return done * amount / (time.perf_counter() - start)

    with single_threaded_workers() as workers:
        return sum(workers.map(repeat, range(workers.number)))


def limits():
    """What measures dot products and noisy copies a second, and the numbers that a vector holds."""
    peak = compiled(str(Path(__file__).with_name("peak.c").resolve())).peak
    peak.argtypes = [ctypes.c_int64]
    library, steps = exact_library(), torch.zeros((1, 28, 28), dtype=torch.int32)
    draw = partial(draw_copies, library, steps, Noise(0, 0, 0.5), 1, 0, 500)
    draw()
    dots = partial(rate, lambda: peak(100_000), 8e5, 0.2)
    return dots, partial(rate, draw, 500, 0.2), library.lanes()


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def older_checkout(folder):
    """A function (options of a network, n) -> seconds of the checkout in `folder`."""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    # Our own folder must not come first.
    command = [sys.executable, "-P", "-c", OLDER]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=folder, env=environment, **pipes)

    def ask(options, n):
        print(json.dumps([options, n]), file=process.stdin, flush=True)
        return float(process.stdout.readline())

    return ask


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--n", type=int, default=20_000, help="copies per image")
    parser.add_argument("--repeat", type=int, default=5, help="alternations")
    parser.add_argument("--against", type=Path, help="an older checkout that has int8")
    args = parser.parse_args()
    image = load_mnist("test").tensors[0][:1]
    dots, drawn, lanes = limits()
    print(f"{torch.get_num_threads()} threads on {os.cpu_count()} cores, n = {args.n:,}")
    older = older_checkout(args.against) if args.against else None
    for name, options in NETWORKS.items():
        seed_everything(0)
        network = ConvNN(**options).eval()
        ways = {"textbook": partial(textbook, network, image[0], 0.5, 100, args.n)}
        for precision in ("float32", "exact"):
            smooth = SmoothClassifier(network, 0.5, precision=precision)
            ways[precision] = partial(smooth.certify, image, 100, args.n)
        rounds = []
        for _ in range(args.repeat + 1):
            took = {way: seconds(call) for way, call in ways.items()}
            if older:
                took["older int8"] = older(options, args.n)
            rates = {way: (args.n + 100) / value for way, value in took.items()}
            rates["the limit"] = 1 / (dot_products(options, lanes) / dots() + 1 / drawn())
            rounds.append(rates)
        # The first round prepares what the others use.
        report(name, rounds[1:])


def report(name, rounds):
    """Print the median of every rate, and of every ratio within a round."""
    found = {way: statistics.median(rates[way] for rates in rounds) for way in rounds[0]}
    print(f"{name}: " + ", ".join(f"{way} {rate:,.0f}/s" for way, rate in found.items()))
    ratios = {
        way: statistics.median(rates["exact"] / rates[way] for rates in rounds) for way in found
    }
    words = ", ".join(f"{ratio:.2f} times {way}" for way, ratio in ratios.items() if way != "exact")
    print(f"  exact is {words}", flush=True)


if __name__ == "__main__":
    main()
