"""Procedural clips of 17 frames: a spec, the prompt that describes it, and its frames.

    python -m analysis.tiny_wan.clips --out clips.png         # a sheet of 16 clips, every fourth frame

Speeds are whole pixels a frame and word cells are as wide as a transformer token, so that what moves looks
the same in every latent frame. Seeds differ in shade, lighting and half a pixel of place, hardly in
layout: for tiny_flux a few pixels of position jitter alone kept words from being learnt.
"""

import argparse
import math
import random
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from analysis.tiny_flux.signs import COLOURS, DARK_INK, LETTERS, LIGHT_INK, WORDS, luminance

SIZE, FRAMES = 64, 17
SUPERSAMPLE = 4
RADIUS = 12.0  # of a shape that neither grows nor shrinks, pixels
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
TURNABLE = ("square", "triangle", "star", "cross", "heart")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS = {" slowly": 1, "": 2, " fast": 3}  # pixels a frame; the path's middle is the picture's
DEGREES = 6.0  # a frame, of a turning shape
SMALL, LARGE = 5.0, 19.0  # radii between which a shape grows or shrinks, pixels
STILL = ("stands still", "fades in", "fades out")
MOVES = tuple(f"moves {way}{pace}" for way in DIRECTIONS for pace in SPEEDS)
TURNS = ("turns clockwise", "turns anticlockwise")
ACTIONS = (*MOVES, *TURNS, "grows", "shrinks", *STILL)
CROSSINGS = (("left", "right"), ("right", "left"), ("up", "down"), ("down", "up"))
WORD_ACTIONS = ("scrolls up", "scrolls down", *STILL)
CELL, LETTER_WIDTH, LETTER_HEIGHT = 16, 13, 20  # pixels
MAX_LETTERS = 4
CLIP_WORDS = tuple(word for word in WORDS if len(word) <= MAX_LETTERS)
BAD = "blurry and flickering"  # the prompt of spoiled clips, to be given as the negative prompt


@dataclass(frozen=True)
class Thing:
    """A coloured shape and what it does."""

    colour: str
    shape: str
    action: str


@dataclass(frozen=True)
class ClipSpec:
    """Everything the prompt says: one or two things, or a word with its action, and the background."""

    background: str
    things: tuple[Thing, ...] = ()
    word: str = ""
    action: str = ""


@dataclass(frozen=True)
class Jitter:
    """What differs between two clips of one spec."""

    position: float = 0.4  # pixels; raising it costs legible words first
    colour: float = 8.0  # 8-bit levels
    light: float = 0.06  # strength of the lighting gradient


NO_JITTER = Jitter(0.0, 0.0, 0.0)


def ink(background: str) -> tuple[int, int, int]:
    """Words are white on dark backgrounds and black on light ones, judged by the colour's name."""
    return LIGHT_INK if luminance(COLOURS[background]) < 125 else DARK_INK


def sample_spec(rng: random.Random) -> ClipSpec:
    """40 % words, 15 % two things that cross, 45 % one thing."""
    background = rng.choice(list(COLOURS))
    kind = rng.random()
    if kind < 0.4:
        if rng.random() < 0.35:
            word = rng.choice(CLIP_WORDS)
        else:
            length = rng.choices((1, 2, 3, 4), (1, 2, 3, 3))[0]
            word = "".join(rng.choice(LETTERS) for _ in range(length))
        return ClipSpec(background, (), word, rng.choice(WORD_ACTIONS))
    colours = rng.sample([name for name in COLOURS if name != background], 2)
    if kind < 0.55:
        ways = rng.choice(CROSSINGS)
        shapes = rng.sample(SHAPES, 2)
        pairs = zip(colours, shapes, ways, strict=True)
        return ClipSpec(background, tuple(Thing(c, s, f"moves {way}") for c, s, way in pairs))
    action = rng.choice(MOVES if rng.random() < 0.5 else (*TURNS, "grows", "shrinks", *STILL))
    shape = rng.choice(TURNABLE if action in TURNS else SHAPES)
    return ClipSpec(background, (Thing(colours[0], shape, action),))


def prompt(spec: ClipSpec, rng: random.Random | None = None) -> str:
    """Without `rng` the plainest wording. A word without a background stands on black."""

    def called(thing: Thing) -> str:
        article = "an" if thing.colour[0] in "aeiou" else "a"
        return f"{article} {thing.colour} {thing.shape} {thing.action}"

    def ground() -> str:
        article = "an" if spec.background[0] in "aeiou" else "a"
        return f" {rng.choice(('over', 'on')) if rng else 'over'} {article} {spec.background} background"

    if spec.word:
        unsaid = spec.background == "black" and rng is not None and rng.random() < 0.5
        return f"the word {spec.word} {spec.action}" + ("" if unsaid else ground())
    return " and ".join(called(thing) for thing in spec.things) + ground()


