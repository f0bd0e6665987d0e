"""Multi-crop has the authors' distribution: each operation and the complete augmentation against torchvision."""

from collections import Counter

import cv2
import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter, ImageOps
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from dino_ssl.data.folder import Folder
from dino_ssl.data.loader import train_batches
from dino_ssl.data.transforms.base import crop_box
from dino_ssl.data.transforms.multi_crop import MultiCrop
from dino_ssl.data.transforms.pixel_ops import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    blur,
    gray,
    solarize,
    to_planar,
)
from dino_ssl.errors import UserError
from dino_ssl.preprocessing import MEAN, STD, Preprocessing, normalize, resize


def photo(height: int = 150, width: int = 200) -> np.ndarray:
    """Return smooth colored noise with some hard edges, with a spectrum similar to a photo's."""
    rng = np.random.default_rng(0)
    image = np.full((height, width, 3), 120.0)
    for cells, strength in ((3, 60), (9, 35), (40, 20), (150, 12)):
        noise = rng.normal(size=(cells, cells, 3)) * strength + 128
        image += np.asarray(Image.fromarray(noise.clip(0, 255).astype(np.uint8)).resize((width, height))) - 128.0
    image[30:60, 40:120] = (230, 40, 20)
    return image.clip(0, 255).astype(np.uint8)


PHOTO = photo()


def gap(ours: np.ndarray, reference: Image.Image) -> tuple[float, float]:
    """Return (mean absolute difference, difference of the means), in gray levels."""
    difference = ours.astype(float) - np.asarray(reference).astype(float)
    return float(np.abs(difference).mean()), float(abs(difference.mean()))


@pytest.mark.parametrize("box", [(0, 0, 150, 200), (10, 20, 30, 40), (3, 5, 96, 96), (0, 0, 140, 9)])
@pytest.mark.parametrize("size", [7, 96, 224])
def test_resize_is_pillows_antialiased_bicubic(box, size):
    top, left, h, w = box
    crop = PHOTO[top : top + h, left : left + w]
    reference = Image.fromarray(crop).resize((size, size), Image.Resampling.BICUBIC)
    ours = resize(crop, size, size)
    assert gap(ours, reference)[0] < 0.3
    assert np.abs(ours.astype(int) - np.asarray(reference)).max() <= 1
    assert ours.flags.c_contiguous, "the resize kernel for channels-first input takes twice as long"


@pytest.mark.parametrize("factor", [0.6, 0.85, 1.0, 1.2, 1.4])
def test_brightness_contrast_saturation(factor):
    image = Image.fromarray(PHOTO)
    assert gap(adjust_brightness(PHOTO, factor), TF.adjust_brightness(image, factor))[0] < 0.01
    assert gap(adjust_contrast(PHOTO, factor), TF.adjust_contrast(image, factor))[0] < 0.5
    assert gap(adjust_saturation(PHOTO, factor), TF.adjust_saturation(image, factor))[0] < 0.7


@pytest.mark.parametrize("turn", [-0.5, -0.1, -0.03, 0.0, 0.04, 0.1])
def test_hue(turn):
    spread, shift = gap(adjust_hue(PHOTO, turn), TF.adjust_hue(Image.fromarray(PHOTO), turn))
    assert spread < 1.0
    assert shift < 0.5


def test_gray_and_solarize():
    image = Image.fromarray(PHOTO)
    assert gap(gray(PHOTO), image.convert("L").convert("RGB"))[0] < 0.1
    np.testing.assert_array_equal(solarize(PHOTO, 128), np.asarray(ImageOps.solarize(image, 128)))


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 1.5, 2.0])
def test_blur_matches_pillow(sigma):
    reference = Image.fromarray(PHOTO).filter(ImageFilter.GaussianBlur(sigma))
    assert gap(blur(PHOTO, sigma), reference)[0] < 0.8
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    reference = np.asarray(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(sigma)))
    assert blur(noise, sigma).std() == pytest.approx(reference.std(), rel=0.06)


