"""The paper's equations, in order, as pure functions.

Shapes: V student views, G teacher views (the first G of the V), B pictures, K prototypes. Softmax, entropy and
divergence are computed in float32 whatever comes in; natural logarithms, so entropies are in nats and at most ln K.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    teacher = P(teacher_logits, teacher_temp, center)
    student = log_P(student_logits, student_temp)
    views, batch = student.shape[:2]
    paired = min(views, teacher.shape[0])
    # A sum over all pairs is one product of two sums; the pairs of a view with itself are then taken away.
    everything = H(teacher.sum(0), student.sum(0)).sum()
    itself = H(teacher[:paired], student[:paired]).sum()
    return (everything - itself) / (batch * (teacher.shape[0] * views - paired))


@torch.no_grad()
def momentum_update(teacher: list[Tensor], student: list[Tensor], momentum: float) -> None:
    """Sec. 3.1: theta_t <- m theta_t + (1 - m) theta_s, in place, over lists of parameters in the same order."""
    torch._foreach_mul_(teacher, momentum)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_add_(teacher, student, alpha=1 - momentum)  # pyright: ignore[reportPrivateImportUsage]


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
