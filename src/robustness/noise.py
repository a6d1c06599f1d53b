"""Random noise, to hold attacks with gradients against: what hides a gradient does not stop it."""

import torch
from torch import Tensor, nn

from src.attacks import checked
from src.balls import l2_length
from src.engine.untouched import evaluation_form
from src.verdicts import stands

# Tries per image.
DRAWS = 10


def random_noise(
    model: nn.Module, images: Tensor, labels: Tensor, epsilon: float, norm: str = "linf"
) -> Tensor:
    """Noise of length `epsilon` in a random direction; per image, the first draw that breaks it.

    For "linf" a random corner of the ball, for "l2" a random point of the sphere, cut to [0, 1].

    Returns images in the ball and in [0, 1]; the clean image where no draw broke it. Arguments
    and errors as for `pgd_attack`. The same call gives the same noise.
    """
    images = checked(images, labels, epsilon, norm, (0.0, 1.0))
    generator = torch.Generator().manual_seed(0)
    points = images.clone()
    # Smaller, so that sums rounded to float32 stay in the ball.
    radius = max(epsilon - 1e-5, 0.0)
    with torch.no_grad(), evaluation_form(model) as network:
        chosen = stands(network, points, labels).nonzero()[:, 0]
        for _ in range(DRAWS):
            if not len(chosen):
                break
            noise = torch.randn(images.shape, generator=generator).to(images)
            noise = noise.sign() if norm == "linf" else noise / l2_length(noise).clamp(min=1e-30)
            tried = (images[chosen] + radius * noise[chosen]).clamp(0, 1)
            standing = stands(network, tried, labels[chosen])
            points[chosen[~standing]] = tried[~standing]
            chosen = chosen[standing]
    return points
