"""Images at their own aspect ratio: sizes, boxes, and batches of one shape each."""

import numpy as np
import pytest

from dino_ssl.data.dataset import BadImage, ImageDataset
from dino_ssl.data.loader import shaped_batches
from dino_ssl.data.transforms.native_size import CroppedImages, scale_to, scaled
from dino_ssl.preprocessing import resize


class Mixed(ImageDataset):
    """Noise of three alternating shapes; one image cannot be read."""

    def __init__(self, count: int, bad: int = -1) -> None:
        sizes = [((40, 30), (30, 40), (20, 20))[i % 3] for i in range(count)]
        super().__init__(names=[str(i) for i in range(count)], sizes=sizes)
        self.bad = bad

    def read(self, index: int) -> np.ndarray:
        if index == self.bad:
            raise BadImage(index, "broken")
        width, height = self.sizes[index]
        return np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_aspect_ratios_are_kept_and_images_never_grow() -> None:
    sizes = np.array([[1024, 768], [300, 1200], [20, 10], [2000, 4]])
    scale = scale_to(sizes, 512)
    assert scaled(sizes, scale).tolist() == [[384, 512], [512, 128], [10, 20], [1, 512]]
    assert scaled(sizes, scale, least=16).tolist() == [[384, 512], [512, 128], [16, 20], [16, 512]]


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_have_one_shape_and_at_most_the_given_pixels(workers: int) -> None:
    dataset = Mixed(20, bad=4)
    shapes = scaled(dataset.sizes, scale_to(dataset.sizes, 20))
    chosen, resized, batches = [*range(1, 20)], {}, 0
    for indices, images in shaped_batches(dataset, shapes, pixels=1000, indices=chosen, workers=workers):
        batches += 1
        assert len(images) * images.shape[2] * images.shape[3] <= 1000
        for index, image in zip(indices.tolist(), images, strict=True):
            assert index not in resized
            resized[index] = image
            expected = resize(dataset.read(index), *shapes[index].tolist())
            np.testing.assert_array_equal(image.numpy(), expected.transpose(2, 0, 1))
    assert sorted(resized) == [i for i in chosen if i != 4]
    assert batches == 2 + 3 + 3  # 6 and 7 images of 300 pixels in threes, 6 of 400 in twos


def test_an_image_above_the_pixel_limit_is_a_single_batch() -> None:
    dataset = Mixed(3)
    shapes = scaled(dataset.sizes, scale_to(dataset.sizes, 40))
    assert [len(i) for i, _ in shaped_batches(dataset, shapes, pixels=1, indices=range(3))] == [1, 1, 1]


def test_images_of_one_shape_are_in_order() -> None:
    dataset = Mixed(12)
    batches = shaped_batches(dataset, np.full((12, 2), 8), pixels=5 * 64, indices=range(12))
    assert [i.tolist() for i, _ in batches] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]


def test_boxes_are_rounded_and_clipped() -> None:
    dataset = Mixed(1)
    box = CroppedImages(dataset, np.array([[2.4, 3.6, 50.0, 9.5]]))
    assert box.sizes.tolist() == [[38, 6]]
    np.testing.assert_array_equal(box.read(0), dataset.read(0)[4:10, 2:40])
