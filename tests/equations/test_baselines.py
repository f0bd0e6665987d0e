"""BYOL, MoCo-v2 and SwAV equal loops written from their papers; the queue equals a list."""

import math

import pytest
import torch
from torch import Tensor

from dino_ssl.data.batch import Batch
from dino_ssl.errors import UserError
from dino_ssl.methods import BYOLConfig, MoCoConfig, SwAVConfig
from dino_ssl.methods.byol import BYOL
from dino_ssl.methods.method import BuildContext
from dino_ssl.methods.moco import MoCo
from dino_ssl.methods.queue import Queue
from dino_ssl.methods.swav import SwAV
from dino_ssl.models import Timm, ViT
from dino_ssl.objectives import byol_loss, info_nce
from dino_ssl.schedules import Clock

CLOCK = Clock(step=12, steps_per_epoch=4, epochs=5)
VIT = ViT(width=16, depth=1, heads=1, patch=8, image_size=16)
CONVNET = Timm(name="resnet18", args=(("channels", "(4, 4, 4, 4)"), ("layers", "(1, 1, 1, 1)")))
SMALL = dict(head_dim=6, head_hidden=8)


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(locals_: int = 0, batch: int = 5, seed: int = 0) -> Batch:
    stacks = [vectors(2, batch, 3, 16, 16, seed=seed)]
    stacks += [vectors(locals_, batch, 3, 8, 8, seed=seed + 1)] if locals_ else []
    return Batch(tuple(stacks))


def slow_cosine(a: Tensor, b: Tensor) -> float:
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    lengths = [math.sqrt(sum(float(x) ** 2 for x in v)) for v in (a, b)]
    return dot / (lengths[0] * lengths[1])


# -- the losses ---------------------------------------------------------------------------------------------

SIZES = [(2, 2, 3, 4), (5, 2, 2, 6), (3, 1, 4, 3), (2, 2, 1, 5)]


@pytest.mark.parametrize(("V", "G", "B", "D"), SIZES)
def test_byol_loss_is_the_distance_of_unit_vectors(V: int, G: int, B: int, D: int) -> None:
    """Grill et al., Eq. 2, for one pair at a time; the two pairs of an image are averaged."""
    predictions, projections = vectors(V, B, D), vectors(G, B, D, seed=1)
    distances = []
    for x in range(G):
        for other in range(V):
            for image in range(B):
                if other != x:
                    q, z = predictions[other, image], projections[x, image]
                    unit = [[float(i) / float(v.norm()) for i in v] for v in (q, z)]
                    distances.append(sum((a - b) ** 2 for a, b in zip(*unit, strict=True)))
    assert byol_loss(predictions, projections).item() == pytest.approx(sum(distances) / len(distances), rel=1e-5)