def is_held_out(spec: ClipSpec) -> bool:
    """A twentieth of all prompts, chosen by a checksum, is never trained on."""
    return zlib.crc32(prompt(spec).encode()) % 20 == 0


@cache
def corners(shape: str) -> tuple[tuple[float, float], ...]:
    """The outline of the shape for radius 1 around (0, 0); y points down."""
    if shape in ("circle", "ring"):
        angles = [2 * math.pi * i / 64 for i in range(64)]
        return tuple((math.cos(t), math.sin(t)) for t in angles)
    if shape == "square":
        return ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85))
    if shape == "triangle":
        return ((0.0, -1.05), (0.98, 0.75), (-0.98, 0.75))
    if shape == "diamond":
        return ((0.0, -1.1), (0.8, 0.0), (0.0, 1.1), (-0.8, 0.0))
    if shape == "star":
        radii = [1.12 if i % 2 == 0 else 0.48 for i in range(10)]
        return tuple(
            (r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5)) for i, r in enumerate(radii)
        )
    if shape == "cross":
        a, b = 0.35, 1.0
        right = [(a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b)]
        return (*right, *((-x, y) for x, y in reversed(right)))
    angles = [2 * math.pi * i / 48 for i in range(48)]
    points = [
        (
            16 * math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)),
        )
        for t in angles
    ]
    return tuple((x / 16.5, (y - 2.0) / 15.0) for x, y in points)


def mask(shape: str, x: float, y: float, radius: float, degrees: float = 0.0) -> np.ndarray:
    """(64, 64) float32 coverage of the shape centred at pixel (x, y), turned clockwise."""
    side = SIZE * SUPERSAMPLE
    image = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(image)
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))

    def fill(size: float, value: int) -> None:
        reach = radius * size
        points = [
            (SUPERSAMPLE * (x + reach * (a * cos - b * sin)), SUPERSAMPLE * (y + reach * (a * sin + b * cos)))
            for a, b in corners(shape)
        ]
        draw.polygon(points, fill=value)

    fill(1.0, 255)
    if shape == "ring":
        fill(0.55, 0)
    return np.asarray(image.reduce(SUPERSAMPLE), np.float32) / 255


def place(action: str, frame: int) -> tuple[float, float, float, float]:
    """Centre x, y, radius and degrees of a thing in one frame."""
    middle, late = SIZE / 2, frame - (FRAMES - 1) / 2
    x, y, radius, degrees = middle, middle, RADIUS, 0.0
    if action in MOVES:
        way, _, pace = action.removeprefix("moves ").partition(" ")
        speed = SPEEDS[f" {pace}" if pace else ""]
        x, y = (middle + step * speed * late for step in DIRECTIONS[way])
    elif action in TURNS:
        degrees = DEGREES * frame * (1 if action == TURNS[0] else -1)
    elif action in ("grows", "shrinks"):
        share = frame / (FRAMES - 1)
        radius = SMALL + (LARGE - SMALL) * (share if action == "grows" else 1 - share)
    return x, y, radius, degrees


def opacity(action: str) -> np.ndarray:
    """(17,): 0.06 to 1 for what fades in."""
    rising = np.linspace(0.06, 1.0, FRAMES, dtype=np.float32)
    return {"fades in": rising, "fades out": rising[::-1]}.get(action, np.ones(FRAMES, np.float32))


@cache
def thing_cover(shape: str, action: str) -> np.ndarray:
    """(17, 64, 64) uint8: cached, for drawing polygons again would take longer than all the rest."""
    frames = np.stack([mask(shape, *place(action, frame)) for frame in range(FRAMES)])
    return np.round(255 * frames * opacity(action)[:, None, None]).astype(np.uint8)


@cache
def glyph(letter: str) -> np.ndarray:
    """(20, 16) float32: every letter fills the same box, I and J come from the monospaced face."""
    import matplotlib

    fonts = Path(matplotlib.get_data_path()) / "fonts/ttf"
    name = "DejaVuSansMono-Bold.ttf" if letter in "IJ" else "DejaVuSans-Bold.ttf"
    font = ImageFont.truetype(str(fonts / name), 96)
    image = Image.new("L", (200, 200), 0)
    ImageDraw.Draw(image).text((40, 20), letter, font=font, fill=255)
    drawn = image.crop(image.getbbox()).resize((LETTER_WIDTH, LETTER_HEIGHT), Image.Resampling.BOX)
    cell = np.zeros((LETTER_HEIGHT, CELL), np.float32)
    left = (CELL - LETTER_WIDTH) // 2
    cell[:, left : left + LETTER_WIDTH] = np.asarray(drawn, np.float32) / 255
    return cell


