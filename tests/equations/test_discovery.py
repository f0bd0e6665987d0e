"""LOST, TokenCut, MaskCut and the guided filter equal slow implementations that follow their papers word by word."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from dino_ssl.data.benchmarks.voc import open_voc
from dino_ssl.data.synthetic.scenes import Scenes
from dino_ssl.discovery import spectral
from dino_ssl.discovery.guided_filter import guided_filter, refine
from dino_ssl.discovery.methods import lost, maskcut, tokencut
from dino_ssl.discovery.regions import box_of, component_at, largest_component, soft_mask
from dino_ssl.evals.attention_maps import network_input, resize_to_patches
from dino_ssl.evals.davis_score import jaccard
from dino_ssl.evals.label_propagation import resize_nearest
from dino_ssl.evals.object_masks import patch_features
from dino_ssl.models.backbone import Backbone
from dino_ssl.models.vit import ViT

VOC = Path(__file__).parents[3] / "shared" / "data" / "voc12"
GRID = (10, 9)


def clustered(seed: int, objects: int = 1, noise: float = 0.5, grid: tuple[int, int] = GRID) -> torch.Tensor:
    """Return the features [1, h w, 24] of a noisy background with a rectangle per object."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(objects + 1, 24, generator=generator)
    features = parts[0].expand(*grid, 24).clone()
    for number in range(objects):
        top, left = 1 + 4 * number, 1 + 4 * number
        features[top : top + 3, left : left + 3] = parts[number + 1] - 0.3 * parts[0]
    return (features + noise * torch.randn(*grid, 24, generator=generator)).reshape(1, -1, 24)


# -- slow implementations: loops over patches, a dense generalized eigenproblem, a flood fill ------------------------


def slow_component(mask: np.ndarray, seed: int) -> np.ndarray:
    region, stack = np.zeros_like(mask), [divmod(seed, mask.shape[1])]
    while stack:
        y, x = stack.pop()
        if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x] and not region[y, x]:
            region[y, x] = True
            stack += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    return region


def slow_box(mask: np.ndarray) -> tuple[float, ...]:
    cells = [(y, x) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]]
    ys, xs = zip(*cells, strict=True)
    return min(xs), min(ys), max(xs) + 1, max(ys) + 1


def slow_graph(features: np.ndarray, tau: float) -> np.ndarray:
    count = len(features)
    graph = np.full((count, count), 1e-5)
    for i, j in itertools.product(range(count), repeat=2):
        a, b = features[i], features[j]
        norm = np.linalg.norm(a) * np.linalg.norm(b)
        if norm > 0 and a @ b / norm > tau:
            graph[i, j] = 1
    return graph


def slow_eigenvector(graph: np.ndarray) -> np.ndarray:
    """Return the second smallest generalized eigenvector of (D - A) y = lambda D y, by the inverse of D."""
    degree = graph.sum(1)
    values, vectors = np.linalg.eig((np.diag(degree) - graph) / degree[:, None])
    vector = vectors[:, values.real.argsort()[1]].real
    return vector / np.linalg.norm(vector)


def slow_tokencut(features: np.ndarray, grid: tuple[int, int], tau: float) -> np.ndarray:
    vector = slow_eigenvector(slow_graph(features, tau))
    seed = int(np.argmax(np.abs(vector)))
    side = vector > vector.mean()
    return slow_component((side if side[seed] else ~side).reshape(grid), seed)


def slow_lost(features: np.ndarray, grid: tuple[int, int], k: int = 100) -> np.ndarray:
    count = len(features)
    product = np.array([[features[i] @ features[j] for j in range(count)] for i in range(count)])
    degrees = [sum(product[i, j] > 0 for j in range(count) if j != i) for i in range(count)]
    order = sorted(range(count), key=lambda i: degrees[i])
    similar = [i for i in order[:k] if product[order[0], i] > 0]
    return slow_component((sum(product[i] for i in similar) > 0).reshape(grid), order[0])


def slow_maskcut(features: np.ndarray, grid: tuple[int, int], tau: float, most: int) -> list[np.ndarray]:
    found: list[np.ndarray] = []
    for _ in range(most):
        free = ~np.any([np.zeros(grid, bool), *found], axis=0)
        vector = slow_eigenvector(slow_graph(features * free.reshape(-1, 1), tau))
        side = (vector > vector.mean()).reshape(grid)
        corners = sum(map(int, (side[0, 0], side[0, -1], side[-1, 0], side[-1, -1])))
        if corners >= 3 or not side.ravel()[np.abs(vector).argmax()]:
            vector = -vector
        mask = slow_component((vector > vector.mean()).reshape(grid), int(vector.argmax()))
        if found and (jaccard(mask, found[-1]) > 0.5 or mask.mean() <= 0.01):
            break
        found.append(mask & free)
    return found