@pytest.mark.parametrize(("V", "G", "B", "D"), SIZES)
@pytest.mark.parametrize("kept", [7, 4, 1])
def test_info_nce_is_a_cross_entropy_with_the_key_as_class(V: int, G: int, B: int, D: int, kept: int) -> None:
    """He et al., Eq. 1, for one query at a time, with the valid negatives only."""
    queries, keys, negatives = vectors(V, B, D), vectors(G, B, D, seed=1), vectors(7, D, seed=2)
    usable = torch.arange(7) < kept
    losses = []
    for x in range(G):
        for other in range(V):
            for image in range(B):
                if other != x:
                    q = queries[other, image]
                    top = math.exp(slow_cosine(q, keys[x, image]) / 0.2)
                    below = sum(math.exp(slow_cosine(q, negatives[i]) / 0.2) for i in range(kept))
                    losses.append(-math.log(top / (top + below)))
    loss = info_nce(queries, keys, negatives, 0.2, usable)
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_info_nce_without_negatives_has_zero_loss_and_gradient() -> None:
    queries = vectors(3, 2, 4).requires_grad_()
    loss = info_nce(queries, vectors(2, 2, 4, seed=1), torch.zeros(5, 4), 0.1, torch.zeros(5, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert queries.grad is not None
    assert torch.equal(queries.grad, torch.zeros_like(queries))


def test_empty_queue_entries_have_no_gradient() -> None:
    """The gradient is that of a shorter queue without the empty entries."""
    gradients = []
    for rows in (3, 8):
        queries, usable = vectors(2, 4, 5).requires_grad_(), torch.arange(rows) < 3
        negatives = torch.cat([vectors(3, 5, seed=2), torch.zeros(rows - 3, 5)])
        info_nce(queries, vectors(2, 4, 5, seed=1), negatives, 0.1, usable).backward()
        gradients.append(queries.grad)
    assert gradients[0] is not None
    assert gradients[0].abs().max() > 0.01
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_losses_are_computed_in_float32(dtype: torch.dtype) -> None:
    a, b, n = vectors(3, 2, 8).to(dtype), vectors(2, 2, 8, seed=1).to(dtype), vectors(5, 8, seed=2)
    usable = torch.ones(5, dtype=torch.bool)
    assert torch.equal(byol_loss(a, b), byol_loss(a.float(), b.float()))
    assert torch.equal(info_nce(a, b, n, 0.1, usable), info_nce(a.float(), b.float(), n, 0.1, usable))


# -- the queue ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 4, 10, 12])
@pytest.mark.parametrize("batch", [1, 3, 4, 5])
def test_queue_keeps_the_newest_rows_for_any_batch_size(size: int, batch: int) -> None:
    """Also for batches that do not divide its size or exceed it; each row has the step of its push."""
    queue, ever = Queue(size, 2), []
    for step in range(7):
        new = vectors(batch, 2, seed=step)
        queue.push(new, step)
        ever += [(tuple(row.tolist()), step) for row in new]
        kept = {(tuple(row.tolist()), int(born)) for row, born in zip(queue.rows, queue.born, strict=True) if born >= 0}
        assert kept == set(ever[-size:])
        assert queue.is_full() == (len(ever) >= size)
        newest = {row for row, born in ever[-size:] if born >= step - 1}
        assert {tuple(row.tolist()) for row in queue.rows[queue.pushed_since(step - 1)]} == newest


def test_queue_resumes_from_its_state_dict() -> None:
    one, other = Queue(5, 3), Queue(5, 3)
    for step in range(4):
        one.push(vectors(2, 3, seed=step), step)
    other.load_state_dict(one.state_dict())
    assert other.is_full()
    for queue in (one, other):
        queue.push(vectors(3, 3, seed=9), 4)
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), other.buffers(), strict=True))


# -- the methods --------------------------------------------------------------------------------------------


def byol(network: ViT | Timm = VIT, **changes: object) -> BYOL:
    torch.manual_seed(0)
    return BYOLConfig(**SMALL, **changes).build(BuildContext(network))  # pyright: ignore[reportArgumentType]


def moco(network: ViT | Timm = VIT, **changes: object) -> MoCo:
    torch.manual_seed(0)
    return MoCoConfig(**SMALL, **{"queue": 24, **changes}).build(BuildContext(network))  # pyright: ignore[reportArgumentType]


def swav(network: ViT | Timm = VIT, **changes: object) -> SwAV:
    torch.manual_seed(0)
    return SwAVConfig(**SMALL, out_dim=9, **changes).build(BuildContext(network))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("make", [byol, moco, swav])
@pytest.mark.parametrize("network", [VIT, CONVNET], ids=["ViT", "ConvNet"])
@pytest.mark.parametrize("locals_", [0, 3])
def test_only_trainable_parameters_get_a_gradient(make, network: ViT | Timm, locals_: int) -> None:
    method = make(network)
    first = method(images(locals_, seed=3), CLOCK)
    method.after_step(first.carry, CLOCK)  # MoCo has negatives from now on
    out = method(images(locals_), CLOCK._replace(step=13))
    out.loss.backward()
    trained = set(method.trainable.parameters())
    for name, parameter in method.named_parameters():
        assert (parameter.grad is not None) == (parameter in trained), name
    assert all(not value.requires_grad for value in out.metrics.values())


