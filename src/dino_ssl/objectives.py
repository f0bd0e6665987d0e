"""The paper's equations as pure functions, in the order of the paper, and the losses of the baselines.

Shapes: V student views, G teacher views (the first G of the V), B images, K prototypes, d width of the bottleneck.
Softmax, entropy and divergence are computed in float32 for any input dtype. Logarithms are natural: an entropy is in
nats and at most ln K.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_ssl import distributed

Layer = Callable[[Tensor], Tensor]
"""The last layer of a head, [..., d] -> [..., K]: the prototypes, or any other module."""


def P(logits: Tensor, temperature: float, center: Tensor | float = 0.0) -> Tensor:
    """Eq. 1: softmax((logits - center) / temperature) over the K prototypes, [..., K] -> [..., K].

    Subtracting the center is centering; a low temperature is sharpening. Sec. 3.1 writes g + c; Algorithm 1 and the
    published code subtract, and so do we. Temperature 0 gives the limit, a one-hot argmax (App. D).
    """
    logits = logits.float() - center
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    return torch.softmax(logits / temperature, dim=-1)


def log_P(logits: Tensor, temperature: float, center: Tensor | float = 0.0) -> Tensor:
    """Return the logarithm of Eq. 1, without the underflow of log(softmax)."""
    return torch.log_softmax((logits.float() - center) / temperature, dim=-1)


def H(p: Tensor, log_q: Tensor) -> Tensor:
    """Eq. 2: the cross-entropy -sum p log q over the last axis, [..., K] and [..., K] -> [...]."""
    return -(p * log_q).sum(-1)


def l2_normalize(x: Tensor) -> Tensor:
    """Return x / |x| along the last axis in float32: float16 would lose small components."""
    return F.normalize(x.float(), dim=-1)


def dino_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    center: Tensor | float,
    student_temp: float,
    teacher_temp: float,
) -> Tensor:
    """Eq. 3: H(P_t(x), P_s(x')) over each teacher view x and each student view x' != x, as one scalar.

    student_logits [V, B, K], teacher_logits [G, B, K]; teacher view g and student view g are the same view. Eq. 3 sums
    over the pairs; the published code averages over them (G V - G pairs, 2 V - 2 for two global views), so that the
    learning rate does not depend on the number of crops. We average.
    """
    return cross_entropy_over_pairs(P(teacher_logits, teacher_temp, center), log_P(student_logits, student_temp))


def cross_entropy_over_pairs(targets: Tensor, log_q: Tensor) -> Tensor:
    """Eq. 3 for given targets: the mean of H(targets[x], q[x']) over all pairs of views x' != x and over the batch.

    targets [G, B, K], log_q [V, B, K]; target view g and view g of log_q are the same view.
    """
    return -mean_pairwise_dot(targets, log_q)


def mean_pairwise_dot(teacher: Tensor, student: Tensor) -> Tensor:
    """Return the mean of <teacher[x], student[x']> over Eq. 3's pairs x' != x and the batch, as one scalar.

    teacher [G, B, K], student [V, B, K]. The sum over all pairs is one product of two sums, from which the pairs of a
    view with itself are subtracted.
    """
    views, batch = student.shape[:2]
    paired = min(views, teacher.shape[0])
    all_pairs = (teacher.sum(0) * student.sum(0)).sum(-1).sum()
    same_view = (teacher[:paired] * student[:paired]).sum(-1).sum()
    return (all_pairs - same_view) / (batch * (teacher.shape[0] * views - paired))


class LossTerms(NamedTuple):
    """The loss of a batch, and the teacher statistics that are computed with it."""

    loss: Tensor
    logits: Tensor
    """[K], the sum of the teacher's logits over its views and images, which Eq. 4 averages. Detached."""
    entropy: Tensor | None
    """Eq. 5's h(P_t), averaged over views and images; None for MSE, which has no distributions. Detached."""
    prototype_usage: Tensor | None
    """[K], P_t averaged over views and images: each prototype's share of the batch. Detached."""


def loss_from_bottleneck(
    student: Tensor,
    teacher: Tensor,
    student_layer: Layer,
    teacher_layer: Layer,
    *,
    center: Tensor,
    loss: Literal["cross-entropy", "mse"],
    student_temp: float,
    teacher_temp: float,
) -> LossTerms:
    """Algorithm 1 from the inputs of the last layers to the loss: student [V, B, d], teacher [G, B, d].

    center: [K], or [G, 1, K] if each view has its own (`batch_center`). This is the definition; it holds the K outputs
    of every view. `kernels.loss` gives the same values and gradients without holding them.
    """
    with torch.no_grad():
        teacher_logits = teacher_layer(teacher)  # [G, B, K]
        summed = teacher_logits.float().sum((0, 1))
    student_logits = student_layer(student)  # [V, B, K]
    if loss == "mse":  # centered and l2-normalized: no temperature
        return LossTerms(byol_loss(student_logits, teacher_logits.float() - center), summed, None, None)
    value = dino_loss(
        student_logits, teacher_logits, center=center, student_temp=student_temp, teacher_temp=teacher_temp
    )
    with torch.no_grad():
        targets = P(teacher_logits, teacher_temp, center)
        return LossTerms(value, summed, h(targets).mean(), targets.mean((0, 1)))


@torch.no_grad()
def batch_center(teacher: Tensor, teacher_layer: Layer, temperature: float, iterations: int) -> Tensor:
    """Return the Sinkhorn-Knopp center of teacher views [G, B, d] over the images of all ranks: [G, 1, K]."""
    return sinkhorn_center(teacher_layer(teacher), temperature, iterations)


def sinkhorn_knopp(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Table 15, and SwAV's Sec. 3.1: targets that spread the batch over the K prototypes, [..., B, K] -> [..., B, K].

    Start from exp(logits / temperature); then repeatedly divide each prototype's column by its sum over the images of
    all ranks, and each image's row by its sum. Rows end as distributions, columns sum to about B / K. Leading
    dimensions (views) are independent. Computed in logarithms, so that no logit overflows. One iteration is Table 15's
    softmax over the batch.
    """
    return P(logits, temperature, sinkhorn_center(logits, temperature, iterations))


def sinkhorn_center(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Return the center with which Eq. 1 equals `sinkhorn_knopp`, [..., B, K] -> [..., 1, K].

    The division of a row is that of any softmax. The divisions of the columns reduce to one factor per prototype:
    centering, with a center that belongs to this batch.
    """
    scaled = logits.float() / temperature
    center, log_q = torch.zeros_like(scaled[..., :1, :]), scaled
    for iteration in range(iterations):
        if iteration:
            log_q = torch.log_softmax(scaled - center, dim=-1)
        center = center + distributed.all_reduce_logsumexp(log_q.logsumexp(-2, keepdim=True))
    return center * temperature


@torch.no_grad()
def momentum_update(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float) -> None:
    """Sec. 3.1: theta_t <- m theta_t + (1 - m) theta_s, the EMA, in place; parameters in the same order."""
    parameters = list(teacher)
    torch._foreach_mul_(parameters, momentum)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_add_(parameters, list(student), alpha=1 - momentum)  # pyright: ignore[reportPrivateImportUsage]


def update_center(center: Tensor, batch_mean: Tensor, momentum: float) -> Tensor:
    """Eq. 4: c <- m c + (1 - m) mean of the teacher outputs over the global batch.

    center and batch_mean [K]. The caller averages over views, images and ranks.
    """
    return center * momentum + batch_mean * (1 - momentum)


def h(p: Tensor) -> Tensor:
    """Eq. 5, first term: the entropy of p in nats, [..., K] -> [...]; 0 for one-hot, ln K for uniform.

    The second term is KL(p | q) = H(p, q) - h(p).
    """
    return torch.special.entr(p.float()).sum(-1)


def byol_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """BYOL's Eq. 2 (Grill et al., 2020), |q / |q| - z / |z||^2 = 2 - 2 cos(q, z), over Eq. 3's pairs: from 0 to 4.

    student [V, B, D] are the predictions q, teacher [G, B, D] the projections z. BYOL sums over its two pairs; we
    average. l2-normalized outputs need no temperature (MSE in Tables 7 and 14).
    """
    return 2 - 2 * mean_pairwise_dot(l2_normalize(teacher), l2_normalize(student))


def info_nce(queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float, valid: Tensor) -> Tensor:
    """MoCo's Eq. 1 (He et al., 2020), -log exp(q.k / t) / (exp(q.k / t) + sum_i exp(q.n_i / t)), over Eq. 3's pairs.

    queries [V, B, D] are the student's outputs, keys [G, B, D] the teacher's. The positive keys of a query are those
    of the other views of its image; MoCo has one. negatives [Q, D] are keys of other images; those with `valid` [Q]
    False are masked, and without any the loss is 0. All vectors are l2-normalized here.
    """
    queries, keys, negatives = map(l2_normalize, (queries, keys, negatives))
    positive = (keys[:, None] * queries).sum(-1) / temperature  # [G, V, B]
    negative = (queries @ negatives.T).float() / temperature
    negative = negative.masked_fill(~valid, -1e9).logsumexp(-1)  # [V, B]; the gradient of -inf would be nan
    pairs = 1 - torch.eye(*positive.shape[:2], device=positive.device)[..., None]
    return (pairs * F.softplus(negative - positive)).sum() / (pairs.sum() * positive.shape[2])
