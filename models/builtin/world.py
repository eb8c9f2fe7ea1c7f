"""The world the builtin encoder knows: one shape on a dull background, with a colour, a size, a place and a motion.

A scene is painted at any moment of time; a single frame shows its motion too (ghosts trail behind what moves, arcs
surround what spins), so that a frame encoder can know it. Every fifth combination is held out: no training example ever
has it, so that what is measured on it is not memory. What long footage shows beside its subject is here too: scenes
that are nearly the one that is spoken of, and frames that show nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

UInt8 = NDArray[np.uint8]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35),
    "orange": (240, 135, 20),
    "yellow": (240, 225, 40),
    "green": (40, 165, 60),
    "cyan": (45, 205, 215),
    "blue": (40, 70, 215),
    "purple": (150, 50, 195),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "crescent")
SIZES = {"small": 0.115, "large": 0.21}  # radius as a share of the height
PLACES = {"left": (0.2, 0.5), "right": (0.8, 0.5), "top": (0.5, 0.22), "bottom": (0.5, 0.78), "centre": (0.5, 0.5)}
MOTIONS = ("still", "left", "right", "up", "down", "spinning")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

HELD_OUT_SHARE = 5  # one in so many
TRAVEL = 0.07  # how far a moving shape goes to either side of its place, as a share of the picture
GHOSTS = 3

_WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "shape": {
        "circle": ("circle", "disc"),
        "square": ("square",),
        "triangle": ("triangle",),
        "star": ("star",),
        "cross": ("cross", "plus sign"),
        "ring": ("ring", "hoop"),
        "diamond": ("diamond", "rhombus"),
        "crescent": ("crescent", "moon"),
    },
    "size": {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")},
    "place": {
        "left": ("on the left", "at the left side", "near the left edge"),
        "right": ("on the right", "at the right side", "near the right edge"),
        "top": ("at the top", "near the top edge", "in the upper part"),
        "bottom": ("at the bottom", "near the bottom edge", "in the lower part"),
        "centre": ("in the centre", "in the middle", "at the centre"),
    },
    "motion": {
        "still": ("stays still", "does not move", "is standing still"),
        "left": ("moves left", "is moving to the left", "slides leftwards"),
        "right": ("moves right", "is moving to the right", "slides rightwards"),
        "up": ("moves up", "is rising", "slides upwards"),
        "down": ("moves down", "is falling", "slides downwards"),
        "spinning": ("spins", "is rotating", "turns round and round"),
    },
}
_TEMPLATES = (
    "a {size} {colour} {shape} {motion} {place}",
    "{place} a {size} {colour} {shape} {motion}",
    "there is a {size} {colour} {shape} {place} that {motion}",
    "a {colour} {shape} of {size} size {motion} {place}",
    "{place} there is a {colour} {shape} which is {size} and {motion}",
)
VALUES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "place": tuple(PLACES),
    "motion": MOTIONS,
}
ATTRIBUTES = tuple(VALUES)

EmptyKind = Literal["background", "blur", "title", "fade"]
EMPTY_KINDS: tuple[EmptyKind, ...] = get_args(EmptyKind)


@dataclass(frozen=True, slots=True, order=True)
class Scene:
    """One combination of the five attributes."""

    colour: str
    shape: str
    size: str
    place: str
    motion: str

    @property
    def held_out(self) -> bool:
        """Whether training never sees this combination."""
        name = "/".join(getattr(self, attribute) for attribute in ATTRIBUTES)
        return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT_SHARE == 0


def all_scenes() -> list[Scene]:
    """Every combination, in a fixed order."""
    return [Scene(*values) for values in itertools.product(*VALUES.values())]


def distractors(scene: Scene, rng: random.Random, n: int, shared: tuple[int, int] = (2, 4)) -> list[Scene]:
    """Draws scenes that are nearly a given one: what makes a caption hard to place.

    Args:
        scene: What they resemble.
        rng: Decides all.
        n: How many; the same may come twice. Some are held out (see Scene.held_out).
        shared: The least and the most attributes that one shares with `scene`, at most 4 of the 5.

    Raises:
        ValueError: `shared` is not an increasing pair of 0 to 4.
    """
    least, most = shared
    if not 0 <= least <= most < len(ATTRIBUTES):
        raise ValueError(f"shared attributes {least} to {most}: an increasing pair of 0 to {len(ATTRIBUTES) - 1}")
    found = []
    for _ in range(n):
        kept = rng.sample(ATTRIBUTES, rng.randint(least, most))
        found.append(
            Scene(
                *(
                    value if attribute in kept else rng.choice([v for v in choices if v != value])
                    for attribute, choices in VALUES.items()
                    for value in (getattr(scene, attribute),)
                )
            )
        )
    return found


def caption(scene: Scene, rng: random.Random, template: int | None = None) -> str:
    """A sentence that says all five attributes, in words and an order drawn from `rng`."""
    pattern = _TEMPLATES[rng.randrange(len(_TEMPLATES)) if template is None else template]
    words = {a: rng.choice(_WORDS[a][getattr(scene, a)]) for a in ("shape", "size", "place", "motion")}
    return _an(pattern.format(colour=scene.colour, **words))


def partial_caption(scene: Scene, rng: random.Random) -> tuple[str, frozenset[str]]:
    """A phrase that says the shape or colour and perhaps more; and which attributes it says."""
    said = {"shape", *(a for a in ("colour", "size", "place", "motion") if rng.random() < 0.55)}
    parts = ["a"]
    if "size" in said:
        parts.append(rng.choice(_WORDS["size"][scene.size]))
    if "colour" in said:
        parts.append(scene.colour)
    parts.append(rng.choice(_WORDS["shape"][scene.shape]))
    tail = [a for a in ("motion", "place") if a in said]
    rng.shuffle(tail)
    for attribute in tail:
        words = rng.choice(_WORDS[attribute][getattr(scene, attribute)])
        parts.append(f"that {words}" if attribute == "motion" else words)
    return _an(" ".join(parts)), frozenset(said)


def _an(text: str) -> str:
    return text.replace("a orange", "an orange")


def vocabulary() -> list[str]:
    """Every word that captions use, sorted."""
    words: set[str] = set(COLOURS)
    for choices in _WORDS.values():
        for phrases in choices.values():
            words.update(word for phrase in phrases for word in phrase.split())
    for template in (*_TEMPLATES, "a an that"):
        words.update(word for word in template.split() if "{" not in word)
    return sorted(words)


class Painter:
    """Paints one scene in one look: background, clutter, light and exact position come from the seed.

    Args:
        scene: What to paint.
        seed: Of everything that no caption mentions.
        height, width: Of the frames, in pixels.
    """

    def __init__(self, scene: Scene, seed: int, height: int = 240, width: int = 320) -> None:
        self._scene = scene
        self._height, self._width = height, width
        rng = np.random.default_rng(seed)
        self._background = _background(rng, height, width)
        jitter = rng.uniform(-0.035, 0.035, 2)
        x, y = PLACES[scene.place]
        self._x, self._y = x + jitter[0], y + jitter[1]
        self._radius = SIZES[scene.size] * height * rng.uniform(0.9, 1.1)
        self._angle = rng.uniform(-0.25, 0.25)
        self._turn = rng.uniform(0.9, 1.5) * rng.choice([-1, 1])
        self._period = rng.uniform(2.0, 3.5)
        self._phase = rng.uniform(0, 1)
        light = rng.uniform(0.78, 1.08)
        shade = rng.integers(-14, 15, 3)
        colour = np.array(COLOURS[scene.colour]) * light + shade
        self._colour = tuple(int(c) for c in np.clip(colour, 0, 255))

    def frame(self, seconds: float) -> UInt8:
        """(H, W, 3) uint8 RGB at a time after the scene's start."""
        image = Image.fromarray(self._background)
        draw = ImageDraw.Draw(image, "RGBA")
        x, y = self._x * self._width, self._y * self._height
        angle, motion = self._angle, self._scene.motion
        if motion in DIRECTIONS:
            dx, dy = DIRECTIONS[motion]
            along = 2 * ((seconds / self._period + self._phase) % 1.0) - 1
            x += dx * along * TRAVEL * self._width
            y += dy * along * TRAVEL * self._height
            for ghost in range(GHOSTS, 0, -1):
                behind = 0.62 * ghost * self._radius
                alpha = 150 - 38 * ghost
                self._shape(draw, x - dx * behind, y - dy * behind, self._radius * (1 - 0.1 * ghost), angle, alpha)
        elif motion == "spinning":
            angle += 2 * math.pi * self._turn * seconds / self._period
            outer = 1.45 * self._radius
            start = math.degrees(angle)
            for quarter in range(4):
                begin = start + 90 * quarter
                box = (x - outer, y - outer, x + outer, y + outer)
                draw.arc(box, begin, begin + 50, fill=(*self._colour, 190), width=max(2, round(0.13 * self._radius)))
        self._shape(draw, x, y, self._radius, angle, 255)
        return np.asarray(image)

    def _shape(self, draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, angle: float, alpha: int) -> None:
        fill = (*self._colour, alpha)
        shape = self._scene.shape
        if shape == "circle":
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        elif shape == "ring":
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=fill, width=round(0.38 * radius))
        else:
            draw.polygon([(x + radius * px, y + radius * py) for px, py in _outline(shape, angle)], fill=fill)