@pytest.mark.parametrize("make", [byol, moco, swav])
def test_forward_does_not_change_the_methods_state(make) -> None:
    method = make(head_norm="none")
    before = {name: value.clone() for name, value in method.state_dict().items()}
    method(images(2), CLOCK)
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


@pytest.mark.parametrize("make", [byol, moco])
def test_teacher_encodes_global_views_only(make) -> None:
    """App. E: only the student encodes local views."""
    method, shapes = make(), []
    method.teacher.backbone.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    method(images(3), CLOCK)
    assert shapes == [(10, 3, 16, 16)]


@pytest.mark.parametrize("make", [byol, moco])
def test_teacher_starts_as_a_copy_and_is_an_ema(make) -> None:
    method = make(momentum=0.9, momentum_end=0.9)
    student = dict(method.student.named_parameters())
    pairs = [(teacher, student[name]) for name, teacher in method.teacher.named_parameters()]
    assert len(pairs) > 10
    assert all(torch.equal(teacher, own) for teacher, own in pairs)
    before = [teacher.clone() for teacher, _ in pairs]
    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter.add_(1)
    method.after_step(method(images(), CLOCK).carry, CLOCK)
    for (teacher, _), old in zip(pairs, before, strict=True):
        torch.testing.assert_close(teacher, old + 0.1)


def test_byol_compares_predictions_with_projections() -> None:
    method, batch = byol(head_norm="none"), images(1)
    features = torch.cat([method.student.backbone(stack.flatten(0, 1)) for stack in batch.views])
    assert method.student.predictor is not None
    predictions = method.student.predictor(method.student.head(features)).unflatten(0, (3, 5))
    projections = method.teacher.head(method.teacher.backbone(batch.views[0].flatten(0, 1))).unflatten(0, (2, 5))
    torch.testing.assert_close(method(batch, CLOCK).loss, byol_loss(predictions, projections))
    assert byol(predictor=False).student.predictor is None


def test_moco_contrasts_with_earlier_keys_and_pushes_its_own() -> None:
    method = moco(head_norm="none")
    first, second = (method(images(1, seed=seed), CLOCK) for seed in (0, 7))
    assert first.loss == 0  # nothing to compare with yet
    method.after_step(first.carry, CLOCK)
    keys = torch.nn.functional.normalize(method.teacher(images(1).views[:1]), dim=-1)
    queued = method.queue.rows[method.queue.born == CLOCK.step]
    torch.testing.assert_close(queued, keys.transpose(0, 1).flatten(0, 1))
    loss = method(images(1, seed=7), CLOCK._replace(step=13)).loss
    batch = images(1, seed=7).views
    usable = torch.ones(10, dtype=torch.bool)
    torch.testing.assert_close(
        loss, info_nce(method.student(batch), method.teacher(batch[:1]), keys.flatten(0, 1), 0.1, usable)
    )
    assert second.loss == 0


@pytest.mark.parametrize(("age", "counts"), [(1, True), (3, True), (4, False), (9, False)])
def test_keys_older_than_an_epoch_are_masked(age: int, counts: bool) -> None:
    """In a queue larger than the dataset they belong to the query's own image."""
    method = moco(queue=100)
    method.after_step(method(images(), CLOCK).carry, CLOCK)
    assert (method(images(seed=7), CLOCK._replace(step=CLOCK.step + age)).loss > 0) == counts


def test_keys_of_the_last_step_are_valid_if_an_epoch_is_one_step() -> None:
    method, clock = moco(), Clock(3, 1, 9)
    method.after_step(method(images(), clock).carry, clock)
    assert method(images(), clock._replace(step=4)).loss > 0
    assert method(images(), clock._replace(step=5)).loss == 0


