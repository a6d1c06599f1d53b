"""What a recipe of training under noise gives on held-out training images, to choose recipes by.

Trains as main_random_smoothing.py does with the same options, then polls --images of the held-out
images with --n copies each. They are spread over the held-out images, because MNIST comes in the
order of its writers, and at an odd distance (--images 1000 of 5,000), because two sources of
writers take turns: at an even one all are of the harder source. The average certified radius is
what the literature's protocol would give if the same shares of votes had been found among its
100,000 copies, alpha = 0.001. Two recipes are compared on the same images under the same noise;
another seed of training moves the average by a few thousandths.

Run: python -m benchmarks.held_out --sigma 1 --method confidence --hidden 256 --shift 0 \\
         --epochs 6 --learning-rate 0.005 --optimizer muon --n 5000
"""

import numpy as np

import main_random_smoothing
from src.certification import certified_radius, lower_confidence_bound
from src.command_line import count, run
from src.reports.tables import format_table
from src.utils import get_device, load_training_data, seed_everything, spread

PROTOCOL, ALPHA = 100_000, 0.001


def protocol_radii(smooth, images, labels, n: int, seed: int) -> np.ndarray:
    """The radius of each image, 0 where the prediction is wrong, scaled to PROTOCOL copies."""
    found = smooth.certify(images, n=n, alpha=ALPHA, seed=seed)
    counts = np.floor(found.top_count.numpy() * (PROTOCOL / n)).astype(int)
    right = (found.prediction == labels).numpy()
    bounds = lower_confidence_bound(counts, PROTOCOL, ALPHA)
    return np.where(right, certified_radius(bounds, smooth.sigma), 0)


def main(argv=None):
    parser = main_random_smoothing.option_parser()
    parser.add_argument(
        "--images", type=count(), default=1000, help="held-out images to poll, spread"
    )
    args = parser.parse_args(argv)
    device = get_device(args.device)
    seed_everything(args.seed)
    train, held_out, _ = load_training_data(args.data, args.held_out, quick=args.quick)
    smooth = main_random_smoothing.untrained(args, device)
    history = main_random_smoothing.train(smooth, train, held_out, args)
    seconds = history["epochs"][-1]["seconds"]
    few = spread(held_out, args.images)
    radii = protocol_radii(smooth, *few.tensors, args.n, args.seed)
    at = [smooth.sigma * half / 2 for half in range(8)]
    shares = (f"{100 * (radii > r).mean():.1f}" for r in at)
    header = ("images", "minutes", "ACR", *(f"r={r:g}" for r in at))
    print(
        format_table(
            header, [(f"{len(few)}", f"{seconds / 60:.1f}", f"{radii.mean():.4f}", *shares)]
        )
    )


if __name__ == "__main__":
    run(main)
