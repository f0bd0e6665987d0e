"""The twin of `methods.bottleneck_loss`: nothing that is K wide is held for more rows than a chunk.

With l = W x / tau_s a student's scaled logits, p the targets and q = softmax(l), Eq. 3's term is

    H(p, q) = logsumexp(l) - sum_k p_k l_k = logsumexp(l) - x . (p W) / tau_s

so that all pairs need of the targets is p W, as narrow as x; and its gradients are

    dH/dx = (q W - p W) / tau_s        dH/dW = (q - p)^T x / tau_s

Both come from the one pass that makes q, chunk of rows by chunk of rows, while the loss is computed: backward only
scales them. The plain version holds, of V + G views and B pictures, logits, their logarithms, targets and their
gradients, in float32 and all K wide.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from dino_ssl import distributed, objectives
from dino_ssl.models.heads import WeightNormLinear
from dino_ssl.objectives import Layer, LossTerms, mean_pairwise_dot

CHUNK = {"cpu": 2**23, "cuda": 2**26}
"""Numbers in a chunk of logits: 32 MiB of float32 on a CPU (128 rows of K = 65536), whose caches are small;
256 MiB on a card, where a chunk must be worth the prototypes that are read for it."""


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
    """As `methods.bottleneck_loss.loss_from_bottleneck`, to which it leaves layers that are not prototypes alone, and argmax targets."""
    known = isinstance(student_layer, WeightNormLinear) and isinstance(teacher_layer, WeightNormLinear)
    if not known or (loss == "cross-entropy" and teacher_temp == 0):
        return objectives.loss_from_bottleneck(
            student,
            teacher,
            student_layer,
            teacher_layer,
            center=center,
            loss=loss,
            student_temp=student_temp,
            teacher_temp=teacher_temp,
        )
    with torch.no_grad():
        theirs = teacher_layer.weight
        summed = theirs @ teacher.float().sum((0, 1))
    if loss == "mse":
        return LossTerms(_mse(student, teacher, student_layer.weight, theirs, center), summed, None, None)
    found = _CrossEntropy.apply(
        student, student_layer.weight, teacher, theirs, center, (student_temp, teacher_temp), _dtype(student)
    )
    return LossTerms(found[0], summed, found[1], found[2])


@torch.no_grad()
def batch_center(teacher: Tensor, teacher_layer: Layer, temperature: float, iterations: int) -> Tensor:
    """As `methods.bottleneck_loss.batch_center`: each iteration makes the logits anew, a chunk of pictures at a time."""
    if not isinstance(teacher_layer, WeightNormLinear):
        return objectives.batch_center(teacher, teacher_layer, temperature, iterations)
    weight = teacher_layer.weight.to(_dtype(teacher))
    scaled = (teacher.float() / temperature).to(weight.dtype)
    center = torch.zeros(len(teacher), 1, len(weight), device=teacher.device)
    for iteration in range(iterations):
        for view, own in zip(scaled, center, strict=True):
            columns = torch.full_like(own[0], -torch.inf)
            for rows in _chunks(view, len(weight)):
                log_q = (view[rows] @ weight.T).float()
                if iteration:
                    log_q = torch.log_softmax(log_q - own, dim=-1)
                columns = torch.logaddexp(columns, log_q.logsumexp(0))
            own += distributed.all_reduce_logsumexp(columns)
    return center * temperature


class _CrossEntropy(torch.autograd.Function):
    """(loss, entropy, shares); the gradients are ready when the loss is."""

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
        (views, batch, _), globals_ = student.shape, len(teacher)
        paired = min(views, globals_)
        pairs = batch * (globals_ * views - paired)
        x = student.float()
        others = _of_others(x, globals_)
        count = torch.full((views, 1, 1), float(globals_), device=x.device)
        count[:paired] -= 1  # so many teacher views each student view is compared with
        count = count.expand(-1, batch, 1)
        with torch.autocast(student.device.type, enabled=False):
            weight, theirs = student_weight.detach().to(dtype), teacher_weight.to(dtype)
            weight_grad = torch.zeros_like(student_weight, dtype=torch.float32)
            # Sums over the pairs until the end: float16 would lose what a mean over them leaves of each.
            from_targets, from_student = others / temps[0], x * count / temps[0]
            scaled, center = teacher.float() / temps[1], center / temps[1]
            mixed, entropy, shares = _mix(scaled, theirs, center, weight, from_targets, weight_grad)
            lse, pulled = _predict(x / temps[0], weight, from_student, weight_grad)
            loss = ((lse * count).sum() - (mixed * from_targets).sum()) / pairs
            student_grad = (pulled * count - _of_others(mixed, views)) / (pairs * temps[0])
            weight_grad /= pairs
        ctx.save_for_backward(student_grad, weight_grad.to(student_weight.dtype))
        ctx.dtype = student.dtype
        entropy, shares = entropy / (globals_ * batch), shares / (globals_ * batch)
        ctx.mark_non_differentiable(entropy, shares)
        return loss, entropy, shares

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor, *_: Any) -> tuple:  # pyright: ignore[reportIncompatibleMethodOverride]
        student_grad, weight_grad = ctx.saved_tensors
        student_grad = (student_grad * loss_grad).to(ctx.dtype)  # scaled first: alone it is below what float16 holds
        return student_grad, weight_grad * loss_grad, None, None, None, None, None


def _of_others(x: Tensor, count: int) -> Tensor:
    """[n, B, d] -> [count, B, d]: for each view of one side, the sum over the other side's views but its own."""
    sums = x.sum(0).expand(count, -1, -1).clone()
    sums[: len(x)] -= x[:count]
    return sums