def slow_assignments(scores: Tensor, epsilon: float, iterations: int) -> list[list[float]]:
    """SwAV's Alg. 1, `sinkhorn`, of B images and K prototypes: rows sum to 1 / K, columns to 1 / B."""
    q = [[math.exp(float(s) / epsilon) for s in image] for image in scores]
    B, K = len(q), len(q[0])
    for _ in range(iterations):
        for k in range(K):
            total = sum(q[b][k] for b in range(B))
            for b in range(B):
                q[b][k] /= total * K
        for b in range(B):
            total = sum(q[b])
            q[b] = [value / (total * B) for value in q[b]]
    return [[B * value for value in row] for row in q]


@pytest.mark.parametrize("locals_", [0, 2])
def test_swav_predicts_assignments_of_the_other_views(locals_: int) -> None:
    """Caron et al. 2020, Eq. 1 and 2 and Algorithm 1, for one pair at a time."""
    method, batch = swav(head_norm="none"), images(locals_)
    features = torch.cat([method.backbone(stack.flatten(0, 1)) for stack in batch.views])
    z = torch.nn.functional.normalize(method.head.projection(features), dim=-1)
    scores = (z @ method.head.prototypes.weight.T).unflatten(0, (-1, 5)).detach()
    losses = []
    for x in range(2):
        targets = slow_assignments(scores[x], 0.05, 3)
        for other in range(2 + locals_):
            for image in range(5):
                if other != x:
                    guess = torch.log_softmax(scores[other, image] / 0.1, -1).tolist()
                    losses.append(-sum(q * p for q, p in zip(targets[image], guess, strict=True)))
    out = method(batch, CLOCK)
    assert out.loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert out.metrics["kl"] == out.metrics["loss"] - out.metrics["teacher_entropy"]


def test_swav_assigns_queue_and_batch_together_once_the_queue_is_full() -> None:
    method = swav(head_norm="none", queue=10, queue_from=3)
    alone = method(images(), CLOCK).loss
    for step, same in ((11, True), (12, True), (13, False)):  # kept from epoch 3 on: step 12
        clock = CLOCK._replace(step=step)
        method.after_step(method(images(seed=step), clock).carry, clock)
        now = method(images(), CLOCK._replace(step=step + 1)).loss
        assert torch.allclose(now, alone, rtol=1e-5) == same, step
    assert method.queue is not None
    features = method.network(images().views)
    z = torch.cat([method.queue.rows.transpose(0, 1), features], dim=1)
    scores = (z @ method.head.prototypes.weight.T).detach()
    expected = torch.tensor([slow_assignments(view, 0.05, 3)[-5:] for view in scores])
    torch.testing.assert_close(
        method.assign(features.detach(), CLOCK._replace(step=14)), expected, atol=1e-5, rtol=1e-4
    )


def test_swav_prototypes_are_normalised_and_frozen_at_first() -> None:
    method = swav(freeze_prototypes=2)
    weight = method.head.prototypes.weight
    lengths = weight.norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(9))
    for step, still in ((7, True), (8, False)):
        weight.grad = torch.ones_like(weight)
        method.before_step(CLOCK._replace(step=step))
        assert (weight.grad is None) == still
    with torch.no_grad():
        weight.mul_(3)
    method.after_step(method(images(), CLOCK).carry, CLOCK)
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(9))


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (BYOLConfig, "momentum", 1.5),
        (BYOLConfig, "head_layers", 0),
        (MoCoConfig, "queue", 0),
        (MoCoConfig, "temperature", 0.0),
        (SwAVConfig, "out_dim", 1),
        (SwAVConfig, "queue", -1),
    ],
)
def test_error_names_a_setting_out_of_range(config, field: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"`method\.{field}` must be .*; got {value}"):
        config(**{field: value})
