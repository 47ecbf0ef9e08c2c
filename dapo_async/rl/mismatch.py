"""How far the learner's log-probs are from those recorded at sampling, for tokens of the very same weights.

Such tokens differ by arithmetic alone: kernels, precision, batch shape. The importance ratio of every token carries
that error, beside the drift of the policy that it is meant to carry. Pure: tensors in, numbers out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dapo_async.config.settings import Config

# Largest mean |difference| taken for arithmetic, in nats. On CPU, whichever engine samples: float32 1e-7 to 4e-6;
# bfloat16 0.001 to 0.002 on a trained, peaked policy, 0.001 and 0.008 on a random one (docs/log.md); larger models
# add up more roundings, so its band is wide. float16 was not measured: its rounding is an eighth of bfloat16's.
BANDS = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}


class Mismatch:
    """Sums over tokens of d = log π_learner - log μ."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._sums = torch.zeros(3, dtype=torch.float64)  # |d|, d, exp(d) - 1 - d
        self._largest = 0.0

    def add(self, learner_T: Tensor, behaviour_T: Tensor) -> None:
        """Count these tokens: log-probs of the learner and of the sampler [T], in nats."""
        if not behaviour_T.numel():
            return
        difference = learner_T.detach().cpu().double() - behaviour_T.cpu().double()
        self.num_tokens += difference.numel()
        self._sums += torch.stack([difference.abs().sum(), difference.sum(), (difference.expm1() - difference).sum()])
        largest = float(difference.abs().max())
        self._largest = largest if not largest <= self._largest else self._largest  # NaN is the largest

    def results(self) -> dict[str, float]:
        """mean and max of |d|, and KL(μ || π) estimated as k1 = mean(-d) and k3 = mean(exp(d) - 1 - d), in nats.

        Empty if no token was counted.
        """
        if not self.num_tokens:
            return {}
        mean, signed, k3 = (self._sums / self.num_tokens).tolist()
        return {"mean": mean, "max": self._largest, "k1": -signed, "k3": k3}


def band(config: Config) -> float:
    """Largest mean |difference|, in nats, that the precisions of learner and workers explain."""
    return max(BANDS[config.model.precision], BANDS[config.serving_dtype])


def same_weights(spans: Sequence[tuple[int, int]], version: int) -> bool:
    """Whether a completion with these version spans was sampled by exactly these weights, first token to last."""
    return len(spans) == 1 and spans[0][0] == version
