"""Which two-convolution network is the most accurate for the same seconds of training?

Trains each candidate for the same wall time under noise (sigma = 0.5, the hardest of the three
default trainings) and prints its held-out accuracy at one noisy draw, and how many noisy copies
it classifies a second, which is what certificates cost. Run: python -m benchmarks.architectures
"""

import argparse
import time

import torch
from torch import nn

from src.models import SmoothClassifier
from src.training_and_evaluation import accuracy, train_model
from src.utils import hold_out, load_mnist, seed_everything, subset

# Name -> widths, kernel, and whether pooling (or else stride 2) halves the image.
CANDIDATES = {
    "strided 16-32 5x5 (ConvNN's default)": ((16, 32), 5, False),
    "strided 16-32 4x4": ((16, 32), 4, False),
    "strided 16-32 3x3": ((16, 32), 3, False),
    "strided 32-64 5x5": ((32, 64), 5, False),
    "pooled 16-32 5x5": ((16, 32), 5, True),
    "pooled 8-16 5x5": ((8, 16), 5, True),
}


def network(channels, kernel, pooled):
    """Two convolutions with batch normalisation, 28 -> 14 -> 7, and a linear output."""
    layers, width = [], 1
    for channel in channels:
        stride, padding = (1, kernel // 2) if pooled else (2, (kernel - 1) // 2)
        layers += [nn.Conv2d(width, channel, kernel, stride, padding, bias=False)]
        layers += [nn.BatchNorm2d(channel), nn.ReLU()] + [nn.MaxPool2d(2)] * pooled
        width = channel
    layers += [nn.Flatten(), nn.Linear(width * 7 * 7, 10)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def seconds(call, repeat=5):
    """Median wall time of a call."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeat // 2]


def measure(settings, train, held_out, budget, seed):
    """(epochs that fit into the budget, held-out accuracy, copies a second)."""
    seed_everything(seed)
    trial = SmoothClassifier(network(*settings), 0.5)
    few = subset(train, range(8 * 256))
    per_epoch = seconds(lambda: train_model(trial, few, epochs=1, progress=False))
    epochs = max(round(budget / per_epoch / (len(train) / len(few))), 1)
    seed_everything(seed)
    smooth = SmoothClassifier(network(*settings), 0.5)
    train_model(smooth, train, epochs=epochs, seed=seed, progress=False)
    score = sum(accuracy(smooth, held_out) for _ in range(4)) / 4
    base, copies = smooth.base_classifier.eval(), held_out.tensors[0][:512]
    with torch.inference_mode():
        rate = len(copies) / seconds(lambda: base(copies), 15)
    return epochs, score, rate


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=30, help="of training, a candidate")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each candidate")
    args = parser.parse_args()
    train, held_out = hold_out(load_mnist("train"), 5000)
    for name, settings in CANDIDATES.items():
        results = [
            measure(settings, train, held_out, args.seconds, seed) for seed in range(args.seeds)
        ]
        epochs, scores, rates = zip(*results, strict=True)
        print(
            f"{name:38s} {epochs[0]:3d} epochs, held-out accuracy at sigma = 0.5: "
            f"{', '.join(f'{score:.2%}' for score in scores)}, {min(rates):,.0f} copies/s",
            flush=True,
        )


if __name__ == "__main__":
    main()
