"""Time to 99.2 % test accuracy: the loop of most tutorials against `train_model`.

The plain loop has a DataLoader that turns stored images into tensors one by one, float32, Adam at
1e-3, batches of 64; it is stopped at the first epoch that reaches the target, or at --most epochs.
Ours trains for the number of epochs in --epochs, after which it must have reached the target;
both train the same ConvNN on all 60,000 images. Only training is timed, not the tests after each
epoch. The test set sets the finishing line here, it chooses no model.

Run: python -m benchmarks.training
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor

from src.files import in_repository
from src.models import ConvNN
from src.training_and_evaluation import accuracy, train_model
from src.utils import load_mnist, seed_everything

TARGET = 0.992


def plain(test, most):
    """(seconds, epochs, accuracy) of the plain loop."""
    folder = in_repository("data")
    loader = DataLoader(MNIST(folder, train=True, transform=ToTensor()), 64, shuffle=True)
    model = ConvNN()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    spent = 0.0
    epoch = reached = 0
    while epoch < most and reached < TARGET:
        epoch += 1
        start = time.perf_counter()
        model.train()
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        spent += time.perf_counter() - start
        reached = accuracy(model, test)
    return spent, epoch, reached


def here(train, test, epochs, seed):
    """(seconds, epochs, accuracy) of `train_model`."""
    model = ConvNN()
    start = time.perf_counter()
    train_model(model, train, epochs=epochs, seed=seed, progress=False)
    return time.perf_counter() - start, epochs, accuracy(model, test)


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--epochs", type=int, default=5, help="of train_model")
    parser.add_argument("--most", type=int, default=15, help="epochs of the plain loop")
    parser.add_argument("--repeat", type=int, default=5, help="alternations, a seed each")
    args = parser.parse_args()
    train, test = load_mnist("train"), load_mnist("test")
    pairs = []
    for seed in range(args.repeat):
        seed_everything(seed)
        pairs.append((plain(test, args.most), here(train, test, args.epochs, seed)))
        for name, (spent, epochs, reached) in zip(("plain", "here "), pairs[-1], strict=True):
            short = "" if reached >= TARGET else ", short of the target"
            line = f"seed {seed} {name} {spent:6.1f} s, {epochs:2d} epochs, {reached:.2%}{short}"
            print(line, flush=True)
    times = [statistics.median(pair[side][0] for pair in pairs) for side in (0, 1)]
    ratio = statistics.median(pair[0][0] / pair[1][0] for pair in pairs)
    print(f"median: plain {times[0]:.1f} s, here {times[1]:.1f} s, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