# -- equality --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [20, 90, 200])
def test_the_eigenvector_is_that_of_the_generalized_problem(size: int) -> None:
    features = torch.randn(3, size, 6, generator=torch.Generator().manual_seed(size))
    graph = spectral.binary_graph(features, 0.2)
    for single, vector in zip(graph.numpy(), spectral.second_eigenvector(graph).numpy(), strict=True):
        expected = slow_eigenvector(single)
        np.testing.assert_allclose(vector * np.sign(vector @ expected), expected, atol=1e-5)
    np.testing.assert_array_equal(graph[0], slow_graph(features[0].numpy(), 0.2))


def test_lanczos_is_used_and_equals_the_dense_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = spectral.binary_graph(torch.cat([clustered(seed) for seed in range(4)]), 0.2)
    dense = spectral.dense_second_eigenvector(graph)
    monkeypatch.setattr(spectral, "dense_second_eigenvector", None)
    vectors = spectral.second_eigenvector(graph)
    torch.testing.assert_close(vectors * (vectors * dense).sum(-1, keepdim=True).sign(), dense, atol=1e-6, rtol=0)


def test_a_graph_of_low_rank_ends_the_krylov_space_of_one_image_only() -> None:
    blocks = torch.eye(3).repeat_interleave(30, 0)[None]  # three groups of equal patches: rank 3
    graph = spectral.binary_graph(torch.cat([blocks @ torch.randn(3, 24), clustered(0)]), 0.9)
    degree = graph.sum(-1)
    vectors = spectral.second_eigenvector(graph)
    laplacian = torch.diag_embed(degree) - graph
    value = (vectors * (laplacian @ vectors[..., None])[..., 0]).sum(-1) / (vectors.square() * degree).sum(-1)
    residual = (laplacian @ vectors[..., None])[..., 0] - value[:, None] * degree * vectors
    assert residual.abs().max() < 1e-6


def test_an_unconverged_eigenvector_comes_from_the_dense_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectral, "MAX_STEPS", 3)
    graph = spectral.binary_graph(clustered(1), 0.2)
    assert torch.equal(spectral.second_eigenvector(graph), spectral.dense_second_eigenvector(graph))


@pytest.mark.parametrize("seed", range(3))
def test_methods_equal_their_slow_implementations(seed: int) -> None:
    features = torch.cat([clustered(seed), clustered(seed + 10, objects=2)])
    for single, one, cut, several in zip(
        features.numpy(), lost(features, GRID), tokencut(features, GRID), maskcut(features, GRID), strict=True
    ):
        np.testing.assert_array_equal(one.masks, [slow_lost(single, GRID)])
        np.testing.assert_array_equal(cut.masks, [slow_tokencut(single, GRID, 0.2)])
        np.testing.assert_array_equal(several.masks, slow_maskcut(single, GRID, 0.15, 3))
        for found in (one, cut, several):
            assert ((found.soft > 0.5) <= found.masks).all()
            assert found.soft.min() >= 0
            assert found.soft.max() <= 1


@pytest.mark.parametrize("source", ["drawn", "VOC 2012"])
def test_methods_equal_their_slow_implementations_on_images(source: str) -> None:
    if source == "VOC 2012" and not VOC.is_dir():
        pytest.skip("the VOC 2012 images are not available")
    dataset = Scenes(count=3, size=64).open() if source == "drawn" else open_voc(VOC)
    torch.manual_seed(0)
    network = ViT(size="tiny", patch=16, depth=2, image_size=96).build().eval()
    for index in range(3):
        pixels = resize_to_patches(dataset.read(index), 96, 16)
        grid = pixels.shape[0] // 16, pixels.shape[1] // 16
        with torch.inference_mode():
            keys = patch_features(network, network_input(network, pixels[None]))
        keys = keys - keys.mean(1, keepdim=True)  # those of random weights have much in common
        mask, slow = tokencut(keys, grid)[0].masks[0], slow_tokencut(keys[0].numpy(), grid, 0.2)
        np.testing.assert_array_equal(mask, slow)
        assert box_of(mask) == slow_box(slow)
        np.testing.assert_array_equal(lost(keys, grid)[0].masks[0], slow_lost(keys[0].numpy(), grid))


def test_several_objects_are_found_one_by_one_and_do_not_overlap() -> None:
    found = maskcut(clustered(0, objects=2, noise=0.1), GRID, most=2)[0]
    assert len(found.masks) == 2
    assert not (found.masks[0] & found.masks[1]).any()
    expected = np.zeros((2, *GRID), bool)
    expected[0, 1:4, 1:4], expected[1, 5:8, 5:8] = True, True
    assert {tuple(mask.ravel()) for mask in found.masks} == {tuple(mask.ravel()) for mask in expected}


def test_images_of_a_batch_do_not_depend_on_each_other() -> None:
    batch = torch.cat([clustered(seed) for seed in range(3)])
    for method in (lost, tokencut, maskcut):
        alone = [method(features[None], GRID)[0].masks for features in batch]
        for together, single in zip(method(batch, GRID), alone, strict=True):
            np.testing.assert_array_equal(together.masks, single)


def test_components_have_common_sides() -> None:
    mask = np.array([[1, 0, 1, 1], [0, 1, 0, 1], [0, 1, 0, 0]], bool)
    assert component_at(mask, 3).sum() == 3
    np.testing.assert_array_equal(component_at(mask, 5), slow_component(mask, 5))
    np.testing.assert_array_equal(largest_component(mask), component_at(mask, 3))
    assert not largest_component(np.zeros((2, 2), bool)).any()


