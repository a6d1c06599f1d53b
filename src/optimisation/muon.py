"""The optimiser Muon, for the weights between a network's first and last layer."""

import torch
from torch import Tensor

# Of an odd polynomial that Jordan et al. iterate. It moves singular values in (0, 1] to near 1.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonal updates: they move all directions of a weight matrix equally far.

    Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), with weight
    decay and the scale 0.2 sqrt(max(rows, columns)) of Liu et al. (arXiv:2502.16982). At that scale
    an update is as long as one of AdamW with the same learning rate. torch.optim.Muon takes no
    convolution kernels and always computes in bfloat16, for which most CPUs have no units.

    Args:
        params: weights (rows, ...). Kernels become matrices (channels, inputs * height * width).
        lr: length of an update, as for AdamW.
        momentum: decay of the mean of the gradients; the update looks one step ahead (Nesterov).
        weight_decay: an update shrinks each weight by this fraction times `lr`.
        dtype: of the products that make an update orthogonal; default: that of the weights.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=1e-2, dtype=None):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        """One update of every weight that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                mean = self.state[weight].setdefault("mean", torch.zeros_like(weight))
                mean.lerp_(weight.grad, 1 - group["momentum"])
                matrix = weight.grad.lerp(mean, group["momentum"]).flatten(1)
                scale = 0.2 * max(matrix.shape) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                update = orthogonal(matrix, dtype=self.dtype).view(weight.shape)
                weight.add_(update, alpha=-group["lr"] * scale)


def orthogonal(matrix: Tensor, iterations: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """About U V^T, for the singular value decomposition U S V^T of a matrix.

    After five iterations, singular values above 1/300 of the Frobenius norm lie between 0.68 and
    1.21, and smaller ones below 1.21. With `dtype` bfloat16 these bounds move by a few hundredths.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T, iterations, dtype).T
    given = matrix.dtype
    matrix = (matrix / matrix.norm().clamp(min=1e-30)).to(dtype or given)
    # Rounding makes small eigenvalues of X X^T slightly negative, and each iteration multiplies
    # them by at least 12. In bfloat16 they need a new X X^T before they grow.
    block = 2 if matrix.dtype == torch.bfloat16 else iterations
    for done in range(0, iterations, block):
        matrix = _iterated(matrix, min(block, iterations - done))
    return matrix.to(given)


def _iterated(matrix: Tensor, iterations: int) -> Tensor:
    """The iterations, done with the small square matrix X X^T: only two products involve X."""
    a, b, c = _COEFFICIENTS
    square = matrix @ matrix.T
    product = None
    for number in range(1, iterations + 1):
        factor = torch.addmm(square, square, square, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor if product is None else factor @ product
        if number < iterations:
            square = factor @ square @ factor
    return product @ matrix