class EmptyPainter:
    """Paints what footage shows beside its subject: frames that no caption speaks of.

    Args:
        kind: `background`: clutter without a shape; `blur`: a scene too blurred and dim to tell anything; `title`: a
            card with grey bars where lines of text would be; `fade`: near black or near white.
        seed: Of everything else.
        height, width: Of the frames, in pixels.

    Raises:
        ValueError: There is no such kind.
    """

    def __init__(self, kind: EmptyKind, seed: int, height: int = 240, width: int = 320) -> None:
        if kind not in EMPTY_KINDS:
            raise ValueError(f"empty frames of kind {kind!r}: one of {', '.join(EMPTY_KINDS)}")
        self._scene: Painter | None = None
        rng = np.random.default_rng(seed)
        if kind == "background":
            self._still = _background(rng, height, width)
        elif kind == "title":
            self._still = _title(rng, height, width)
        elif kind == "fade":
            level = rng.choice([rng.uniform(0, 16), rng.uniform(239, 255)])
            self._still = np.clip(level + rng.normal(0, 1.5, (height, width, 3)), 0, 255).astype(np.uint8)
        else:
            scene = Scene(*(str(rng.choice(choices)) for choices in VALUES.values()))
            self._scene = Painter(scene, int(rng.integers(1 << 32)), height, width)
            self._dim = float(rng.uniform(0.3, 0.6))

    def frame(self, seconds: float) -> UInt8:
        """(H, W, 3) uint8 RGB at a time after the start."""
        if self._scene is None:
            return self._still
        image = Image.fromarray(self._scene.frame(seconds))
        blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(image.height / 4)), np.float32)
        grey = blurred.mean(2, keepdims=True)
        # a large shape's colour outlasts any blur: so most of it goes too
        dim: UInt8 = ((grey + 0.1 * (blurred - grey)) * self._dim).astype(np.uint8)
        return dim