def test_boxes_are_in_pixels_and_end_with_the_image() -> None:
    mask = np.zeros((4, 5), bool)
    mask[1:3, 2:5] = True
    assert box_of(mask, cell=16, size=(60, 76)) == (32, 16, 76, 48)
    assert box_of(mask) == slow_box(mask)
    assert box_of(np.zeros((2, 2), bool)) == (0, 0, 0, 0)


def test_a_soft_mask_has_its_threshold_at_one_half() -> None:
    values, mask = np.array([[-1.0, 0.0], [1.0, 3.0]]), np.array([[False, False], [False, True]])
    np.testing.assert_allclose(soft_mask(values, 0.0, mask), [[0, 0.5], [0.5, 1]])


# -- the guided filter -------------------------------------------------------------------------------------------------


def slow_guided_filter(guide: np.ndarray, values: np.ndarray, radius: int, eps: float) -> np.ndarray:
    height, width = values.shape
    padded_guide = np.pad(guide, ((radius, radius), (radius, radius), (0, 0)), mode="symmetric")
    padded_values = np.pad(values, radius, mode="symmetric")
    side = 2 * radius + 1
    models = np.empty((height, width, 4))
    for y, x in itertools.product(range(height), range(width)):
        colors = padded_guide[y : y + side, x : x + side].reshape(-1, 3)
        target = padded_values[y : y + side, x : x + side].ravel()
        centered = colors - colors.mean(0)
        a = np.linalg.solve(centered.T @ centered / len(colors) + eps * np.eye(3), centered.T @ target / len(colors))
        models[y, x] = *a, target.mean() - a @ colors.mean(0)
    models = np.pad(models, ((radius, radius), (radius, radius), (0, 0)), mode="symmetric")
    result = np.empty_like(values)
    for y, x in itertools.product(range(height), range(width)):
        *a, b = models[y : y + side, x : x + side].reshape(-1, 4).mean(0)
        result[y, x] = a @ guide[y, x] + b
    return result


def test_the_guided_filter_fits_an_affine_function_of_the_color_in_every_window() -> None:
    rng = np.random.default_rng(0)
    guide, values = rng.random((9, 11, 3)).astype(np.float32), rng.random((9, 11)).astype(np.float32)
    expected = slow_guided_filter(guide.astype(float), values.astype(float), 2, 1e-2)
    slope, offset = guided_filter(guide, values, 2, 1e-2)
    np.testing.assert_allclose((slope * guide).sum(-1) + offset, expected, atol=1e-4)


def test_a_large_radius_is_fitted_on_a_smaller_image(monkeypatch: pytest.MonkeyPatch) -> None:
    image, true = Scenes(size=192, part="val").draw(1)
    coarse = ((true > 0).reshape(6, 32, 6, 32).mean((1, 3)) > 0.5).astype(np.float32)
    small = refine(image, coarse, 32) > 0.5
    monkeypatch.setattr("dino_ssl.discovery.guided_filter.MAX_RADIUS", 1000)
    exact = refine(image, coarse, 32) > 0.5
    assert not np.array_equal(small, exact)
    assert jaccard(small, exact) > 0.95


def test_refinement_moves_the_edges_of_coarse_masks_to_those_of_the_image() -> None:
    scores = []
    for index in range(4):
        image, true = Scenes(size=96, part="val").draw(index)
        fractions = (true > 0).reshape(12, 8, 12, 8).mean((1, 3))
        coarse = fractions > 0.5
        refined = refine(image, coarse.astype(np.float32), 8) > 0.5
        scores.append([jaccard(mask, true > 0) for mask in (resize_nearest(coarse, 96, 96), refined)])
    before, after = np.mean(scores, axis=0)
    assert after > before + 0.05


# -- keys ------------------------------------------------------------------------------------------------------------


def test_patch_features_are_the_keys_with_their_bias() -> None:
    torch.manual_seed(0)
    network = ViT(size="tiny", patch=8, depth=2, image_size=32, registers=2).build().eval()
    torch.nn.init.normal_(network.blocks[1].attn.qkv.bias)  # pyright: ignore
    images, seen = torch.randn(2, 3, 32, 24), {}
    network.blocks[1].attn.qkv.register_forward_hook(lambda _, __, out: seen.update(out=out))  # pyright: ignore
    with torch.no_grad():
        keys = patch_features(network, images)
    torch.testing.assert_close(keys, seen["out"][:, 3:, 192:384])


def test_a_network_without_attention_has_its_feature_map(feature_map_network: Backbone) -> None:
    images = torch.randn(1, 3, 64, 32)
    expected = feature_map_network.features(images)[0].patches.reshape(1, 2, -1)
    assert torch.equal(patch_features(feature_map_network, images), expected)


@pytest.fixture
def feature_map_network() -> Backbone:
    from dino_ssl.models.timm import Timm

    return Timm(name="test_resnet").build().eval()
