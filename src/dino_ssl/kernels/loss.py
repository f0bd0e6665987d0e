"""Last layer and loss without holding the K outputs of all views: rows are processed in chunks.

With l = W x / tau_s the scaled logits of a student view, p the targets and q = softmax(l), a term of Eq. 3 is

    H(p, q) = logsumexp(l) - sum_k p_k l_k = logsumexp(l) - x . (p W) / tau_s

so the pairs need only p W of the targets, which is as narrow as x. The gradients are

    dH/dx = (q W - p W) / tau_s        dH/dW = (q - p)^T x / tau_s

Both are computed with the loss, in the pass that computes q chunk by chunk; backward only scales them.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from dino_ssl import distributed, objectives
from dino_ssl.models.heads import WeightNormLinear
from dino_ssl.objectives import Layer, LossTerms, mean_pairwise_dot

CHUNK = {"cpu": 2**23, "cuda": 2**26}
"""Elements of a chunk of logits: 32 MiB of float32 on a CPU (128 rows of K = 65536), whose caches are small; 256 MiB on
a GPU, to amortize reading the prototypes."""


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
    """Return the terms of `objectives.loss_from_bottleneck`, which it calls for argmax targets and other layers."""
    is_linear = isinstance(student_layer, WeightNormLinear) and isinstance(teacher_layer, WeightNormLinear)
    if not is_linear or (loss == "cross-entropy" and teacher_temp == 0):
        layers, temps = (student_layer, teacher_layer), dict(student_temp=student_temp, teacher_temp=teacher_temp)
        return objectives.loss_from_bottleneck(student, teacher, *layers, center=center, loss=loss, **temps)
    with torch.no_grad():
        teacher_weight = teacher_layer.weight
        logits = teacher_weight @ teacher.float().sum((0, 1))
    if loss == "mse":
        return LossTerms(_mse(student, teacher, student_layer.weight, teacher_weight, center), logits, None, None)
    temps, dtype = (student_temp, teacher_temp), _matmul_dtype(student)
    value, entropy, usage = _CrossEntropy.apply(  # pyright: ignore[reportGeneralTypeIssues]
        student, student_layer.weight, teacher, teacher_weight, center, temps, dtype
    )
    return LossTerms(value, logits, entropy, usage)


@torch.no_grad()
def batch_center(teacher: Tensor, teacher_layer: Layer, temperature: float, iterations: int) -> Tensor:
    """Return `objectives.batch_center`; each iteration recomputes the logits, one chunk of images at a time."""
    if not isinstance(teacher_layer, WeightNormLinear):
        return objectives.batch_center(teacher, teacher_layer, temperature, iterations)
    weight = teacher_layer.weight.to(_matmul_dtype(teacher))
    scaled = (teacher.float() / temperature).to(weight.dtype)
    centers = torch.zeros(len(teacher), 1, len(weight), device=teacher.device)
    for iteration in range(iterations):
        for view, center in zip(scaled, centers, strict=True):
            columns = torch.full_like(center[0], -torch.inf)
            for rows in _chunks(view, len(weight)):
                log_q = (view[rows] @ weight.T).float()
                if iteration:
                    log_q = torch.log_softmax(log_q - center, dim=-1)
                columns = torch.logaddexp(columns, log_q.logsumexp(0))
            center += distributed.all_reduce_logsumexp(columns)
    return centers * temperature


class _CrossEntropy(torch.autograd.Function):
    """(loss, entropy, prototype usage); forward computes the gradients too."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        student: Tensor,
        student_weight: Tensor,
        teacher: Tensor,
        teacher_weight: Tensor,
        center: Tensor,
        temps: tuple[float, float],
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        (views, batch, _), teacher_views = student.shape, len(teacher)
        paired = min(views, teacher_views)
        pairs = batch * (teacher_views * views - paired)
        x = student.float()
        partners = _sum_of_other_views(x, teacher_views)
        count = torch.full((views, 1, 1), float(teacher_views), device=x.device)
        count[:paired] -= 1  # number of teacher views that each student view is compared with
        count = count.expand(-1, batch, 1)
        with torch.autocast(student.device.type, enabled=False):
            weight, teacher_weight = student_weight.detach().to(dtype), teacher_weight.to(dtype)
            weight_grad = torch.zeros_like(student_weight, dtype=torch.float32)
            # Sums over the pairs until the end: float16 would lose the parts of a mean.
            scaled, center = teacher.float() / temps[1], center / temps[1]
            partners, weighted = partners / temps[0], x * count / temps[0]
            mixed, entropy, usage = _teacher_side(scaled, teacher_weight, center, weight, partners, weight_grad)
            lse, expected = _student_side(x / temps[0], weight, weighted, weight_grad)
            loss = ((lse * count).sum() - (mixed * partners).sum()) / pairs
            student_grad = (expected * count - _sum_of_other_views(mixed, views)) / (pairs * temps[0])
            weight_grad /= pairs
        ctx.save_for_backward(student_grad, weight_grad.to(student_weight.dtype))
        ctx.dtype = student.dtype
        entropy, usage = entropy / (teacher_views * batch), usage / (teacher_views * batch)
        ctx.mark_non_differentiable(entropy, usage)
        return loss, entropy, usage

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor, *_: Any) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        student_grad, weight_grad = ctx.saved_tensors
        student_grad = (student_grad * loss_grad).to(ctx.dtype)  # scale first: float16 would lose unscaled gradients
        return student_grad, weight_grad * loss_grad, None, None, None, None, None


