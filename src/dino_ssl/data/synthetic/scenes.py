"""Synthetic dataset: images that the package renders itself, with classes, masks and videos.

An image shows an object on a patterned background. The class is the outline of the object (`KINDS`) and the pattern on
it; position, rotation, size, colors, light and clutter have the same distribution for every class, and every kind
covers the same area, so that neither raw pixels nor colors reveal the class. Image i is a function of (settings, i):
any number, in any order, in any process.

    Scenes(count=2000).open()                      2000 training images
    Scenes(count=500, part="val").open()           500 other images of the same distribution
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np

from dino_ssl.data.dataset import DatasetConfig, ImageDataset
from dino_ssl.data.synthetic import painting
from dino_ssl.data.synthetic.painting import KINDS, Array, Layer, Pose, Texture
from dino_ssl.errors import UserError, check_range
from dino_ssl.files import write_errors
from dino_ssl.progress import Progress

Image = np.ndarray  # uint8 RGB [h, w, 3]; a mask is uint8 [h, w]
Rng = np.random.Generator
Range = tuple[float, float]
PARTS = ("train", "val", "test")
_OBJECT, _SCENE, _VIDEO = range(3)  # independent random streams of one image
_PALETTE = np.array([[89.0, 0, 13], [32, 4, -26]])  # CIELAB: cream and indigo


class Scene(NamedTuple):
    """Description of an image: layers behind the object from back to front, the object, and what occludes it."""

    background: list[Layer]
    object: Layer
    occluders: list[Layer]


class Video(NamedTuple):
    """frames [T, s, s, 3] and masks [T, s, s], uint8: 0 background, 1 and 2 objects."""

    frames: Image
    masks: Image


@dataclass(frozen=True, kw_only=True)
class Scenes(DatasetConfig):
    """Synthetic images, a function of these settings."""

    count: int = 2000
    """Number of images; image i does not depend on it."""
    size: int = 96
    """Side of an image in pixels; the same scene is rendered at any size."""
    classes: int = len(KINDS)
    """Number of classes, 2 to 10: star, flower, gear, saw, clover, heart, drop, shell, cross, peanut."""
    seed: int = 0
    """Random seed."""
    part: Literal["train", "val", "test"] = "train"
    """Disjoint parts of a seed."""
    object_size: tuple[float, float] = (0.32, 0.5)
    """Smallest and largest size of an object: the side of a square of its area, relative to the image side."""
    rotation: float = 60.0
    """Largest rotation of an object in degrees, in both directions; 180 for any."""
    clutter: int = 5
    """Largest number of bars behind the object; one image in four has one in front of it. 0: none."""
    one_palette: bool = False
    """Draw all objects in the same two colors on a background of their mean: colors carry no information."""

    @property
    def spec(self) -> str:
        """The word `scenes`."""
        return "scenes"

    @property
    def scenes(self) -> "Scenes":
        """These settings, as an opened `SyntheticDataset` has them."""
        return self

    def __post_init__(self) -> None:
        check_range(self, "count", "seed", "clutter", least=0)
        check_range(self, "size", least=16)
        check_range(self, "classes", least=2, most=len(KINDS))
        check_range(self, "rotation", least=0, most=180)
        check_range(self, "object_size", least=0.05, most=1)
        if self.part not in PARTS:
            raise UserError(f"`part` must be one of {', '.join(PARTS)}; got {self.part!r}.")

    def open(self, progress: Progress | None = None) -> "SyntheticDataset":
        """Return the dataset; images are rendered when they are read."""
        return SyntheticDataset(self, [(i, 0) for i in range(self.count)])

    def name(self, i: int, view: int = 0) -> str:
        """Return the name of image i, below the folder of its class."""
        return f"{KINDS[self.label(i)]}/{self.part}-{self.seed}-{i:06d}{f'-view{view}' * (view > 0)}.png"

    def label(self, i: int) -> int:
        """Return the class of image i; the classes alternate."""
        return int(i) % self.classes

    def read(self, i: int) -> Image:
        """Return image i, uint8 RGB [s, s, 3]."""
        return self.draw(i)[0]

    def mask(self, i: int) -> Image:
        """Return the mask of image i, uint8 [s, s]: 0 background and clutter, 1 the object."""
        return self.draw(i)[1]

    def draw(self, i: int, view: int = 0) -> tuple[Image, Image]:
        """Return (image [s, s, 3] RGB, mask [s, s]), uint8; see `scene` for views."""
        scene = self.scene(i, view)
        return painting.render(self.size, [*scene.background, scene.object, *scene.occluders])

    def write(self, folder: str | Path) -> None:
        """Write all images as PNG files in class folders, e.g. FOLDER/star/train-0-000000.png."""
        for i in range(self.count):
            path = Path(folder) / self.name(i)
            with write_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                if not cv2.imwrite(str(path), self.read(i)[..., ::-1]):
                    raise OSError("the image was not written")

    def video(self, i: int, frames: int = 24) -> Video:
        """Return a video of image i's object; for odd i, another object moves in front of it.

        The objects follow smooth paths and the background drifts; more frames give a slower video of the same path.
        """
        rng, scene = self._rng(i, _VIDEO), self.scene(i)
        objects, drift = [scene.object], np.array([*rng.normal(0, 0.15, 2), 0, 0])
        if i % 2:
            other = (self.label(i) + int(rng.integers(1, self.classes))) % self.classes
            objects.append(self._sample_object(rng, other)._replace(label=2))
        half = math.radians(self.rotation) / 2
        paths = []  # center, amplitude and phase of a sinusoidal change of the pose
        for size in rng.uniform([0.3, 0.2], [0.4, 0.26]):
            center = np.array([*rng.uniform(-0.1, 0.1, 2), rng.uniform(-half, half), size])
            amplitude = [*rng.uniform(0.12, 0.22, 2), rng.uniform(0.3, 1) * half, rng.uniform(0.05, 0.15) * size]
            paths.append((center, amplitude, rng.uniform(0, 2 * np.pi, 4)))
        rendered = []
        for time in np.linspace(-0.5, 0.5, frames):
            poses = [np.add(layer.pose, time * drift) for layer in scene.background]
            poses += [center + amplitude * np.sin(phase + time * 4 * np.pi / 3) for center, amplitude, phase in paths]
            layers = zip([*scene.background, *objects], poses, strict=False)
            posed = [layer._replace(pose=Pose(*pose.tolist())) for layer, pose in layers]
            rendered.append(painting.render(self.size, posed))
        return Video(*(np.stack(arrays) for arrays in zip(*rendered, strict=True)))

    def scene(self, i: int, view: int = 0) -> Scene:
        """Return the scene of image i. Another `view` shows the same object in another pose, background and light."""
        obj, rng = self._sample_object(self._rng(i, _OBJECT), self.label(i)), self._rng(i, _SCENE, view)
        size = float(rng.uniform(*self.object_size))
        room = max(0.58 - 0.7 * size, 0.1)
        x, y, turn = (rng.uniform(-1, 1, 3) * [room, room, math.radians(self.rotation)]).tolist()
        color = mean = obj.texture.colors.mean(0)
        while not self.one_palette and abs(color[0] - mean[0]) < 20:
            color = _sample_color(rng)
        texture = _sample_texture(rng, color, size=3.0, strength=0.0 if self.one_palette else 1.0)
        background, occluders = [Layer(painting.bar_outline(1.0), texture, Pose(0, 0, 0, 3.0))], []
        if self.clutter:
            for _ in range(rng.integers(1, 3)):
                background.append(_sample_bar(rng, color, rng.uniform(-0.6, 0.6, 2), (0.4, 0.7), (0.3, 0.9)))
            for _ in range(rng.integers(self.clutter + 1)):
                near = color if rng.random() < 0.6 else mean
                background.append(_sample_bar(rng, near, rng.uniform(-0.5, 0.5, 2), (0.08, 0.24), (0.1, 1)))
            if rng.random() < 0.25:
                occluders.append(_sample_bar(rng, color, rng.normal((x, y), 0.2), (0.1, 0.16), (0.08, 0.2)))
        return Scene(background, obj._replace(pose=Pose(x, y, turn, size)), occluders)

    def _rng(self, i: int, stream: int, *more: int) -> Rng:
        return np.random.default_rng([self.seed, PARTS.index(self.part), int(i), stream, *more])

    def _sample_object(self, rng: Rng, label: int) -> Layer:
        """Return an object of a class in the center."""
        color = _sample_color(rng)
        step = [rng.uniform(25, 40) * (1 if color[0] < 60 else -1), *rng.normal(0, 15, 2)]
        texture = _sample_texture(rng, color, size=1.0, strength=1.0)._replace(
            pattern=painting.PATTERNS[label],
            frequency=float(rng.uniform(4.5, 6.5)),
            colors=rng.permutation(_PALETTE) if self.one_palette else np.stack([color, color + step]),
            light=(0.0, 0.0) if self.one_palette else (-0.25, -0.25),
        )
        return Layer(
            painting.object_outline(KINDS[label], int(rng.integers(painting.VARIANTS))),
            texture,
            Pose(0, 0, 0, 1),
            label=1,
        )


def _sample_color(rng: Rng) -> Array:  # CIELAB
    return np.array([rng.uniform(35, 85), *rng.normal(0, 20, 2)])


def _sample_texture(rng: Rng, color: Array, size: float, strength: float) -> Texture:
    """Return a random pattern for a layer of this size; strength 0 gives a plain color."""
    return Texture(
        pattern=painting.PATTERNS[rng.integers(len(painting.PATTERNS))],
        frequency=size * float(rng.uniform(3, 9)),
        angle=float(rng.uniform(0, 2 * np.pi)),
        shift=tuple(rng.uniform(0, 8, 2).tolist()),
        colors=np.stack([color, color + strength * rng.normal(0, 7, 3)]),
        light=tuple((strength * size * rng.normal(0, 0.2, 2)).tolist()),
    )


def _sample_bar(rng: Rng, color: Array, center: Array, sizes: Range, slims: Range) -> Layer:
    """Return a bar of similar color; `slims`: smallest and largest ratio of its width to its length."""
    pose = Pose(float(center[0]), float(center[1]), float(rng.uniform(0, np.pi)), float(rng.uniform(*sizes)))
    texture = _sample_texture(rng, color + rng.normal(0, 12, 3), pose.size, strength=1.0)
    return Layer(painting.bar_outline(float(rng.uniform(*slims))), texture, pose)


class SyntheticDataset(ImageDataset):
    """Images (index, view) of `Scenes`, with labels and masks."""

    def __init__(self, scenes: Scenes, items: Sequence[tuple[int, int]]) -> None:
        super().__init__(
            names=[scenes.name(i, view) for i, view in items],
            sizes=np.full((len(items), 2), scenes.size),
            labels=np.array([scenes.label(i) for i, _ in items], dtype=np.int64),
            classes=KINDS[: scenes.classes],
        )
        self.scenes, self.items = scenes, items

    @property
    def fingerprint(self) -> str:
        """16 hex digits over names, sizes, labels and all settings."""
        settings = json.dumps(asdict(self.scenes), sort_keys=True)
        return hashlib.sha256((super().fingerprint + settings).encode()).hexdigest()[:16]

    @property
    def content_key(self) -> str:
        """Key over the settings and one image, which changes with the implementation."""
        first = self.read(0).tobytes() if len(self) else b""
        return hashlib.sha256(self.fingerprint.encode() + first).hexdigest()[:16]

    def read(self, index: int) -> Image:
        """Return image `index`, uint8 RGB [s, s, 3]."""
        return self.scenes.draw(*self.items[index])[0]

    def mask(self, index: int) -> Image:
        """Return the mask of image `index`, see `Scenes.mask`."""
        return self.scenes.draw(*self.items[index])[1]


SIMPLE_SCENES = Scenes(size=48, object_size=(0.7, 1.0), rotation=180.0, clutter=0, one_palette=True)
"""Easy to learn within minutes: crops show the pattern of the class, and little else differs between images."""
SMALL_OBJECTS = replace(SIMPLE_SCENES, size=192, object_size=(0.4, 0.6))
"""The same objects, smaller and at any position, to show where attention falls."""