def _title(rng: np.random.Generator, height: int, width: int) -> UInt8:
    """A card of one dull shade with grey bars in place of lines of text."""
    dark = rng.random() < 0.7
    level = rng.uniform(8, 60) if dark else rng.uniform(190, 245)
    card = np.clip(level + rng.uniform(-6, 6, 3) + rng.normal(0, 1.5, (height, width, 1)), 0, 255).astype(np.uint8)
    image = Image.fromarray(card)
    draw = ImageDraw.Draw(image)
    n_lines, thick = int(rng.integers(2, 6)), int(rng.uniform(0.03, 0.06) * height)
    top = rng.uniform(0.2, 0.9) * (height - 2 * thick * n_lines)
    ink = int(rng.uniform(140, 215) if dark else rng.uniform(40, 110))
    for line in range(n_lines):
        half, y = rng.uniform(0.1, 0.4) * width, top + 2 * thick * line
        draw.rectangle((width / 2 - half, y, width / 2 + half, y + thick), fill=(ink, ink, ink))
    return np.asarray(image)


def _outline(shape: str, angle: float) -> list[tuple[float, float]]:
    """Corners of a shape of radius 1, turned by `angle`."""
    if shape == "square":
        points = _around(4, 1.1, offset=math.pi / 4)
    elif shape == "diamond":
        points = [(0.62 * x, 1.15 * y) for x, y in _around(4, 1.0, offset=math.pi / 2)]
    elif shape == "triangle":
        points = _around(3, 1.15, offset=-math.pi / 2)
    elif shape == "star":
        outer, inner = _around(5, 1.15, -math.pi / 2), _around(5, 0.45, -math.pi / 2 + math.pi / 5)
        points = [p for pair in zip(outer, inner, strict=True) for p in pair]
    elif shape == "cross":
        w = 0.32
        points = [
            (-w, -1),
            (w, -1),
            (w, -w),
            (1, -w),
            (1, w),
            (w, w),
            (w, 1),
            (-w, 1),
            (-w, w),
            (-1, w),
            (-1, -w),
            (-w, -w),
        ]
    else:  # crescent: an outer arc, and back along one that is shifted
        steps = [math.radians(50 + 260 * i / 20) for i in range(21)]
        outer = [(math.cos(s), math.sin(s)) for s in steps]
        inner = [(0.42 + 0.78 * math.cos(s), 0.78 * math.sin(s)) for s in reversed(steps)]
        points = outer + [(min(px, outer[0][0]), py) for px, py in inner]
    c, s = math.cos(angle), math.sin(angle)
    return [(c * x - s * y, s * x + c * y) for x, y in points]