def word_top(action: str, frame: int) -> int:
    """The first pixel row of the letters."""
    late = frame - (FRAMES - 1) // 2
    return (SIZE - LETTER_HEIGHT) // 2 + {"scrolls up": -2, "scrolls down": 2}.get(action, 0) * late


def word_left(word: str) -> int:
    return (SIZE - CELL * len(word)) // 2


def word_cover(word: str, action: str) -> np.ndarray:
    """(17, 64, 64) float32."""
    line = np.concatenate([glyph(letter) for letter in word], 1)
    cover, left = np.zeros((FRAMES, SIZE, SIZE), np.float32), word_left(word)
    for frame in range(FRAMES):
        top = word_top(action, frame)
        cover[frame, top : top + LETTER_HEIGHT, left : left + line.shape[1]] = line
    return cover * opacity(action)[:, None, None]


def shifted(cover: np.ndarray, across: float, down: float) -> np.ndarray:
    """Moved by less than a pixel, by linear interpolation; the edge rows repeat."""
    for axis, amount in ((2, across), (1, down)):
        if amount:
            step = 1 if amount > 0 else -1
            moved = np.roll(cover, step, axis)
            edge = [slice(None)] * 3
            edge[axis] = slice(0, 1) if step == 1 else slice(-1, None)
            moved[tuple(edge)] = cover[tuple(edge)]
            cover = cover + (moved - cover) * np.float32(abs(amount))
    return cover


def covers(spec: ClipSpec) -> list[tuple[tuple[int, int, int], np.ndarray]]:
    """Colour and (17, 64, 64) coverage of all that is drawn, backmost first: the first thing is in front."""
    if spec.word:
        return [(ink(spec.background), word_cover(spec.word, spec.action))]
    scale = np.float32(1 / 255)
    return [(COLOURS[t.colour], thing_cover(t.shape, t.action) * scale) for t in reversed(spec.things)]


def render(spec: ClipSpec, rng: random.Random | None = None, jitter: Jitter | None = None) -> np.ndarray:
    """The frames, uint8 (17, 64, 64, 3). Without `rng` the canonical ones, with no jitter at all."""
    jitter = NO_JITTER if rng is None else jitter or Jitter()
    rng = rng or random.Random(0)

    def jittered(colour: tuple[int, int, int]) -> np.ndarray:
        common = rng.uniform(-jitter.colour, jitter.colour)
        noise = [common + rng.uniform(-jitter.colour, jitter.colour) / 2 for _ in range(3)]
        return np.float32(colour) + np.float32(noise)

    frames = np.empty((3, FRAMES, SIZE, SIZE), np.float32)
    frames[:] = jittered(COLOURS[spec.background])[:, None, None, None]
    across, down = (rng.uniform(-jitter.position, jitter.position) for _ in range(2))
    for colour, cover in covers(spec):
        cover = shifted(cover, across, down)
        frames += cover * (jittered(colour)[:, None, None, None] - frames)
    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0, jitter.light)
    if strength:
        ramp = np.arange(SIZE, dtype=np.float32) / (SIZE - 1) - 0.5
        plane = ramp[None] * math.cos(angle) + ramp[:, None] * math.sin(angle)
        frames *= (1 + 2 * strength * plane).astype(np.float32)
    return np.ascontiguousarray(np.clip(frames + 0.5, 0, 255).astype(np.uint8).transpose(1, 2, 3, 0))


def spoil(frames: np.ndarray, rng: random.Random) -> np.ndarray:
    """Blurred to a quarter of the sharpness, with a brightness that jumps from frame to frame."""
    coarse = frames.reshape(FRAMES, SIZE // 4, 4, SIZE // 4, 4, 3).astype(np.float32).mean((2, 4))
    blurred = coarse.repeat(4, 1).repeat(4, 2)
    gain = np.float32([rng.uniform(0.75, 1.25) for _ in range(FRAMES)])
    return np.clip(blurred * gain[:, None, None, None], 0, 255).astype(np.uint8)


def sheet(clips: list[np.ndarray], every: int = 4, columns: int = 2) -> Image.Image:
    """One strip of frames a clip."""
    strips = [np.concatenate(list(clip[::every]), 1) for clip in clips]
    strips = [np.pad(strip, ((1, 1), (2, 2), (0, 0)), constant_values=255) for strip in strips]
    rows = [np.concatenate(strips[i : i + columns], 1) for i in range(0, len(strips), columns)]
    return Image.fromarray(np.concatenate(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="clips.png")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    clips = []
    for _ in range(args.count):
        spec = sample_spec(rng)
        print(prompt(spec, rng))
        clips.append(render(spec, rng))
    sheet(clips).save(args.out)


if __name__ == "__main__":
    main()
