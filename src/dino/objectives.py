"""The paper's equations, in order, as pure functions.

Shapes: V student views, G teacher views (the first G of the V), B pictures, K prototypes. Softmax, entropy and
divergence are computed in float32 whatever comes in; natural logarithms, so entropies are in nats and at most ln K.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dino import dist


def P(logits: Tensor, temperature: float, center: Tensor | float = 0.0) -> Tensor:
    """Eq. 1: softmax((logits - center) / temperature) over the K prototypes, [..., K] -> [..., K].

    Subtracting the center is centering, a low temperature is sharpening. Sec. 3.1 writes g + c; Algorithm 1
    and the published code subtract, and so do we. Temperature 0 is its limit, the one-hot argmax (App. D).
    """
    logits = logits.float() - center
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    return torch.softmax(logits / temperature, dim=-1)


def log_P(logits: Tensor, temperature: float, center: Tensor | float = 0.0) -> Tensor:
    """The logarithm of Eq. 1, without the underflow of taking the log of a softmax."""
    return torch.log_softmax((logits.float() - center) / temperature, dim=-1)


def H(p: Tensor, log_q: Tensor) -> Tensor:
    """Eq. 2: the cross-entropy -sum p log q over the last axis, [..., K] and [..., K] -> [...]."""
    return -(p * log_q).sum(-1)


def dino_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    center: Tensor | float,
    student_temp: float,
    teacher_temp: float,
) -> Tensor:
    """Eq. 3: H(P_t(x), P_s(x')) over each teacher view x and each student view x' != x, as one scalar.

    student_logits [V, B, K], teacher_logits [G, B, K], of which view g is the student's view g. Eq. 3 sums over
    the pairs; the published code averages over them (there are G V - G: 2 V - 2 for two global views), which
    keeps the learning rate independent of the number of crops. We average.
    """
    return H_over_pairs(P(teacher_logits, teacher_temp, center), log_P(student_logits, student_temp))


def H_over_pairs(targets: Tensor, log_q: Tensor) -> Tensor:
    """Eq. 3 for targets however they were made: the mean of H(targets of x, q of x') over its pairs.

    targets [G, B, K] and log_q [V, B, K], of which view g is the targets' view g.
    """
    return -mean_over_pairs(targets, log_q)


def mean_over_pairs(teacher: Tensor, student: Tensor) -> Tensor:
    """The mean of the products <teacher[x], student[x']> over Eq. 3's pairs x' != x and the batch, as one scalar.

    teacher [G, B, K], student [V, B, K]. A sum over all pairs is one product of two sums; the pairs of a view with
    itself are then taken away.
    """
    views, batch = student.shape[:2]
    paired = min(views, teacher.shape[0])
    everything = (teacher.sum(0) * student.sum(0)).sum(-1).sum()
    itself = (teacher[:paired] * student[:paired]).sum(-1).sum()
    return (everything - itself) / (batch * (teacher.shape[0] * views - paired))


def sinkhorn_knopp(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Table 15, and SwAV's Sec. 3.1: targets that spread the batch over the K prototypes, [..., B, K] -> [..., B, K].

    exp(logits / temperature), then again and again each prototype's column divided by its sum over the pictures of all
    ranks, and each picture's row by its sum. Rows end as distributions, columns near B / K. Each view is spread on its
    own. Computed in logarithms: no logit is too large or too small.
    """
    return P(logits, temperature, sinkhorn_center(logits, temperature, iterations))


def sinkhorn_center(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """The center with which Eq. 1 gives `sinkhorn_knopp`'s targets, [..., B, K] -> [..., 1, K].

    A picture's row is divided by a number of its own, as any softmax does; what is left of the columns' divisions is
    one number for each prototype: centering, with a center that is this batch's alone.
    """
    scaled = logits.float() / temperature
    center, log_q = torch.zeros_like(scaled[..., :1, :]), scaled
    for iteration in range(iterations):
        if iteration:
            log_q = torch.log_softmax(scaled - center, dim=-1)
        center = center + dist.logsumexp(log_q.logsumexp(-2, keepdim=True))
    return center * temperature


def softmax_over_batch(logits: Tensor, temperature: float) -> Tensor:
    """Table 15: softmax(logits / temperature) over the pictures of all ranks, then each picture's row divided by its
    sum, [..., B, K] -> [..., B, K]. That is Sinkhorn-Knopp's first iteration."""
    return sinkhorn_knopp(logits, temperature, iterations=1)


@torch.no_grad()
def momentum_update(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float) -> None:
    """Sec. 3.1: theta_t <- m theta_t + (1 - m) theta_s, in place, over parameters in the same order."""
    moved = list(teacher)
    torch._foreach_mul_(moved, momentum)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_add_(moved, list(student), alpha=1 - momentum)  # pyright: ignore[reportPrivateImportUsage]


def update_center(center: Tensor, batch_center: Tensor, momentum: float) -> Tensor:
    """Eq. 4: c <- m c + (1 - m) mean of the teacher's outputs over the batch of all ranks.

    center and batch_center [K]; the mean over views, pictures and ranks is the caller's, who knows the ranks.
    """
    return center * momentum + batch_center * (1 - momentum)


def h(p: Tensor) -> Tensor:
    """Eq. 5, first term: the entropy of p in nats, [..., K] -> [...]; 0 for one-hot, ln K for uniform."""
    return torch.special.entr(p.float()).sum(-1)


def D_KL(p: Tensor, log_q: Tensor) -> Tensor:
    """Eq. 5, second term: KL(p | q), so that H(p, q) = h(p) + D_KL(p, q), [..., K] -> [...]."""
    return H(p, log_q) - h(p)


def byol_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """BYOL's Eq. 2 (Grill et al., 2020), |q / |q| - z / |z||^2 = 2 - 2 cos(q, z), over Eq. 3's pairs: from 0 to 4.

    student [V, B, D], the predictions q, and teacher [G, B, D], the projections z. BYOL adds its two pairs up. There
    is no temperature: l2-normalised outputs are not sharpened (Tables 7 and 14, MSE).
    """
    return 2 - 2 * mean_over_pairs(F.normalize(teacher.float(), dim=-1), F.normalize(student.float(), dim=-1))


def info_nce(queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float, usable: Tensor) -> Tensor:
    """MoCo's Eq. 1 (He et al., 2020), -log exp(q.k / t) / (exp(q.k / t) + sum_i exp(q.n_i / t)), over Eq. 3's pairs.

    queries [V, B, D] are the student's, keys [G, B, D] the teacher's: a query's keys are those of the other views of
    its picture. negatives [Q, D] are keys of other pictures; those that are not `usable` [Q] do not count, and without
    any the loss is 0. All are taken at unit length. MoCo has one query and one key of a picture.
    """
    queries, keys, negatives = (F.normalize(x.float(), dim=-1) for x in (queries, keys, negatives))
    alike = (keys[:, None] * queries).sum(-1) / temperature  # [G, V, B]
    away = (queries @ negatives.T).float() / temperature
    away = away.masked_fill(~usable, -1e9).logsumexp(-1)  # [V, B]; -inf would give no gradient, but nan
    pairs = 1 - torch.eye(*alike.shape[:2], device=alike.device)[..., None]
    return (pairs * F.softplus(away - alike)).sum() / (pairs.sum() * alike.shape[2])