@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
@pytest.mark.parametrize("shape", [(375, 500), (100, 900)])
def test_crop_boxes_have_the_distribution_of_torchvision(scale, shape):
    rng, image = np.random.default_rng(0), torch.empty(3, *shape)
    ratio = (3 / 4, 4 / 3)
    torch.manual_seed(0)
    ours = np.array([crop_box(*shape, scale, ratio, rng) for _ in range(3000)], float)
    reference = np.array([T.RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(3000)], float)

    def facts(boxes):
        top, left, h, w = boxes.T
        return {"area": h * w / (shape[0] * shape[1]), "ratio": np.log(w / h), "y": (top + h / 2) / shape[0],
                "x": (left + w / 2) / shape[1]}  # fmt: skip

    assert (ours[:, 0] + ours[:, 2] <= shape[0]).all()
    assert (ours[:, 1] + ours[:, 3] <= shape[1]).all()
    for (name, a), b in zip(facts(ours).items(), facts(reference).values(), strict=True):
        levels = np.linspace(0.05, 0.95, 10)
        np.testing.assert_allclose(np.quantile(a, levels), np.quantile(b, levels), atol=0.035, err_msg=name)


def test_view_statistics_equal_those_of_torchvision():
    """Mean and standard deviation of each view's channel mean, contrast, saturation and sharpness."""
    image, draws = Image.fromarray(PHOTO), 300
    torch.manual_seed(0)
    color = [
        T.RandomHorizontalFlip(0.5),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        T.RandomGrayscale(0.2),
    ]

    def torchvision_view(size, scale, blurred, solarized):
        view = T.RandomResizedCrop(size, scale=scale, interpolation=T.InterpolationMode.BICUBIC)(image)
        for change in color:
            view = change(view)
        if torch.rand(()) < blurred:
            view = view.filter(ImageFilter.GaussianBlur(float(torch.empty(()).uniform_(0.1, 2.0))))
        if torch.rand(()) < solarized:
            view = ImageOps.solarize(view)
        return np.asarray(view)

    def facts(view):
        pixels = view.astype(float)
        saturation = pixels.max(2) - pixels.min(2)
        sharp = np.abs(np.diff(pixels, axis=1)).mean()
        return [*pixels.mean((0, 1)), *pixels.std((0, 1)), saturation.mean(), 10 * sharp]

    rng = np.random.default_rng(0)
    transform = MultiCrop(global_size=48, local_size=32, local=1)
    ours = np.array([[facts(view) for view in transform(PHOTO, rng)] for _ in range(draws)])
    kinds = [(48, (0.4, 1.0), 1.0, 0.0), (48, (0.4, 1.0), 0.1, 0.2), (32, (0.05, 0.4), 0.5, 0.0)]
    reference = np.array([[facts(torchvision_view(*kind)) for kind in kinds] for _ in range(draws)])
    # Two samples of 300: means differ by 4 standard errors at most, spreads by a fifth.
    error = np.sqrt((ours.var(0) + reference.var(0)) / draws)
    assert (np.abs(ours.mean(0) - reference.mean(0)) < 4 * error + 0.3).all()
    np.testing.assert_allclose(ours.std(0), reference.std(0), rtol=0.28, atol=0.3)


def test_each_field_changes_only_its_own_views():
    off = {"flip": 0.0, "jitter": 0.0, "gray": 0.0, "blur": (0.0,) * 3, "solarize": (0.0,) * 3}
    square = {
        "global_size": 64,
        "local_size": 64,
        "local": 1,
        "global_scale": (1.0, 1.0),
        "ratio": (1.0, 1.0),
    }
    image = PHOTO[:64, :64]

    def views(**changes):
        transform = MultiCrop(**(off | square | {"local_scale": (1.0, 1.0)} | changes))
        return transform(image, np.random.default_rng(0))

    for view in views():
        np.testing.assert_array_equal(view, image)
    for view in views(flip=1.0):
        np.testing.assert_array_equal(view, image[:, ::-1])
    for view in views(gray=1.0):
        np.testing.assert_array_equal(view, gray(image))
    for field, change in (("solarize", lambda v: solarize(v, 128)), ("blur", lambda v: blur(v, 2.0))):
        for kind in range(3):
            odds = tuple(float(k == kind) for k in range(3))
            for at, view in enumerate(views(**{field: odds, "blur_sigma": (2.0, 2.0)})):
                np.testing.assert_array_equal(view, change(image) if at == kind else image)
    none = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    for name in none:
        got = views(jitter=1.0, **(none | {name: 0.5}))[0].astype(int)
        still = views(jitter=1.0, **none)[0].astype(int)
        assert np.abs(still - image).max() <= 6  # 8-bit HSV and back
        assert np.abs(got - image).mean() > 2


