"""Synthetic dataset: images that the package renders itself, with classes, masks and videos.

An image shows an object on a textured background. The class is the shape of the object (`KINDS`) and the pattern on
it; position, rotation, size, colors, light and clutter have the same distribution for every class, and every kind
covers the same area, so that neither raw pixels nor colors reveal the class. Image i is a function of (settings, i):
any number, in any order, in any process.

    Scenes(count=2000).open()                      2000 training images
    Scenes(count=500, part="val").open()           500 other images of the same distribution
    Scenes(seed=1).write("photos")                 a folder for `dino train photos`
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np

from dino_ssl.data.dataset import DatasetConfig
from dino_ssl.data.synthetic import painting
from dino_ssl.data.synthetic.dataset import SyntheticDataset
from dino_ssl.data.synthetic.painting import Background, Clutter, Color, Object, Pose
from dino_ssl.data.synthetic.shapes import KINDS, VARIANTS
from dino_ssl.data.synthetic.trajectory import Trajectory
from dino_ssl.errors import UserError, check_range
from dino_ssl.files import write_errors
from dino_ssl.progress import Progress

Image = np.ndarray  # uint8 RGB [h, w, 3]; a mask is uint8 [h, w]
PARTS = ("train", "val", "test")
_OBJECT, _SCENE, _NOISE, _VIDEO = range(4)  # independent random streams of one image


class Scene(NamedTuple):
    """Description of an image: the objects with their poses, the nearest last, and the background."""

    objects: list[tuple[Object, Pose]]
    background: Background


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
    """Number of classes, 2 to 10: star, flower, gear, rings, spiral, ladder, tree, fish, mug, bolt."""
    seed: int = 0
    """Random seed."""
    part: Literal["train", "val", "test"] = "train"
    """Disjoint parts of a seed."""
    object_size: tuple[float, float] = (0.32, 0.5)
    """Smallest and largest size of an object: the side of a square of its area, relative to the image side."""
    rotation: float = 60.0
    """Largest rotation of an object in degrees, in both directions; 180 for any."""
    variety: float = 1.0
    """Variation of colors and light between images; near 0 all images have the same."""
    texture: float = 0.7
    """Strength of the textures, 0 (plain colors) to 1."""
    equal_lightness: bool = False
    """Give objects the mean lightness of their background, so that brightness does not distinguish images."""
    objects: int = 1
    """Number of objects of the class per image, on a grid; with several, every crop shows one."""
    clutter: int = 5
    """Largest number of bars and balls behind the object; one image in four has one in front of it."""
    second_object: float = 0.25
    """Probability of a second, smaller object of the same class."""
    noise: float = 3.0
    """Largest standard deviation of the pixel noise, in gray levels."""

    @property
    def spec(self) -> str:
        """The word `scenes`."""
        return "scenes"

    def __post_init__(self) -> None:
        check_range(self, "count", "seed", "clutter", least=0)
        check_range(self, "size", least=16)
        check_range(self, "classes", least=2, most=len(KINDS))
        check_range(self, "rotation", least=0, most=180)
        check_range(self, "variety", "texture", "second_object", least=0, most=1)
        check_range(self, "noise", least=0, most=100)
        check_range(self, "objects", least=1, most=25)
        check_range(self, "object_size", least=0.05, most=1)
        if self.object_size[0] > self.object_size[1]:
            raise UserError(f"`object_size`: expected the smaller size first, got {self.object_size}.")
        if self.part not in PARTS:
            raise UserError(f"`part` must be one of {', '.join(PARTS)}; got {self.part!r}.")

    def open(self, progress: Progress | None = None) -> SyntheticDataset:
        """Return the dataset; images are rendered when they are read."""
        return SyntheticDataset(self)

    def name(self, i: int) -> str:
        """Return the name of image i, below the folder of its class."""
        return f"{KINDS[self.label(i)]}/{self.part}-{self.seed}-{i:06d}.png"

    def label(self, i: int) -> int:
        """Return the class of image i; the classes alternate."""
        return int(i) % self.classes

    def read(self, i: int) -> Image:
        """Return image i, uint8 RGB [s, s, 3]."""
        return self.draw(i)[0]

    def mask(self, i: int) -> Image:
        """Return the mask of image i, uint8 [s, s]: 0 background and clutter, n the n-th object."""
        return self.draw(i)[1]

    def draw(self, i: int, view: int = 0) -> tuple[Image, Image]:
        """Return (image [s, s, 3] RGB, mask [s, s]), uint8; see `scene` for views."""
        objects, background = self.scene(i, view)
        return painting.compose(self.size, objects, background, (0.0, 0.0), self._rng(i, _NOISE, view))

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
        if frames < 1:
            raise UserError(f"A video needs at least one frame; got frames={frames}.")
        rng = self._rng(i, _VIDEO)
        obj, color, _ = self._object_of(i)
        objects, paths = [obj], [Trajectory.sample(rng, float(rng.uniform(0.3, 0.4)), self.rotation)]
        if i % 2:
            kind = KINDS[(self.label(i) + int(rng.integers(1, self.classes))) % self.classes]
            objects.append(self._sample_object(rng, kind, self._colors(rng, color)[1]))
            paths.append(Trajectory.sample(rng, float(rng.uniform(0.2, 0.26)), self.rotation))
        background, drift = self.scene(i).background, rng.normal(0, 0.15, 2)
        images = []
        for time in np.linspace(-0.5, 0.5, frames):
            posed = [(obj, path.at(time)) for obj, path in zip(objects, paths, strict=True)]
            pan = (float(drift[0] * time), float(drift[1] * time))
            images.append(painting.compose(self.size, posed, background, pan, rng))
        return Video(*(np.stack(arrays) for arrays in zip(*images, strict=True)))

    def scene(self, i: int, view: int = 0) -> Scene:
        """Return the scene of image i. Another `view` shows the same object in another pose, background and light."""
        obj, color, behind = self._object_of(i)
        rng = self._rng(i, _SCENE, view)
        if view:
            behind = self._colors(rng, color)[1]
        objects = self._sample_objects(rng, obj)
        pose = objects[0][1]
        if rng.random() < self.second_object:
            small = self._sample_object(rng, obj.kind, color)
            x, y = (-math.copysign(0.34, at) + float(rng.normal(0, 0.03)) for at in (pose.x, pose.y))
            objects.append((small, Pose(x, y, self._sample_turn(rng), float(rng.uniform(0.13, 0.18)))))
        return Scene(objects, self._sample_background(rng, behind, color, pose))

    def _rng(self, i: int, stream: int, *more: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, PARTS.index(self.part), int(i), stream, *more])

    def _object_of(self, i: int) -> tuple[Object, Color, Color]:
        """Return the object of image i, its color, and the color of the background in view 0."""
        rng = self._rng(i, _OBJECT)
        color, behind = self._colors(rng)
        return self._sample_object(rng, KINDS[self.label(i)], color), color, behind

    def _colors(self, rng: np.random.Generator, first: Color | None = None) -> tuple[Color, Color]:
        sample = painting.sample_equal_lightness if self.equal_lightness else painting.sample_colors
        return sample(rng, first, self.variety)

    def _sample_object(self, rng: np.random.Generator, kind: str, color: Color) -> Object:
        return painting.sample_object(rng, kind, color, self.texture, equal_lightness=self.equal_lightness)

    def _sample_objects(self, rng: np.random.Generator, obj: Object) -> list[tuple[Object, Pose]]:
        """Return one object, or several of its kind near the centers of the cells of a square grid."""
        if self.objects == 1:
            size = float(rng.uniform(*self.object_size))
            room = max(0.58 - painting.reach(obj) * size, 0.12)
            x, y = rng.uniform(-room, room, 2)
            return [(obj, Pose(float(x), float(y), self._sample_turn(rng), size))]
        rows = math.ceil(math.sqrt(self.objects))
        shift = rng.uniform(-0.25, 0.25, 2) / rows
        posed = []
        for n in range(self.objects):
            x, y = (np.array(divmod(n, rows)[::-1]) + 0.5) / rows - 0.5 + shift + rng.uniform(-0.12, 0.12, 2) / rows
            pose = Pose(float(x), float(y), self._sample_turn(rng), float(rng.uniform(*self.object_size)))
            posed.append((replace(obj, variant=int(rng.integers(VARIANTS))) if n else obj, pose))
        return posed

    def _sample_turn(self, rng: np.random.Generator) -> float:
        return math.radians(rng.uniform(-self.rotation, self.rotation))

    def _sample_background(self, rng: np.random.Generator, behind: Color, color: Color, pose: Pose) -> Background:
        """Return large clutter far across the image, then bars and balls; one may be in front of the object."""
        clutter = []
        if self.clutter:
            for _ in range(int(rng.integers(1, 3))):
                x, y = rng.uniform(-0.6, 0.6, 2)
                size, slim = rng.uniform(0.4, 0.7), rng.uniform(0.3, 0.9)
                clutter.append(self._sample_clutter(rng, behind, x, y, size, slim))
        for _ in range(int(rng.integers(self.clutter + 1))):
            x, y = rng.uniform(-0.5, 0.5, 2)
            near = behind if rng.random() < 0.6 else color
            slim = math.exp(rng.uniform(math.log(0.1), 0))
            clutter.append(self._sample_clutter(rng, near, x, y, rng.uniform(0.08, 0.24), slim))
        if self.clutter and rng.random() < 0.25:
            x, y = rng.normal((pose.x, pose.y), 0.25)
            size, slim = rng.uniform(0.08, 0.12), rng.uniform(0.08, 0.14)
            clutter.append(self._sample_clutter(rng, behind, x, y, size, slim, in_front=True))
        texture = painting.sample_texture(rng, behind, self.texture)
        light = (float(rng.uniform(0, 2 * np.pi)), self.variety * float(rng.uniform(0, 0.7)))
        return Background(texture, light, tuple(clutter), self.noise * float(rng.random()))

    def _sample_clutter(
        self,
        rng: np.random.Generator,
        near: Color,
        x: float,
        y: float,
        size: float,
        slim: float,
        in_front: bool = False,
    ) -> Clutter:
        light, chroma, hue = near
        light = float(np.clip(light + rng.normal(0, 0.1), 0.2, 0.95))
        color = (light, chroma, hue + float(rng.normal(0, 0.5)))
        pose = Pose(float(x), float(y), float(rng.uniform(0, np.pi)), float(size))
        return Clutter(pose, float(slim), painting.sample_texture(rng, color, self.texture), in_front)


SIMPLE_SCENES = Scenes(
    size=64, object_size=(0.36, 0.46), variety=0.33, texture=0.1, equal_lightness=True, objects=4, clutter=0,
    second_object=0.0,
)  # fmt: skip
"""Easy to learn within minutes: every crop shows the class, and little else differs between images."""
