"""The embedded data set: pictures that the package draws itself, with classes, masks, videos, edited copies.

A picture shows a thing on a ground. The class is the shape of the thing (`KINDS`), at any place, turn and
size; colours, textures, light and clutter come from the same distributions whatever the class, and every kind
covers the same area, so that neither raw pixels nor colours tell the class. Picture i is a pure function of
(the settings, i): any number, in any order, in any process.

    Scenes(count=2000).open()                      2000 pictures to train on
    Scenes(count=500, part="val").open()           500 others of the same kind
    Scenes(seed=1).write("photos")                 a folder to try `dino train photos` on
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from dino_ssl.data.dataset import DatasetConfig
from dino_ssl.data.synthetic.dataset import SyntheticDataset, write_images
from dino_ssl.data.synthetic.painting import (
    Colour,
    Ground,
    Piece,
    Pose,
    Thing,
    compose,
    draw_colours,
    draw_level_colours,
    draw_texture,
    draw_thing,
    reach,
)
from dino_ssl.data.synthetic.shapes import KINDS, VARIANTS
from dino_ssl.data.synthetic.trajectory import Trajectory
from dino_ssl.data.transforms import distortions
from dino_ssl.errors import UserError
from dino_ssl.progress import Progress

Image = np.ndarray  # uint8 [h, w, 3] RGB; a mask is uint8 [h, w]

PARTS = ("train", "val", "test")
_LOOK, _SCENE, _NOISE, _VIDEO, _COPIES = range(5)  # independent streams of random numbers for one picture


class Scene(NamedTuple):
    """Everything a picture is drawn from: the things with their poses, the nearest last, and the ground."""

    things: list[tuple[Thing, Pose]]
    ground: Ground


class Video(NamedTuple):
    """frames [T, s, s, 3] and masks [T, s, s], uint8: 0 the ground, 1 and 2 the objects."""

    frames: Image
    masks: Image


@dataclass(frozen=True, kw_only=True)
class Scenes(DatasetConfig):
    """Pictures that the package draws itself: any number, any size, the same for the same settings."""

    count: int = 2000
    """number of pictures; picture i does not depend on it"""
    size: int = 96
    """side of a picture in pixels; the same scene is drawn at any size"""
    classes: int = len(KINDS)
    """kinds of things, from 2 to 10: star, flower, gear, rings, spiral, ladder, tree, fish, mug, bolt"""
    seed: int = 0
    """another seed, other pictures"""
    part: Literal["train", "val", "test"] = "train"
    """which pictures of the seed: the parts share none"""
    span: tuple[float, float] = (0.32, 0.5)
    """smallest and largest size of a thing: the side of a square of its area, as a part of the picture's side"""
    turn: float = 60.0
    """a thing is turned by at most this many degrees either way; 180 is any direction"""
    variety: float = 1.0
    """how much colours and light differ between pictures; near 0 all are alike, and what is left is the thing"""
    texture: float = 0.7
    """how strong the textures on things and ground are: 0 plain colours, 1 strong"""
    coats: bool = True
    """each kind of thing has a surface of its own (stripes, checks, dots, marble or grain, coarse or fine), in any
    colours; without, only the shape tells the kind, which takes much longer to learn"""
    level: bool = False
    """coats are as light as their ground on average, half darker and half lighter: brightness tells no picture from
    another, and a network that learns from views learns the things sooner"""
    herd: int = 1
    """things of the kind in a picture, loosely in rows: with several, every crop shows one"""
    clutter: int = 5
    """at most this many bars and balls lie behind a thing; one picture in four has one in front"""
    company: float = 0.25
    """share of pictures with a second, smaller thing of the same kind"""
    noise: float = 3.0
    """standard deviation of the pixel noise, in grey levels, at most"""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("count", 0, 10**9), ("size", 16, 4096), ("classes", 2, len(KINDS)), ("seed", 0, 2**63 - 1),
            ("turn", 0, 180), ("variety", 0, 1), ("texture", 0, 1), ("clutter", 0, 50), ("company", 0, 1),
            ("noise", 0, 100), ("herd", 1, 25),
        ):  # fmt: skip
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(
                    f"scenes: {name} must be from {low} to {high}, got {value}; choose a value in that range."
                )
        if not 0.05 <= self.span[0] <= self.span[1] <= 1:
            raise UserError(f"scenes: span must be two sizes from 0.05 to 1, the smaller first; got {self.span}.")
        if self.part not in PARTS:
            raise UserError(f"scenes: part must be one of {', '.join(PARTS)}, got {self.part!r}; choose one of them.")

    # What a picture is drawn from

    def _rng(self, i: int, stream: int, *more: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, PARTS.index(self.part), int(i), stream, *more])

    def label(self, i: int) -> int:
        """The class of picture i: they take turns, so that any run of `classes` pictures has one of each."""
        return int(i) % self.classes

    def scene(self, i: int, view: int = 0) -> Scene:
        """What picture i shows. Another `view` keeps the thing and its paint; pose, ground, light change."""
        thing, mine, behind = self._look(i)
        rng = self._rng(i, _SCENE, view)
        if view:
            behind = self._colours(rng, beside=mine)[1]
        things = self._herd(rng, thing)
        pose = things[0][1]
        if rng.random() < self.company:
            small = self._thing(rng, thing.kind, mine)
            x, y = (-math.copysign(0.34, at) + float(rng.normal(0, 0.03)) for at in (pose.x, pose.y))
            things.append((small, Pose(x, y, self._turn(rng), float(rng.uniform(0.13, 0.18)))))
        return Scene(things, self._ground(rng, behind, mine, pose))

    def _look(self, i: int) -> tuple[Thing, Colour, Colour]:
        """Picture i's thing, its colour, and the colour of its ground in view 0."""
        rng = self._rng(i, _LOOK)
        mine, behind = self._colours(rng)
        return self._thing(rng, KINDS[self.label(i)], mine), mine, behind

    def _colours(self, rng: np.random.Generator, beside: Colour | None = None) -> tuple[Colour, Colour]:
        """Of a thing, or the one given, and of its ground."""
        return (draw_level_colours if self.level else draw_colours)(rng, beside, self.variety)

    def _thing(self, rng: np.random.Generator, kind: str, colour: Colour) -> Thing:
        return draw_thing(rng, kind, colour, self.texture, coat=self.coats, level=self.level)

    def _herd(self, rng: np.random.Generator, thing: Thing) -> list[tuple[Thing, Pose]]:
        """The thing, or as many of its kind in the same paint: each near the middle of a cell of a square grid."""
        if self.herd == 1:
            return [(thing, self._pose(rng, thing, float(rng.uniform(*self.span))))]
        rows = math.ceil(math.sqrt(self.herd))
        shift = rng.uniform(-0.25, 0.25, 2) / rows
        placed = []
        for n in range(self.herd):
            x, y = (np.array(divmod(n, rows)[::-1]) + 0.5) / rows - 0.5 + shift + rng.uniform(-0.12, 0.12, 2) / rows
            pose = Pose(float(x), float(y), self._turn(rng), float(rng.uniform(*self.span)))
            placed.append((replace(thing, variant=int(rng.integers(VARIANTS))) if n else thing, pose))
        return placed

    def _turn(self, rng: np.random.Generator) -> float:
        return math.radians(rng.uniform(-self.turn, self.turn))

    def _pose(self, rng: np.random.Generator, thing: Thing, size: float) -> Pose:
        room = max(0.58 - reach(thing) * size, 0.12)
        x, y = rng.uniform(-room, room, 2)
        return Pose(float(x), float(y), self._turn(rng), size)

    def _ground(self, rng: np.random.Generator, behind: Colour, mine: Colour, pose: Pose) -> Ground:
        """Sheets that reach far across the picture, then bars and balls; one may stand before the thing."""
        pieces = []
        if self.clutter:
            for _ in range(int(rng.integers(1, 3))):
                x, y = rng.uniform(-0.6, 0.6, 2)
                pieces.append(self._piece(rng, behind, x, y, size=rng.uniform(0.4, 0.7), slim=rng.uniform(0.3, 0.9)))
        for _ in range(int(rng.integers(self.clutter + 1))):
            x, y = rng.uniform(-0.5, 0.5, 2)
            colour = behind if rng.random() < 0.6 else mine
            slim = math.exp(rng.uniform(math.log(0.1), 0))
            pieces.append(self._piece(rng, colour, x, y, size=rng.uniform(0.08, 0.24), slim=slim))
        if self.clutter and rng.random() < 0.25:
            x, y = rng.normal((pose.x, pose.y), 0.25)
            size, slim = rng.uniform(0.08, 0.12), rng.uniform(0.08, 0.14)
            pieces.append(self._piece(rng, behind, x, y, size=size, slim=slim, before=True))
        return Ground(
            texture=draw_texture(rng, behind, self.texture),
            light=(float(rng.uniform(0, 2 * np.pi)), self.variety * float(rng.uniform(0, 0.7))),
            clutter=tuple(pieces),
            grain=self.noise * float(rng.random()),
        )

    def _piece(
        self, rng: np.random.Generator, near: Colour, x: float, y: float, *, size, slim, before: bool = False
    ) -> Piece:
        """Clutter in a colour that lies around `near`."""
        light, chroma, hue = near
        colour = (
            float(np.clip(light + rng.normal(0, 0.1), 0.2, 0.95)),
            chroma,
            hue + float(rng.normal(0, 0.5)),
        )
        pose = Pose(float(x), float(y), float(rng.uniform(0, np.pi)), float(size))
        return Piece(pose, float(slim), draw_texture(rng, colour, self.texture), before)

    # Pictures, masks, videos, copies

    def draw(self, i: int, view: int = 0) -> tuple[Image, Image]:
        """(picture [s, s, 3] RGB, mask [s, s]), uint8."""
        things, ground = self.scene(i, view)
        return compose(self.size, things, ground, (0.0, 0.0), self._rng(i, _NOISE, view))

    def read(self, i: int) -> Image:
        """Picture i, uint8 [s, s, 3] RGB."""
        return self.draw(i)[0]

    def mask(self, i: int) -> Image:
        """uint8 [s, s]: 0 the ground and what stands before a thing, n the n-th thing."""
        return self.draw(i)[1]

    def instance(self, i: int, view: int) -> Image:
        """The very thing of picture i elsewhere, for retrieval: `view` 0 is picture i itself."""
        return self.draw(i, view)[0]

    def copies(self, i: int) -> dict[str, Image]:
        """Edited copies of picture i by the edit's name, for copy detection; see `edits.copies`."""
        elsewhere = PARTS[(PARTS.index(self.part) + 1) % len(PARTS)]  # so that the page is in no set with i
        page = replace(self, part=elsewhere).read(i + 1)
        return distortions.copies(self.read(i), self._rng(i, _COPIES), into=page)

    def video(self, i: int, frames: int = 24) -> Video:
        """A short film of picture i's thing; for odd i, another thing moves before it.

        The things move, turn and breathe along smooth curves, the ground drifts behind them; more frames make
        the film slower, not the path longer.
        """
        if frames < 1:
            raise UserError(f"scenes: a video needs at least one frame, got frames={frames}.")
        rng = self._rng(i, _VIDEO)
        thing, mine, _ = self._look(i)
        things, paths = [thing], [Trajectory.drawn(rng, float(rng.uniform(0.3, 0.4)), self.turn)]
        if i % 2:
            other = KINDS[(self.label(i) + int(rng.integers(1, self.classes))) % self.classes]
            things.append(self._thing(rng, other, self._colours(rng, beside=mine)[1]))
            paths.append(Trajectory.drawn(rng, float(rng.uniform(0.2, 0.26)), self.turn))
        ground, drift = self.scene(i).ground, rng.normal(0, 0.15, 2)
        drawn = []
        for time in np.linspace(-0.5, 0.5, frames):
            placed = [(thing, path.at(time)) for thing, path in zip(things, paths, strict=True)]
            pan = (float(drift[0] * time), float(drift[1] * time))
            drawn.append(compose(self.size, placed, ground, pan, rng))
        dataset, masks = zip(*drawn, strict=True)
        return Video(np.stack(dataset), np.stack(masks))

    # As a source of pictures, and as files

    def open(self, progress: Progress | None = None) -> SyntheticDataset:
        """The pictures as training and evaluation take them."""
        return SyntheticDataset(self)

    def name(self, i: int) -> str:
        return f"{KINDS[self.label(i)]}/{self.part}-{self.seed}-{i:06d}.png"

    def write(self, folder: str | Path, masks: str | Path | None = None) -> None:
        """All pictures as PNG files in class folders: folder/star/train-0-000000.png.

        Their masks, under the same names, go to a folder outside, so that nobody trains on masks."""
        write_images(self, Path(folder), None if masks is None else Path(masks))


HERDS = Scenes(size=64, span=(0.36, 0.46), variety=0.33, texture=0.1, level=True, herd=4, clutter=0, company=0.0)
"""Every crop shows the kind, and little else differs between pictures: what minutes of training can learn."""