def test_jitter_factors_belong_to_their_operations():
    image, off = PHOTO[:64, :64], {"flip": 0.0, "gray": 0.0, "blur": (0.0,) * 3, "solarize": (0.0,) * 3}
    crops = {"global_size": 64, "local": 0, "global_scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    operations = {
        "brightness": adjust_brightness,
        "contrast": adjust_contrast,
        "saturation": adjust_saturation,
        "hue": adjust_hue,
    }
    for index, (name, operation) in enumerate(operations.items()):
        transform = MultiCrop(**(crops | off | dict.fromkeys(operations, 0.0) | {name: 0.5, "jitter": 1.0}))
        for seed in range(5):
            view = transform(image, np.random.default_rng(seed))[0]
            params = transform.sample_params(64, 64, np.random.default_rng(seed))[0]
            expected = operation(image, params.factors[index])
            assert np.abs(view.astype(int) - expected).mean() < 2, name  # 8-bit HSV and back


def test_global_and_local_crops_have_their_own_scales():
    params = MultiCrop(local=4).sample_params(400, 500, np.random.default_rng(0))
    areas = [view.height * view.width / (400 * 500) for view in params]
    assert len(areas) == 6
    assert all(0.39 < area <= 1 for area in areas[:2])
    assert all(0.04 < area < 0.41 for area in areas[2:])


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (32, 32), (5, 2)])
def test_tiny_images(shape):
    image = np.full((*shape, 3), 77, np.uint8)
    transform = MultiCrop(global_size=32, local_size=16, local=2, jitter=0.0, solarize=(0.0, 0.0, 0.0))
    for seed in range(10):
        views = transform(image, np.random.default_rng(seed))
        assert [v.shape for v in views] == [(32, 32, 3)] * 2 + [(16, 16, 3)] * 2
        assert all((np.abs(v.astype(int) - 77) <= 1).all() for v in views)
    assert (Preprocessing(size=32).center_crop(image) == 77).all()


