"""Certification side by side: the textbook loop against SmoothClassifier, and the limit.

The textbook loop takes one image at a time through the unchanged network in float32: batches of
400 copies, torch.randn, argmax, counts. The limit is what the machine could do if arithmetic ran
at the rate of its best matrix product and noise were drawn at the rate of torch's generator, on
all cores, one after the other on each; integers of 8 bits may go beyond it. Votes in float32 and
in int8 alternate with the textbook in one run; medians are printed.

Run: python -m benchmarks.certification
"""

import argparse
import os
import statistics
import time
from functools import partial

import numpy as np
import torch

from src.engine.votes import single_threaded_workers
from src.models import ConvNN, SmoothClassifier
from src.utils import load_mnist, seed_everything

NETWORKS = {
    "16-32, default": {"channels": (16, 32)},
    "32-64": {"channels": (32, 64)},
    "32-64, hidden 256": {"channels": (32, 64), "hidden": 256},
}
PRECISIONS = ("float32", "int8")


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


def operations(network):
    """Floating-point operations of one image, a multiplication and an addition each."""
    linear = sum(m.weight.numel() for m in network.modules() if isinstance(m, torch.nn.Linear))
    convolutions = 14**2 * network.conv1.weight.numel() + 7**2 * network.conv2.weight.numel()
    return 2 * (linear + convolutions)


def rate(task, amount, seconds=1.0):
    """`amount` a second and a core while all cores repeat `task`, all cores added up."""

    def repeat(_):
        done, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            task()
            done += 1
        return done * amount / (time.perf_counter() - start)

    with single_threaded_workers() as workers:
        return sum(workers.map(repeat, range(workers.number)))


def matrix_rate(dtype):
    """Floating-point operations a second of the matrix product, all cores."""
    a, b = torch.randn(768, 768).to(dtype), torch.randn(768, 768).to(dtype)
    return rate(lambda: a @ b, 2 * 768**3)


def normal_rate():
    """Images of 784 normals a second, all cores, each with a generator of its own."""
    return rate(lambda: torch.empty(128, 784).normal_(generator=torch.Generator()), 128)


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--n", type=int, default=20_000, help="copies an image")
    parser.add_argument("--repeat", type=int, default=5, help="alternations")
    args = parser.parse_args()
    image = load_mnist("test").tensors[0][:1]
    matrix = {d: matrix_rate(getattr(torch, d)) for d in ("float32", "bfloat16")}
    normals = normal_rate()
    print(f"{torch.get_num_threads()} threads on {os.cpu_count()} cores, n = {args.n:,}")
    print(", ".join(f"{d} matrix product {r / 1e9:.0f} GFLOP/s" for d, r in matrix.items()))
    print(f"normals for {normals:,.0f} images/s")
    for name, options in NETWORKS.items():
        seed_everything(0)
        network = ConvNN(**options).eval()
        ways = {"textbook": partial(textbook, network, image[0], 0.5, 100, args.n)}
        for precision in PRECISIONS:
            smooth = SmoothClassifier(network, 0.5, precision=precision)
            ways[precision] = partial(smooth.certify, image, 100, args.n)
        times = [{way: seconds(call) for way, call in ways.items()} for _ in range(args.repeat + 1)]
        # The first round prepares what the others use.
        rates = {way: (args.n + 100) / statistics.median(t[way] for t in times[1:]) for way in ways}
        limit = 1 / (operations(network) / max(matrix.values()) + 1 / normals)
        for precision in PRECISIONS:
            ratio = statistics.median(t["textbook"] / t[precision] for t in times[1:])
            print(
                f"{name:18s} textbook {rates['textbook']:7,.0f}/s, here {rates[precision]:7,.0f}/s "
                f"in {precision}, ratio {ratio:.2f}, {rates[precision] / limit:.0%} of the limit "
                f"{limit:,.0f}/s",
                flush=True,
            )


if __name__ == "__main__":
    main()