def _sum_of_other_views(x: Tensor, count: int) -> Tensor:
    """Return, for each of `count` views of the other side, the sum of x over all views but its own: [count, B, d]."""
    sums = x.sum(0).expand(count, -1, -1).clone()
    sums[: len(x)] -= x[:count]
    return sums


def _teacher_side(
    scaled: Tensor, teacher_weight: Tensor, center: Tensor, weight: Tensor, partners: Tensor, weight_grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return p W [G, B, d], the sum of the entropies of p, and the sum of p [K], for the scaled teacher [G, B, d].

    Subtracts p^T partners from weight_grad.
    """
    x, partners, batch = scaled.flatten(0, 1).to(teacher_weight.dtype), partners.flatten(0, 1), scaled.shape[1]
    mixed, entropy, usage = torch.empty_like(partners), partners.new_zeros(()), partners.new_zeros(len(weight))
    for rows in _chunks(x, len(weight)):
        views = torch.arange(rows.start, min(rows.stop, len(x)), device=center.device) // batch
        logits = (x[rows] @ teacher_weight.T).float() - (center if center.ndim == 1 else center[views, 0])
        log_p = torch.log_softmax(logits, dim=-1)
        del logits
        p = log_p.exp()
        entropy -= torch.linalg.vecdot(p, log_p).sum()
        usage += p.sum(0)
        p = p.to(weight.dtype)
        mixed[rows] = (p @ weight).float()
        _add_product(weight_grad, p, partners[rows], scale=-1)
    return mixed.view_as(scaled), entropy, usage


def _student_side(scaled: Tensor, weight: Tensor, weighted: Tensor, weight_grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return logsumexp of the logits [V, B, 1] and q W [V, B, d] for the scaled student [V, B, d].

    Adds q^T weighted to weight_grad.
    """
    x, weighted = scaled.flatten(0, 1).to(weight.dtype), weighted.flatten(0, 1)
    lse, expected = weighted.new_empty(len(weighted), 1), torch.empty_like(weighted)
    for rows in _chunks(x, len(weight)):
        logits = (x[rows] @ weight.T).float()
        log_q = torch.log_softmax(logits, dim=-1)
        lse[rows] = logits[:, :1] - log_q[:, :1]
        del logits
        q = log_q.exp_().to(weight.dtype)
        expected[rows] = (q @ weight).float()
        _add_product(weight_grad, q, weighted[rows])
    return lse.view(*scaled.shape[:2], 1), expected.view_as(scaled)


def _add_product(total: Tensor, q: Tensor, x: Tensor, scale: float = 1) -> None:
    """Add scale q^T x to `total`, summed in float32."""
    if q.dtype == total.dtype:
        total.addmm_(q.T, x, alpha=scale)
    else:
        total.add_((q.T @ x.to(q.dtype)).float(), alpha=scale)


def _mse(student: Tensor, teacher: Tensor, weight: Tensor, teacher_weight: Tensor, center: Tensor) -> Tensor:
    """Return `byol_loss` of W x and W' y - c from W^T W, W'^T W and W'^T W', which are d x d."""
    with torch.autocast(student.device.type, enabled=False):
        x, y = student.float(), teacher.float()
        norm = torch.einsum("vbd,de,vbe->vb", x, weight.T @ weight, x).clamp(min=1e-24).sqrt()
        square = torch.einsum("gbd,de,gbe->gb", y, teacher_weight.T @ teacher_weight, y)
        square = square - 2 * y @ (teacher_weight.T @ center)
        teacher_norm = (square + center.square().sum()).clamp(min=1e-24).sqrt()
        targets = torch.einsum("gbd,de->gbe", y, teacher_weight.T @ weight) - center @ weight
        return 2 - 2 * mean_pairwise_dot(targets / teacher_norm[..., None], x / norm[..., None])


def _chunks(rows: Tensor, width: int) -> Iterator[slice]:
    """Yield slices of rows with at most CHUNK elements at the given width."""
    step = max(1, CHUNK.get(rows.device.type, CHUNK["cpu"]) // width)
    for start in range(0, len(rows), step):
        yield slice(start, start + step)


def _matmul_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of a linear layer here: autocast's, or float32."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
