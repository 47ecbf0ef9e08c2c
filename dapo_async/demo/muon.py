"""Muon, for the matrices of the demo's warm start; the learner trains with AdamW.

PyTorch has a Muon too; it computes in bfloat16, which is slow on many laptops, and one matrix at a time.
Here matrices of one shape are stacked and computed in float32.
"""

from collections.abc import Iterable

import torch

# Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024): a quintic that drives all
# singular values near 1 in five iterations.
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalized(matrices_NRC: torch.Tensor) -> torch.Tensor:
    """Each of N matrices [R, C] with its singular values moved to about 1 (0.7 to 1.2)."""
    a, b, c = QUINTIC
    tall = matrices_NRC.shape[1] > matrices_NRC.shape[2]
    x = matrices_NRC.transpose(1, 2) if tall else matrices_NRC
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose step on each matrix is orthogonalized. All parameters must be matrices.

    A step has a root mean square of about 0.2 · lr, that of AdamW, so that both share one learning rate
    (Liu et al., arXiv 2502.16982, section 2.2).
    """

    def __init__(self, matrices: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in by_shape.items():
                directions = orthogonalized(torch.stack([self._momentum(m, group["momentum"]) for m in matrices]))
                for matrix, direction in zip(matrices, directions, strict=True):
                    matrix.add_(direction, alpha=-0.2 * max(shape) ** 0.5 * group["lr"])

    def _momentum(self, matrix: torch.nn.Parameter, momentum: float) -> torch.Tensor:
        assert matrix.grad is not None
        buffer = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
        buffer.lerp_(matrix.grad, 1 - momentum)
        return matrix.grad.lerp(buffer, momentum)
