"""How many draws the anytime certificate at one radius takes, against the fixed n of the rows.

For each reference model and radius: `SmoothClassifier.certify_radius` on the images of the
committed rows, with the same alpha and seed; its mean number of draws an image, those that choose
the class included, and the share of images certified and correct, beside that of the rows (n0 +
n draws each).

Run: python -m benchmarks.stopping
"""

import argparse
import json
from pathlib import Path

from src.certification.intervals import certified_accuracy
from src.checkpoints import load_checkpoint
from src.models import SmoothClassifier
from src.records.rows import read_rows
from src.reports.tables import format_table
from src.utils import load_mnist, subset

# sigma and radius, in pixel units.
QUESTIONS = ((0.25, 0.5), (0.5, 1.0), (0.5, 1.5), (1.0, 2.0))


def compared(sigma: float, radius: float, reference: Path, every: int) -> tuple[str, ...]:
    """One line of the table; `every` leaves out all but every so many of the rows."""
    name = f"smoothing_best_{sigma:.2f}"
    rows = read_rows(reference / "results" / f"{name}_certificates.csv")[::every]
    indices = [int(row["index"]) for row in rows]
    images, labels = subset(load_mnist("test"), indices).tensors
    alpha, seed, n0, n = float(rows[0]["alpha"]), *(int(rows[0][k]) for k in ("seed", "n0", "n"))
    # The classifier that was certified: votes in another precision are another one's.
    twin = json.loads((reference / "results" / f"{name}_certificates.json").read_text())
    network = load_checkpoint(reference / "models" / f"{name}.pt")
    smooth = SmoothClassifier(network, sigma, precision=twin["settings"]["precision"])
    found = smooth.certify_radius(images, radius, alpha, n0=n0, max_n=n, seed=seed, indices=indices)
    anytime = (found.certified & (found.prediction == labels)).double().mean().item()
    fixed = certified_accuracy(
        [float(row["radius"]) for row in rows], [int(row["correct"]) for row in rows], radius
    )
    mean = found.samples.double().mean().item()
    return (
        f"{sigma:g}",
        f"{radius:g}",
        f"{len(rows)}",
        f"{mean:,.0f}",
        f"{(n0 + n) / mean:,.0f}",
        f"{100 * anytime:.1f}",
        f"{100 * fixed:.1f}",
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--reference", type=Path, default=Path("reference"))
    parser.add_argument("--every", type=int, default=1, help="take every so many rows")
    args = parser.parse_args()
    header = ("sigma", "radius", "images", "mean draws", "times fewer", "certified %", "fixed n %")
    lines = [compared(*question, args.reference, args.every) for question in QUESTIONS]
    print(format_table(header, lines))


if __name__ == "__main__":
    main()
