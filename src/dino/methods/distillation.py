"""The student's last layer against the teacher's: Algorithm 1 from the heads' bottlenecks to the loss.

Here, and only here, something is K wide: K = 65536 outputs of every view. This is the definition; for large K
`fast.distillation` gives the same numbers and gradients without ever holding all of them.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dino.objectives import H_over_pairs, P, byol_loss, h, log_P, sinkhorn_center

Layer = Callable[[Tensor], Tensor]
"""[..., d] -> [..., K]: prototypes, or whatever a head ends in."""


class Distilled(NamedTuple):
    """What a batch taught."""

    loss: Tensor
    logits: Tensor
    """[K], the sum of the teacher's logits over its views and pictures: what Eq. 4 averages. Detached."""
    entropy: Tensor | None
    """Eq. 5's h(P_t), the mean over views and pictures; None where there are no distributions (MSE). Detached."""
    shares: Tensor | None
    """[K], the mean of P_t: each prototype's share of the batch. Detached."""


def distil(
    student: Tensor,
    teacher: Tensor,
    student_layer: Layer,
    teacher_layer: Layer,
    *,
    center: Tensor,
    loss: Literal["cross-entropy", "mse"],
    student_temp: float,
    teacher_temp: float,
) -> Distilled:
    """Eq. 3 from what enters the last layers: student [V, B, d], teacher [G, B, d].

    center: [K], or [G, 1, K] where each view has its own (`spread`).
    """
    with torch.no_grad():
        teacher_logits = teacher_layer(teacher)  # [G, B, K]
        summed = teacher_logits.float().sum((0, 1))
    student_logits = student_layer(student)  # [V, B, K]
    if loss == "mse":  # centered, and at unit length: no temperature
        return Distilled(byol_loss(student_logits, teacher_logits.float() - center), summed, None, None)
    with torch.no_grad():
        targets = P(teacher_logits, teacher_temp, center)
        entropy, shares = h(targets).mean(), targets.mean((0, 1))
    return Distilled(H_over_pairs(targets, log_P(student_logits, student_temp)), summed, entropy, shares)


@torch.no_grad()
def spread(teacher: Tensor, teacher_layer: Layer, temperature: float, iterations: int) -> Tensor:
    """Sinkhorn-Knopp's center of the teacher's views [G, B, d] over all pictures of all ranks: [G, 1, K]."""
    return sinkhorn_center(teacher_layer(teacher), temperature, iterations)
