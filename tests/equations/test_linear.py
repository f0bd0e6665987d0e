"""Linear evaluation: equal to torch's SGD, one classifier at a time; the selection does not use VAL."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_ssl.data.dataset import BadImage, ImageDataset
from dino_ssl.data.loader import crop_batches, sample_rng
from dino_ssl.data.transforms.base import RATIO, SCALE, crop_box, random_crop
from dino_ssl.errors import UserError
from dino_ssl.evals import linear
from dino_ssl.evals.base import EvalContext, PreparedEval, evaluating
from dino_ssl.evals.linear import FeatureSpec, Linear, LinearHeads, class_rank, frozen_feature
from dino_ssl.models.backbone import Backbone, Features
from dino_ssl.models.vit import ViT
from dino_ssl.preprocessing import normalize, resize


class Tinted(ImageDataset):
    """Gray noise with a tint for each class; the images `bad` cannot be read."""

    def __init__(self, count: int, labels: list[int] | None = None, bad: tuple[int, ...] = (), seed: int = 0) -> None:
        self.bad, self.seed = bad, seed
        self.kinds = [i % 4 for i in range(count)]
        super().__init__(
            names=[f"{seed}/{i}.png" for i in range(count)],
            sizes=[(24, 20)] * count,
            labels=self.kinds if labels is None else labels,
            classes=["a", "b", "c", "d"],
        )

    def read(self, index: int) -> np.ndarray:
        if index in self.bad:
            raise BadImage(self.names[index], "cut short")
        rng = np.random.default_rng([self.seed, index])
        image = rng.integers(60, 120, (20, 24, 3), dtype=np.uint8)
        if self.kinds[index]:
            image[..., self.kinds[index] - 1] += rng.integers(20, 60, dtype=np.uint8)
        return image


class Conv(Backbone):
    """A ConvNet of two layers."""

    embed_dim, patch = 12, 4

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.BatchNorm2d(12))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images).mean((2, 3))

    def features(self, images: Tensor, layers: int = 1) -> list[Features]:
        out = self.net(images)
        return [Features(out.mean((2, 3)), out.permute(0, 2, 3, 1))]


def vit(width: int = 24, depth: int = 5, heads: int = 2) -> Backbone:
    torch.manual_seed(0)
    return ViT(width=width, depth=depth, heads=heads, patch=8, image_size=16, drop_path=0.3).build()


CONTEXT = EvalContext(size=16, batch_size=16)
QUICK = Linear(epochs=6, crops=2, batch=32, lr=(0.01, 1.0, 10.0))


def prepare(
    settings: Linear = QUICK,
    context: EvalContext = CONTEXT,
    train: ImageDataset | None = None,
    val: ImageDataset | None = None,
) -> PreparedEval:
    return settings.prepare((train or Tinted(80), val or Tinted(40, seed=1)), context)


def fit(
    settings: Linear,
    backbone: Backbone,
    train: ImageDataset | None = None,
    tune_mask: np.ndarray | None = None,
    context: EvalContext = CONTEXT,
) -> Tensor:
    """Return the trained weights [D + 1, T, C]."""
    train = train or Tinted(80)
    spec = settings.feature_spec(backbone)
    tune_mask = settings.tune_mask(train) if tune_mask is None else tune_mask

    def extract(images: Tensor) -> Tensor:
        return frozen_feature(backbone, normalize(images), spec)

    with evaluating(backbone):
        width = extract(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)).shape[1]
        return settings.fit(train, tune_mask, extract, width, context).weights.clone()


# -- the classifiers -----------------------------------------------------------------------------------------------


def test_parallel_heads_equal_sgd_of_each_head() -> None:
    rng = torch.Generator().manual_seed(0)
    batches = [(torch.randn(9, 5, generator=rng), torch.randint(3, (9,), generator=rng)) for _ in range(8)]
    rates, decay = [0.1, 2.0, 0.5], 0.01
    heads = LinearHeads(5, 3, rates, decay, seed=4)
    initial = heads.weights.clone()
    for step, (x, y) in enumerate(batches):
        heads.step(x, y, torch.ones(9, 3, dtype=torch.bool), factor=1 - step / 8)
    assert torch.equal(initial[-1], torch.zeros(3, 3))  # biases
    for which, lr in enumerate(rates):
        alone = nn.Linear(5, 3)
        alone.load_state_dict({"weight": initial[:-1, which].T.clone(), "bias": torch.zeros(3)})
        solver = torch.optim.SGD(alone.parameters(), lr=lr, momentum=0.9, weight_decay=decay)
        for step, (x, y) in enumerate(batches):
            solver.param_groups[0]["lr"] = lr * (1 - step / 8)
            solver.zero_grad()
            F.cross_entropy(alone(x), y).backward()
            solver.step()
        torch.testing.assert_close(heads.weights[:-1, which].T, alone.weight.detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(heads.weights[-1, which], alone.bias.detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            heads.logits(batches[0][0])[:, which], alone(batches[0][0]).detach(), atol=1e-4, rtol=0
        )


def test_a_head_learns_only_from_its_masked_images() -> None:
    x, y = torch.randn(7, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    mask = torch.tensor([[True, True]] * 5 + [[False, True]] * 2)
    both, part = LinearHeads(4, 3, [0.5, 0.5]), LinearHeads(4, 3, [0.5])
    both.step(x, y, mask)
    part.step(x[:5], y[:5], mask[:5, :1])
    torch.testing.assert_close(both.weights[:, 0], part.weights[:, 0])
    assert not torch.allclose(both.weights[:, 1], part.weights[:, 0])
    empty = LinearHeads(4, 3, [0.5])
    before = empty.weights.clone()
    empty.step(x[:0], y[:0], mask[:0, :1])  # a rank may have no image of a small batch
    assert torch.equal(empty.weights, before)


def test_class_rank_equals_a_stable_sort() -> None:
    logits = torch.randn(50, 3, 7).mul(2).round()  # with many ties
    labels = torch.randint(7, (50,))
    order = logits.sort(dim=2, descending=True, stable=True).indices
    assert torch.equal(class_rank(logits, labels), (order == labels[:, None, None]).int().argmax(2))


def test_a_diverged_classifier_is_never_correct() -> None:
    logits = torch.tensor([[[0.0, 1.0, 2.0], [torch.nan, torch.nan, torch.nan], [torch.inf, 0.0, 0.0]]])
    assert class_rank(logits, torch.tensor([2])).tolist() == [[0, 5, 5]]
    scores = prepare(replace(QUICK, lr=(1e42, 1.0)))(Conv())
    table = scores.details["sweep"]
    assert table[0]["top-1 on held-out training images"] == 0
    assert scores.details["selected"]["lr"] == 1.0
    assert dict(prepare(replace(QUICK, lr=(1e42,)))(Conv())) == {"top-1": 0, "top-5": 0}


# -- features and crops --------------------------------------------------------------------------------------------


def test_features_follow_the_paper() -> None:
    """Appendix F.2: 4 [CLS] of ViT-S; [CLS] and mean patch of ViT-B; the pooled feature of a ConvNet."""
    images = torch.randn(2, 3, 16, 16)
    small, base, conv = vit(), vit(width=768, depth=1, heads=12), Conv()
    with evaluating(small), evaluating(base), evaluating(conv):
        assert Linear().feature_spec(small) == FeatureSpec(4, False)
        expected = torch.cat([block.cls for block in small.features(images, 4)], 1)
        assert torch.equal(frozen_feature(small, images, FeatureSpec(4, False)), expected)
        torch.testing.assert_close(expected[:, -24:], small(images))
        assert Linear().feature_spec(base) == FeatureSpec(1, True)
        last = base.features(images)[0]
        feature = frozen_feature(base, images, FeatureSpec(1, True))
        assert torch.equal(feature, torch.cat([last.cls, last.patches.flatten(1, 2).mean(1)], 1))
        assert Linear().feature_spec(conv) == FeatureSpec(1, False)
        assert torch.equal(frozen_feature(conv, images, FeatureSpec(1, False)), conv(images))
    assert Linear().feature_spec(vit(depth=2)) == FeatureSpec(2, False)  # it has only two blocks


@pytest.mark.parametrize(
    ("change", "spec"),
    [
        (dict(), FeatureSpec(4, False)),
        (dict(blocks=2), FeatureSpec(2, False)),
        (dict(patches=True), FeatureSpec(4, True)),
        (dict(blocks=1, patches=True), FeatureSpec(1, True)),
    ],
)
def test_settings_override_the_default_feature(change: dict, spec: FeatureSpec) -> None:
    assert Linear(**change).feature_spec(vit()) == spec
    assert Linear(blocks=1).feature_spec(vit(width=768, depth=1, heads=12)) == FeatureSpec(1, False)


def test_random_crops_equal_torchvision() -> None:
    """The same box, resized by Pillow as in torchvision, differs by at most one gray level."""
    from PIL import Image
    from torchvision.transforms import functional as tv

    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    flips = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        crop = random_crop(image, 24, np.random.default_rng(seed))
        box = crop_box(50, 70, SCALE, RATIO, rng)
        flipped = rng.random() < 0.5
        flips += flipped
        expected = np.asarray(tv.resized_crop(Image.fromarray(image), *box, [24, 24]))
        expected = expected[:, ::-1] if flipped else expected
        assert np.abs(crop.astype(int) - expected.astype(int)).max() <= 1
    assert 4 <= flips <= 16
    assert resize(image, 24, 24, "bilinear").shape == (24, 24, 3)


def test_a_crop_depends_only_on_seed_epoch_and_image() -> None:
    dataset = Tinted(9, bad=(4,))
    rows, images = next(crop_batches(dataset, 12, [(2, np.arange(9))], seed=5))
    assert rows.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    expected = random_crop(dataset.read(7), 12, sample_rng(5, 2, 7)).transpose(2, 0, 1)
    assert np.array_equal(images[rows.tolist().index(7)].numpy(), expected)
    for seed, epoch in ((5, 3), (6, 2)):
        other = next(crop_batches(dataset, 12, [(epoch, np.array([7]))], seed=seed))[1][0]
        assert not np.array_equal(other.numpy(), expected)


# -- the protocol --------------------------------------------------------------------------------------------------


def test_a_sweep_equals_training_each_rate_separately() -> None:
    backbone = vit()
    sweep = fit(QUICK, backbone)
    for index, lr in enumerate(QUICK.lr):
        single = fit(replace(QUICK, lr=(lr,)), backbone)  # without a selection, all images are used
        torch.testing.assert_close(sweep[:, 3 + index], single[:, 0], atol=1e-5, rtol=1e-5)
    scores = prepare()(backbone)
    single = prepare(replace(QUICK, lr=(scores.details["selected"]["lr"],)))(backbone)
    assert dict(single) == dict(scores)
    assert set(scores) == {"top-1", "top-5"}


def test_learning_rates_are_for_a_batch_of_256() -> None:
    """Half the batch with twice the rate has the same updates; a batch is at most the number of images."""
    rates = []
    for batch, lr in ((32, 0.8), (64, 0.4), (1000, 0.32)):
        settings = Linear(epochs=1, crops=1, batch=batch, lr=(lr,))
        heads = settings.fit(Tinted(80), np.zeros(80, bool), lambda x: x.flatten(1).float() / 255, 768, CONTEXT)
        rates.append(float(heads.lr))
    assert rates == pytest.approx([0.1] * 3)


def test_the_selection_does_not_use_val() -> None:
    """Wrong labels in VAL change the accuracy, but neither the selection nor the training."""
    honest = prepare()(vit())
    poisoned = prepare(val=Tinted(40, labels=[(i + 1) % 4 for i in range(40)], seed=1))(vit())
    assert poisoned.details == honest.details
    assert poisoned["top-1"] < 50 < honest["top-1"]
    table = [row["top-1 on held-out training images"] for row in honest.details["sweep"]]
    assert len(set(table)) > 1
    assert honest.details["sweep"][table.index(max(table))]["lr"] == honest.details["selected"]["lr"]


def test_held_out_training_images_train_only_the_final_classifiers() -> None:
    train, backbone = Tinted(80), Conv()
    mask = QUICK.tune_mask(train)
    assert np.bincount(np.asarray(train.labels)[mask]).tolist() == [2, 2, 2, 2]  # 10 % of every class
    wrong = [(i % 4 + mask[i]) % 4 for i in range(80)]
    honest = fit(QUICK, backbone, train)
    other = fit(QUICK, backbone, Tinted(80, labels=wrong), mask)
    assert torch.equal(other[:, :3], honest[:, :3])
    assert not torch.allclose(other[:, 3:], honest[:, 3:])


def test_separable_classes_reach_100_percent_and_random_labels_chance() -> None:
    for backbone in (vit(), Conv()):
        assert prepare(replace(QUICK, epochs=30))(backbone)["top-1"] == 100
    rng = np.random.default_rng(0)
    random = [Tinted(n, labels=rng.integers(0, 4, n).tolist(), seed=n) for n in (80, 120)]
    scores = prepare(train=random[0], val=random[1])(Conv())
    assert scores["top-1"] == pytest.approx(25, abs=10)
    assert scores["top-5"] == 100  # four classes: any of five guesses


def test_one_stored_crop_per_epoch_equals_fresh_crops() -> None:
    backbone, train = vit(depth=2), Tinted(50, bad=(7, 20))
    stored = fit(replace(QUICK, crops=6), backbone, train)
    fresh = fit(replace(QUICK, crops=0), backbone, train)
    torch.testing.assert_close(stored, fresh, atol=1e-5, rtol=1e-5)
    fewer = fit(replace(QUICK, crops=1), backbone, train)
    assert not torch.allclose(fewer, fresh, atol=1e-3)


def test_stored_crops_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "machine_memory", lambda: 10_000)
    with pytest.raises(UserError, match="Set `crops` to a smaller number"):
        fit(replace(QUICK, crops=6), vit(), Tinted(50))


def test_the_batch_size_does_not_matter() -> None:
    settings, backbone = replace(QUICK, crops=2, epochs=3), vit(depth=2)
    other = fit(settings, backbone, context=replace(CONTEXT, batch_size=5))
    torch.testing.assert_close(other, fit(settings, backbone), atol=1e-5, rtol=1e-5)


def test_progress_is_reported_and_the_mode_is_restored() -> None:
    last: dict[str, tuple[int, int]] = {}

    def progress(label: str):
        return nullcontext(lambda done, total: last.__setitem__(label, (done, total)))

    backbone = Conv().train()
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    prepare(context=replace(CONTEXT, progress=progress))(backbone)
    assert torch.equal(torch.rand(2), expected)
    assert backbone.training
    assert all(done == total for done, total in last.values())
    assert last["training the classifiers"] == (480, 480)


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(lr=()), "`lr` needs"),
        (dict(lr=(0.1, 0.0)), "`lr` must be above 0"),
        (dict(weight_decay=-1.0), "`weight_decay` must be at least 0"),
        (dict(tune_fraction=1.0), "`tune_fraction` must be"),
        (dict(epochs=0), "`epochs` must be at least 1"),
        (dict(crops=-1), "`crops` must be at least 0"),
    ],
)
def test_invalid_settings_are_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Linear(**change)


def test_unsuitable_data_and_networks_are_refused() -> None:
    with pytest.raises(UserError, match="labeled validation images"):
        prepare(val=Tinted(4, labels=[-1] * 4))
    single = prepare(train=Tinted(4))
    with pytest.raises(UserError, match="no class has two"):
        single(Conv())
    with pytest.raises(UserError, match=r"[Ee]xpected 1 to 5 layers"):
        prepare(Linear(blocks=9))(vit())