def test_views_are_a_function_of_the_random_generator():
    a, b, c = (MultiCrop(local=2)(PHOTO, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert all((x == y).all() for x, y in zip(a, b, strict=True))
    assert not any((x == y).all() for x, y in zip(a, c, strict=True))


@pytest.mark.parametrize("shape", [(150, 200), (200, 150), (90, 91), (100, 390)])
def test_eval_transform_is_resize_and_center_crop(shape):
    image = Image.fromarray(photo(*shape))
    reference = T.CenterCrop(112)(T.Resize(128, interpolation=T.InterpolationMode.BICUBIC)(image))
    ours = Preprocessing(size=112).center_crop(np.asarray(image))
    assert np.abs(ours.astype(int) - np.asarray(reference)).max() <= 1


def test_mean_and_standard_deviation_are_imagenets():
    assert (MEAN, STD) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def test_normalize_equals_torchvision_in_both_memory_formats():
    out = np.empty((2, 3, *PHOTO.shape[:2]), np.uint8)
    for image, planes in zip((PHOTO, PHOTO[::-1]), out, strict=True):
        to_planar(image, planes)
    reference = T.Compose([T.ToTensor(), T.Normalize(MEAN, STD)])(Image.fromarray(PHOTO))
    stacked = torch.from_numpy(out).unsqueeze(1)
    last = torch.from_numpy(np.stack([PHOTO, PHOTO[::-1]])).movedim(-1, -3).unsqueeze(1)
    for images in (stacked, last, stacked[:, :, :, 1:-1], last[:, :, :, 1:-1]):
        normalized, expected = normalize(images), reference[:, 1:-1] if images.shape[-2] < len(PHOTO) else reference
        torch.testing.assert_close(normalized[0, 0], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(normalized[1, 0], expected.flip(1), atol=1e-5, rtol=1e-5)
        assert images.dtype == torch.uint8
    assert normalize(last).movedim(-3, -1).is_contiguous()  # channels last is kept


@pytest.mark.parametrize("sigma", [0.1, 0.29, 0.31, 0.5, 0.77, 1.0, 1.7, 2.0, 3.3])
def test_blur_equals_a_gaussian_filter_rounded_to_8_bits(sigma):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    exact = cv2.GaussianBlur(noise.astype(np.float64), (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)
    blurred = blur(noise, sigma).astype(float)
    assert np.abs(blurred - exact).max() < 2.5
    assert abs(blurred.mean() - exact.mean()) < 0.05
    assert blurred.std() == pytest.approx(exact.std(), rel=0.015)
    np.testing.assert_array_equal(blur(np.full((9, 9, 3), 255, np.uint8), sigma), 255)  # the weights sum to 1


@pytest.mark.parametrize("factor", [0.6, 0.85, 1.0, 1.2, 1.4])
def test_brightness_truncates_like_pillow(factor):
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    reference = TF.adjust_brightness(Image.fromarray(levels), factor)
    np.testing.assert_array_equal(adjust_brightness(levels, factor), np.asarray(reference))


def test_jitter_orders_and_crop_positions_are_uniform():
    rng, transform = np.random.default_rng(0), MultiCrop(local=30, jitter=1.0)
    views = [view for _ in range(150) for view in transform.sample_params(40, 60, rng)]
    orders = Counter(view.order for view in views)
    assert len(orders) == 24
    assert chisquare(list(orders.values())) < 60  # 23 degrees of freedom: 49.7 in one of a thousand
    boxes = [crop_box(4, 6, (0.25, 0.25), (1.5, 1.5), rng) for _ in range(4000)]
    positions = Counter(box[:2] for box in boxes)
    assert {box[2:] for box in boxes} == {(2, 3)}
    assert positions.keys() == {(top, left) for top in range(3) for left in range(4)}
    assert chisquare(list(positions.values())) < 40  # 11 degrees of freedom: 31.3 in one of a thousand


@pytest.mark.parametrize(
    ("height", "width", "times"), [(900, 1200, 4), (450, 600, 2), (375, 500, 1), (3000, 4000, 8), (160, 9000, 1)]
)
def test_decode_scale_keeps_every_crop_larger_than_its_view(height, width, times):
    transform = MultiCrop(global_size=32, local_size=16)
    assert transform.decode_scale(height, width) == times
    rng = np.random.default_rng(0)
    for view in (view for _ in range(50) for view in transform.sample_params(height, width, rng)[2:]):
        assert min(view.height, view.width) + 1 >= 3 * 16 * times or times == 1
    assert MultiCrop(global_size=32, local_size=16, local=0).decode_scale(height, width) >= times
    assert MultiCrop(global_size=32, local_size=32).decode_scale(height, width) <= times


def test_views_of_a_downscaled_jpeg_equal_those_of_the_full_image(tmp_path):
    Image.fromarray(photo(900, 1200)).save(tmp_path / "large.jpg", quality=90)
    dataset = Folder(path=str(tmp_path)).open()
    full, small = dataset.read(0), dataset.subset(np.array([0])).read_downscaled(0, 4)
    assert small.shape == (225, 300, 3)
    for top, left, h, w in ((0, 0, 900, 1200), (400, 300, 200, 240), (88, 120, 400, 300)):
        one = resize(full[top : top + h, left : left + w], 16, 16).astype(int)
        two = resize(small[top // 4 : (top + h) // 4, left // 4 : (left + w) // 4], 16, 16).astype(int)
        assert np.abs(one - two).mean() < 0.5
        assert abs((one - two).mean()) < 0.2


def test_training_decodes_jpegs_at_the_decode_scale(tmp_path, monkeypatch):
    for number in range(2):
        Image.fromarray(photo(900, 1200)).save(tmp_path / f"{number}.jpg")
    seen, transform = [], MultiCrop(global_size=32, local_size=16)
    sample = MultiCrop.sample_params
    monkeypatch.setattr(
        MultiCrop, "sample_params", lambda self, h, w, rng: seen.append((h, w)) or sample(self, h, w, rng)
    )
    list(train_batches(Folder(path=str(tmp_path)).open(), transform, batch_size=2, seed=0, epochs=1))
    assert seen == [(225, 300)] * 2


def chisquare(counts):
    expected = sum(counts) / len(counts)
    return sum((count - expected) ** 2 / expected for count in counts)


@pytest.mark.parametrize(
    "wrong",
    [{"flip": 1.2}, {"blur": (1.0, 0.5)}, {"local": -1}, {"global_size": 0}, {"local_scale": (0.5, 0.4)},
     {"global_scale": (0.0, 1.0)}, {"hue": 0.6}, {"solarize": (0.0, -0.1, 0.0)}, {"contrast": -1.0}],
)  # fmt: skip
def test_invalid_settings_are_rejected_by_name(wrong):
    with pytest.raises(UserError, match=rf"views\.{next(iter(wrong))}.* got "):
        MultiCrop(**wrong)