def _around(n: int, radius: float, offset: float) -> list[tuple[float, float]]:
    angles = [offset + 2 * math.pi * i / n for i in range(n)]
    return [(radius * math.cos(a), radius * math.sin(a)) for a in angles]


def _background(rng: np.random.Generator, height: int, width: int) -> UInt8:
    """A dull gradient with blotches, grain and clutter."""
    base, other = rng.uniform(45, 150, 2)
    direction = rng.uniform(0, 2 * math.pi)
    ys, xs = np.mgrid[-0.5 : 0.5 : complex(height), -0.5 : 0.5 : complex(width)]
    ramp = np.clip(0.5 + xs * math.cos(direction) + ys * math.sin(direction), 0, 1)
    grey = base + (other - base) * ramp
    blotches = Image.fromarray(rng.uniform(-22, 22, (6, 8)).astype(np.float32)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    grain = rng.normal(0, rng.uniform(1, 5), (height, width))
    tint = rng.uniform(-10, 10, 3)
    pixels = np.clip(grey[..., None] + np.asarray(blotches)[..., None] + grain[..., None] + tint, 0, 255).astype(
        np.uint8
    )
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image, "RGBA")
    for _ in range(int(rng.integers(3, 9))):
        level = int(rng.integers(30, 190))
        fill = (level, level, level, int(rng.integers(60, 160)))
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        if rng.random() < 0.5:
            length, turn = rng.uniform(10, 60), rng.uniform(0, math.pi)
            draw.line(
                (x, y, x + length * math.cos(turn), y + length * math.sin(turn)),
                fill=fill,
                width=int(rng.integers(1, 3)),
            )
        else:
            r = rng.uniform(2, 6)
            draw.rectangle((x - r, y - r, x + r, y + r), fill=fill)
    return np.asarray(image)
