"""What whole numbers change: accuracy in float32 and exact, on clean images and at one noisy draw.

All 10,000 test images, every committed network. The noise is what the certificates of seed 0 would
draw as the first copy of PREDICT; networks that were not trained under noise are judged clean only.

Run: python -m benchmarks.exact --rows results/exact.csv
"""

import argparse
from pathlib import Path

import torch

from src.checkpoints import load_checkpoint
from src.engine.noise import Noise, to_grid
from src.records.rows import write_rows
from src.reports.tables import format_table
from src.utils import load_mnist


def noisy_draw(steps, sigma):
    """One noisy copy of every image, in steps of the grid."""
    noises = (Noise(0, index, sigma) for index in range(len(steps)))
    pairs = zip(steps, noises, strict=True)
    return torch.cat([noise.copies(image, "predict", 0, 1) for image, noise in pairs])


@torch.no_grad()
def compared(path, steps, labels):
    """The rows of one network: one for clean images, one for noisy ones."""
    network = load_checkpoint(path)
    forms = {name: network.inference_form(name) for name in ("float32", "exact")}
    sigmas = [0.0, network.facts["sigma"]] if "sigma" in network.facts else [0.0]
    rows = []
    for sigma in sigmas:
        images = (noisy_draw(steps, sigma) if sigma else steps).float() / 255
        found = {
            name: torch.cat([form(part).argmax(1) for part in images.split(500)])
            for name, form in forms.items()
        }
        right = {name: int((classes == labels).sum()) for name, classes in found.items()}
        other = int((found["float32"] != found["exact"]).sum())
        rows.append({"model": path.stem, "sigma": sigma, "images": len(labels)})
        rows[-1] |= {"float32": right["float32"], "exact": right["exact"], "changed": other}
    return rows


def exact_lines(rows):
    """The table of these rows."""
    lines = []
    for row in rows:
        images = int(row["images"])
        shares = [f"{100 * int(row[key]) / images:.2f}" for key in ("float32", "exact", "changed")]
        gain = 100 * (int(row["exact"]) - int(row["float32"])) / images
        lines.append((row["model"], f"{float(row['sigma']):g}", *shares[:2], f"{gain:+.2f}"))
        lines[-1] += (shares[2],)
    header = ("network", "noise", "float32 %", "exact %", "difference", "answers changed %")
    return format_table(header, lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--models", type=Path, default=Path("reference/models"))
    parser.add_argument("--rows", type=Path, default=Path("results/exact.csv"))
    args = parser.parse_args()
    images, labels = load_mnist("test").tensors
    steps, _ = to_grid(images)
    rows = []
    for path in sorted(args.models.glob("*.pt")):
        rows += compared(path, steps, labels)
        print(exact_lines(rows[-2:]), flush=True)
    write_rows(args.rows, rows)
    print(exact_lines(rows))


if __name__ == "__main__":
    main()