def _mix(
    teacher: Tensor, theirs: Tensor, center: Tensor, weight: Tensor, others: Tensor, weight_grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """P_t of the scaled teacher's views [G, B, d]: (p W [G, B, d], sum of their entropies, their sum [K]); takes
    p^T others off weight_grad."""
    scaled, others, batch = teacher.flatten(0, 1).to(theirs.dtype), others.flatten(0, 1), teacher.shape[1]
    mixed, entropy, shares = torch.empty_like(others), others.new_zeros(()), others.new_zeros(len(weight))
    for rows in _chunks(scaled, len(weight)):
        views = torch.arange(rows.start, min(rows.stop, len(scaled)), device=center.device) // batch
        logits = (scaled[rows] @ theirs.T).float() - (center if center.ndim == 1 else center[views, 0])
        log_p = torch.log_softmax(logits, dim=-1)
        del logits
        p = log_p.exp()
        entropy -= torch.linalg.vecdot(p, log_p).sum()
        shares += p.sum(0)
        p = p.to(weight.dtype)
        mixed[rows] = (p @ weight).float()
        _add_product(weight_grad, p, others[rows], scale=-1)
    return mixed.view_as(teacher), entropy, shares


def _predict(scaled: Tensor, weight: Tensor, pulling: Tensor, weight_grad: Tensor) -> tuple[Tensor, Tensor]:
    """Of the scaled student's views [V, B, d]: (logsumexp of the logits [V, B, 1], q W [V, B, d]); adds q^T pulling to
    weight_grad."""
    rows_of, pulling = scaled.flatten(0, 1).to(weight.dtype), pulling.flatten(0, 1)
    lse, pulled = pulling.new_empty(len(pulling), 1), torch.empty_like(pulling)
    for rows in _chunks(rows_of, len(weight)):
        logits = (rows_of[rows] @ weight.T).float()
        log_q = torch.log_softmax(logits, dim=-1)
        lse[rows] = logits[:, :1] - log_q[:, :1]
        del logits
        q = log_q.exp_().to(weight.dtype)
        pulled[rows] = (q @ weight).float()
        _add_product(weight_grad, q, pulling[rows])
    return lse.view(*scaled.shape[:2], 1), pulled.view_as(scaled)


def _add_product(total: Tensor, q: Tensor, x: Tensor, scale: float = 1) -> None:
    """total += scale q^T x, in float32 whatever the product is made in."""
    if q.dtype == total.dtype:
        total.addmm_(q.T, x, alpha=scale)
    else:
        total.add_((q.T @ x.to(q.dtype)).float(), alpha=scale)


def _mse(student: Tensor, teacher: Tensor, weight: Tensor, theirs: Tensor, center: Tensor) -> Tensor:
    """`byol_loss` of W x and W' y - c without either: their products need W^T W, W'^T W and W'^T W', all d x d."""
    with torch.autocast(student.device.type, enabled=False):
        x, y = student.float(), teacher.float()
        length = torch.einsum("vbd,de,vbe->vb", x, weight.T @ weight, x).clamp(min=1e-24).sqrt()
        their_length = torch.einsum("gbd,de,gbe->gb", y, theirs.T @ theirs, y) - 2 * y @ (theirs.T @ center)
        their_length = (their_length + center.square().sum()).clamp(min=1e-24).sqrt()
        unit = (torch.einsum("gbd,de->gbe", y, theirs.T @ weight) - center @ weight) / their_length[..., None]
        return 2 - 2 * mean_pairwise_dot(unit, x / length[..., None])


def _chunks(rows: Tensor, width: int) -> Iterator[slice]:
    """Slices of rows that have at most CHUNK numbers when each is as wide as `width`."""
    step = max(1, CHUNK.get(rows.device.type, CHUNK["cpu"]) // width)
    for start in range(0, len(rows), step):
        yield slice(start, start + step)


def _dtype(x: Tensor) -> torch.dtype:
    """Of the products with the prototypes: what a linear layer would use here."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
