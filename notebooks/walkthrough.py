# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
# ---

# %% [markdown]
# # From a trained model to an attack to a certificate
#
# A walk through the subject on one digit. Open this file as a notebook (VS Code does so by
# itself, Jupyter with the jupytext extension) or run it from the root of the repository:
# `python -m notebooks.walkthrough`. It needs the checkpoints of the first three scripts.

# %%
import matplotlib.pyplot as plt
import torch

from src.attacks import gradient_attack, pgd_attack
from src.certification import certified_radius, lower_confidence_bound, maximum_radius
from src.checkpoints import load_checkpoint
from src.models import SmoothClassifier
from src.reports.tables import round_down
from src.training_and_evaluation import accuracy
from src.utils import load_mnist, subset

test = load_mnist("test")
standard = load_checkpoint("models/standard_training.pt")
robust = load_checkpoint("models/adversarial_training.pt")
images, labels = subset(test, [0]).tensors  # A seven: (1, 1, 28, 28) in [0, 1], and its label.

# %% [markdown]
# ## A model that works
#
# On images like those it was trained on, the network is hardly ever wrong.

# %%
few = subset(test, range(1000))
print(f"Accuracy on 1,000 test images: {accuracy(standard, few):.1%}")

# %% [markdown]
# ## An attack
#
# One step of size epsilon along the sign of the gradient of the loss: no pixel changes by more
# than epsilon. Projected gradient descent (PGD) repeats smaller steps inside the same ball.

# %%
epsilon = 0.2
versions = {
    "clean": images,
    "single step": gradient_attack(standard, images, labels, epsilon),
    "PGD-40": pgd_attack(standard, images, labels, epsilon, steps=40),
}


def show(versions, model, path):
    """Draw one digit in several versions with the prediction of `model` below each."""
    figure, panels = plt.subplots(1, len(versions), figsize=(2.2 * len(versions), 2.6))
    for axes, (name, version) in zip(panels, versions.items(), strict=True):
        with torch.no_grad():
            confidence, guess = model(version).softmax(dim=1).max(dim=1)
        axes.imshow(version[0, 0].numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set(title=name, xticks=[], yticks=[])
        axes.set_xlabel(f"{guess.item()} ({confidence.item():.0%})")
    figure.tight_layout()
    figure.savefig(path)
    plt.show()


show(versions, standard, "figures/walkthrough_attack.png")
largest = (versions["PGD-40"] - images).abs().max().item()
print(f"Largest change of a pixel: {largest:.6f}, never above epsilon = {epsilon}")

# %% [markdown]
# An adversarially trained network was shown such images during training. The same attack, aimed
# at it, has a harder time. That it survives this attack does not prove that it survives others.

# %%
attacked = pgd_attack(robust, images, labels, epsilon, steps=40)
show({"clean": images, "PGD-40": attacked}, robust, "figures/walkthrough_robust.png")
for name, model in (("standard", standard), ("adversarial", robust)):
    share = accuracy(
        model, subset(few, range(200)), attack=lambda m, x, y: pgd_attack(m, x, y, 0.2)
    )
    print(f"{name:12s} accuracy under PGD-40, linf {epsilon}, 200 images: {share:.1%}")

# %% [markdown]
# ## A certificate
#
# The smoothed classifier g returns the class that the base network f returns most often under
# Gaussian noise. If that class has probability at least p_A > 1/2, then g is constant in the l2
# ball of radius sigma * Phi^-1(p_A), whatever the attack.

# %%
base = load_checkpoint("models/randomized_smoothing.pt")
sigma = base.facts["sigma"]
noisy = {
    f"sigma = {level:g}": images + level * torch.randn(images.shape) for level in (0, sigma, 1.0)
}
show(noisy, base, "figures/walkthrough_noise.png")

smooth = SmoothClassifier(base, sigma)
certificate = smooth.certify(images[0], n0=100, n=10_000, alpha=0.001)
print(f"class {certificate.prediction}, l2 radius {round_down(certificate.radius, 4)}")

# %% [markdown]
# The same by hand: the votes give a lower bound on the probability, the bound gives the radius.
# The bound holds with probability 1 - alpha over the draws, for this image alone.

# %%
p_lower = lower_confidence_bound(int(certificate.top_count), 10_000, alpha=0.001)
print(f"{certificate.top_count} of 10,000 votes, p_A >= {p_lower:.6f}")
print(f"sigma * Phi^-1(p_A) = {round_down(certified_radius(p_lower, sigma), 4)}")
print(f"10,000 votes can certify at most {round_down(maximum_radius(sigma, 10_000, 0.001), 4)}")
