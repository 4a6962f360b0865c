"""Procedural signs: a spec, the prompt that describes it, and its picture.

    python -m analysis.tiny_flux.signs --out signs.png         # a sheet of 48 renderings

Letters sit in equal cells, so the place of letter i of n depends on (i, n, shape, curved) alone: that is
what makes
words learnable for a tiny model. Variety between seeds comes from colour and lighting, hardly from position:
a few
pixels of position jitter would drown the letters (with 3 px they are 5 % of what the prompt explains).
"""

import argparse
import math
import random
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 128  # pixels
SUPERSAMPLE = 2
RADIUS = 54.0  # half extent of a shape of scale 1, pixels
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
COLOURS = {
    "red": (205, 32, 38),
    "orange": (240, 130, 25),
    "yellow": (245, 210, 40),
    "green": (40, 145, 60),
    "blue": (35, 85, 195),
    "purple": (125, 50, 150),
    "pink": (245, 140, 180),
    "brown": (120, 75, 40),
    "black": (25, 25, 28),
    "white": (240, 240, 238),
    "gray": (135, 138, 142),
    "teal": (30, 160, 165),
}
SHAPES = ("round", "square", "oval", "diamond", "hexagon", "octagon", "rectangular", "shield", "shirt")
TEXTURES = ("plain", "striped", "checkered", "dotted")
LIGHT_INK, DARK_INK = (245, 245, 242), (22, 22, 26)
OUTER_RIM, INNER_RIM = 0.955, 0.905  # the ink line round a sign, as scales of its shape
WORDS = """
A GO UP NO OK BAR CAR BUS GYM ZOO SPA PUB TEA ART TAXI CAFE STOP OPEN EXIT SALE SHOP BANK BIKE PARK
HOTEL PIZZA MUSIC BOOKS SUSHI DINER CLUB MILK FISH GOLD JAZZ KING LION MOON NEWS QUIZ ROCK STAR TOUR
VINO WINE YOGA ZERO HOME FOOD BEER SURF WEST EAST LOVE HELLO WORLD JUICE BREAD FRESH GREEN LIGHT
QUEEN TIGER WATER ICE SUN SKY TOP WAX VAN JET FOX OWL DOG CAT EGG HAT KEY MAP NUT PIE RUM SEA TOY
VET YES
""".split()  # noqa: SIM905  a hundred quoted words would hide the list
PERIOD = 16  # pixels between stripes, dots or pairs of checks: one transformer token
MAX_CELL, MAX_HEIGHT, ASPECT = 31.0, 46.0, 1.5  # letter cell: widest, tallest, height over width
TEXT_DY = {"shield": -7.0, "shirt": 7.0}  # the text centre of shapes that are not symmetric top to bottom
SHIRT = ((0.22, -0.98), (0.62, -0.92), (1.12, -0.42), (0.92, -0.12), (0.76, -0.26), (0.76, 1.0))  # right half


@dataclass(frozen=True)
class SignSpec:
    """Everything the prompt says about a sign."""

    colour: str
    background: str
    shape: str
    texture: str
    word: str
    curved: bool


@dataclass(frozen=True)
class Jitter:
    """What differs between two pictures of one spec."""

    position: float = 0.4  # pixels; the scale varies by position/60. Raising it costs legible words first
    phase: float = 0.05  # texture offset as a fraction of its period; raising it costs the textures
    colour: float = 12.0  # 8-bit levels
    light: float = 0.1  # strength of the lighting gradient


STILL = Jitter(0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Slot:
    """One letter cell: centre and size in pixels, clockwise turn in radians."""

    x: float
    y: float
    width: float
    height: float
    turn: float


def luminance(colour: tuple[int, int, int]) -> float:
    return 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]


def ink(spec: SignSpec) -> tuple[int, int, int]:
    """Black or white, from the colour's NAME: judged on the jittered colour, gray and teal would flip."""
    return LIGHT_INK if luminance(COLOURS[spec.colour]) < 125 else DARK_INK


def sample_spec(rng: random.Random, real_words: float = 0.35) -> SignSpec:
    """Real words for `real_words` of the specs, random capitals for the rest so that any word works."""
    colour = rng.choice(list(COLOURS))
    background = rng.choice([name for name in COLOURS if name != colour])
    if rng.random() < real_words:
        word = rng.choice(WORDS)
    else:
        length = rng.choices((1, 2, 3, 4, 5), (1, 2, 3, 4, 3))[0]
        word = "".join(rng.choice(LETTERS) for _ in range(length))
    shape = rng.choice(SHAPES)
    texture = rng.choices(TEXTURES, (4, 2, 2, 2))[0]
    return SignSpec(colour, background, shape, texture, word, len(word) > 1 and rng.random() < 0.4)


def read_prompt(text: str) -> SignSpec | None:
    """The spec that `prompt` would describe so; None for a prompt of another kind."""
    thing, says = r"a ([a-z]+) (?:([a-z]+) )?(sign|badge|logo|shirt)", '([a-z ]+) "([A-Z]{1,5})"'
    found = re.fullmatch(f"{thing} {says} on a (.+) background", text)
    if found is None:
        return None
    first, second, noun, says, word, ground = found.groups()
    names = {first, second} - {None} | ({"shirt"} if noun == "shirt" else set())
    colour, shape = names & set(COLOURS), names & set(SHAPES)
    *texture, background = ground.split()
    texture = texture[0] if texture else "plain"
    if not (len(colour) == len(shape) == 1 and names == colour | shape):
        return None
    if background not in COLOURS or texture not in TEXTURES:
        return None
    return SignSpec(colour.pop(), background, shape.pop(), texture, word, "curved" in says)


def prompt(spec: SignSpec, rng: random.Random) -> str:
    if spec.shape == "shirt":
        thing = f"a {spec.colour} shirt"
    else:
        noun = rng.choice(("sign", "badge", "logo"))
        first, second = (spec.colour, spec.shape) if rng.random() < 0.7 else (spec.shape, spec.colour)
        thing = f"a {first} {second} {noun}"
    if spec.curved:
        says = rng.choice(("with the curved word", "with curved text", "that says in curved letters"))
    else:
        says = rng.choice(("that says", "that says", "with the word", "with the text"))
    texture = "" if spec.texture == "plain" else f"{spec.texture} "
    return f'{thing} {says} "{spec.word}" on a {texture}{spec.background} background'


@lru_cache
def outline(shape: str) -> tuple[tuple[float, float], ...]:
    """Corners of the shape for radius 1 around (0, 0)."""
    if shape in ("round", "oval"):
        a, b = (1.0, 1.0) if shape == "round" else (1.12, 0.8)
        angles = [2 * math.pi * i / 96 for i in range(96)]
        return tuple((a * math.cos(t), b * math.sin(t)) for t in angles)
    if shape in ("square", "rectangular"):
        a, b = (0.92, 0.92) if shape == "square" else (1.08, 0.62)
        return ((-a, -b), (a, -b), (a, b), (-a, b))
    if shape == "diamond":
        return ((0.0, -1.14), (1.14, 0.0), (0.0, 1.14), (-1.14, 0.0))
    if shape in ("hexagon", "octagon"):
        sides, start, radius = (6, 0.0, 1.08) if shape == "hexagon" else (8, math.pi / 8, 1.04)
        angles = [start + 2 * math.pi * i / sides for i in range(sides)]
        return tuple((radius * math.cos(t), radius * math.sin(t)) for t in angles)
    if shape == "shield":
        curve = [
            (0.9 * math.cos(i / 16 * math.pi) ** 0.8, 0.1 + 0.95 * math.sin(i / 16 * math.pi))
            for i in range(8)
        ]
        right = [(0.9, -0.92), *curve]
    else:
        right = list(SHIRT)
    bottom = [(0.0, 1.05)] if shape == "shield" else []
    return (*right, *bottom, *((-x, y) for x, y in reversed(right)))


def inside(shape: str, x: float, y: float) -> bool:
    """Even-odd test of a point against `outline(shape)`."""
    corners, hit = outline(shape), False
    for (x0, y0), (x1, y1) in zip(corners, (*corners[1:], corners[0]), strict=True):
        if (y0 > y) != (y1 > y) and x < x0 + (y - y0) / (y1 - y0) * (x1 - x0):
            hit = not hit
    return hit


def place_letters(shape: str, count: int, curved: bool, cell: float) -> list[Slot]:
    """Cells of width `cell` on a line, or on an arch (a rainbow) of a radius that suits the shape."""
    height, dy = min(cell * ASPECT, MAX_HEIGHT), TEXT_DY.get(shape, 0.0)
    radius = 150.0 if shape == "rectangular" else 115.0
    middle = SIZE / 2
    slots = []
    for i in range(count):
        offset = (i - (count - 1) / 2) * cell
        if not curved:
            slots.append(Slot(middle + offset, middle + dy, cell, height, 0.0))
            continue
        turn, widest = offset / radius, (count - 1) / 2 * cell / radius
        sag = (
            radius * (1 - math.cos(turn)) - radius * (1 - math.cos(widest)) / 2
        )  # centres the arch vertically
        slots.append(Slot(middle + radius * math.sin(turn), middle + dy + sag, cell, height, turn))
    return slots


def slot_corners(slot: Slot) -> list[tuple[float, float]]:
    """The four corners of the glyph in its cell."""
    cos, sin = math.cos(slot.turn), math.sin(slot.turn)
    half_w, half_h = slot.width * 0.42, slot.height / 2
    signs = ((-1, -1), (1, -1), (1, 1), (-1, 1))
    return [
        (slot.x + a * half_w * cos - b * half_h * sin, slot.y + a * half_w * sin + b * half_h * cos)
        for a, b in signs
    ]


@lru_cache
def letter_slots(shape: str, count: int, curved: bool) -> tuple[Slot, ...]:
    """The largest cells whose glyphs stay inside the shape's rim."""
    scale = RADIUS * (0.95 if shape == "shirt" else INNER_RIM - 0.03)
    for cell in np.arange(MAX_CELL, 8.0, -0.2):
        slots = place_letters(shape, count, curved, float(cell))
        points = [p for slot in slots for p in slot_corners(slot)]
        if all(inside(shape, (x - SIZE / 2) / scale, (y - SIZE / 2) / scale) for x, y in points):
            break
    return tuple(slots)


@lru_cache
def glyph(letter: str, enlarged: int = 1) -> Image.Image:
    """A mask cropped to the letter's own width and to capital height (plus the tail of Q)."""
    import matplotlib

    fonts = Path(matplotlib.get_data_path()) / "fonts/ttf"
    # The plain I is a bare bar (read as L or 1), the plain J hangs below the line; the monospaced are better.
    name = "DejaVuSansMono-Bold.ttf" if letter in "IJ" else "DejaVuSans-Bold.ttf"
    font = ImageFont.truetype(str(fonts / name), 96 * enlarged)
    image = Image.new("L", (200 * enlarged, 200 * enlarged), 0)
    draw = ImageDraw.Draw(image)
    draw.text((40 * enlarged, 20 * enlarged), letter, font=font, fill=255)
    left, _, right, bottom = image.getbbox()
    capital = draw.textbbox((40 * enlarged, 20 * enlarged), "H", font=font)
    return image.crop((left, capital[1], right, bottom if letter == "Q" else capital[3]))


def draw_texture(
    draw: ImageDraw.ImageDraw,
    texture: str,
    colour: tuple[int, ...],
    shift: tuple[float, float],
    supersample: int = SUPERSAMPLE,
) -> None:
    """`shift` is the offset in periods."""
    side, period = SIZE * supersample, PERIOD * supersample
    across, down = (period * part for part in shift)
    cells = range(-2, SIZE // PERIOD + 2)
    if texture == "striped":
        for i in cells:
            draw.rectangle((across + i * period, 0, across + (i + 0.5) * period, side), fill=colour)
    elif texture == "checkered":
        for i in cells:
            for j in cells:
                if (i + j) % 2 == 0:
                    x, y = across + i * period, down + j * period
                    draw.rectangle((x, y, x + period - 1, y + period - 1), fill=colour)
    elif texture == "dotted":
        radius = 4.2 * supersample
        for i in cells:
            for j in cells:
                x, y = across + i * period, down + j * period
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def texture_colour(background: tuple[int, ...]) -> tuple[int, ...]:
    """The second colour of a texture: darker, or lighter where the background is nearly black."""
    return tuple(int(v * 0.78) if luminance(background) > 60 else v + 38 for v in background)


def render(
    spec: SignSpec, rng: random.Random | None = None, jitter: Jitter | None = None, enlarged: int = 1
) -> np.ndarray:
    """The picture, uint8 (128, 128, 3), or so many times as large.

    Without `rng` it is the canonical one, with no jitter at all.
    """
    supersample = SUPERSAMPLE * enlarged
    jitter = STILL if rng is None else jitter or Jitter()
    rng = rng or random.Random(0)

    def jittered(name: str) -> tuple[int, ...]:
        common = rng.uniform(-jitter.colour, jitter.colour)
        levels = (v + common + rng.uniform(-jitter.colour, jitter.colour) / 2 for v in COLOURS[name])
        return tuple(int(min(255, max(0, v))) for v in levels)

    background, colour = jittered(spec.background), jittered(spec.colour)
    side = SIZE * supersample
    image = Image.new("RGB", (side, side), background)
    draw = ImageDraw.Draw(image)
    shift = (jitter.phase * rng.random(), jitter.phase * rng.random())
    draw_texture(draw, spec.texture, texture_colour(background), shift, supersample)

    cx, cy = (side / 2 + rng.uniform(-jitter.position, jitter.position) * supersample for _ in range(2))
    scale = rng.uniform(1 - jitter.position / 60, 1 + jitter.position / 60) * supersample
    ink_colour = ink(spec)

    def fill(size: float, paint: tuple[int, ...]) -> None:
        reach = RADIUS * scale * size
        draw.polygon([(cx + x * reach, cy + y * reach) for x, y in outline(spec.shape)], fill=paint)

    fill(1.0, colour)
    if spec.shape == "shirt":
        reach = RADIUS * scale
        collar = (cx - 0.22 * reach, cy - 1.08 * reach, cx + 0.22 * reach, cy - 0.84 * reach)
        draw.ellipse(collar, fill=background)
    else:
        fill(OUTER_RIM, ink_colour)
        fill(INNER_RIM, colour)

    for letter, slot in zip(spec.word, letter_slots(spec.shape, len(spec.word), spec.curved), strict=True):
        width, height = slot.width * 0.84 * scale, slot.height * scale
        drawn = (int(width * (0.62 if letter == "I" else 1)), int(height * (1.16 if letter == "Q" else 1)))
        mask = glyph(letter, enlarged).resize(drawn, Image.Resampling.BILINEAR)
        drop = (drawn[1] - int(height)) / 2  # Q's tail hangs below the line
        if slot.turn:
            mask = mask.rotate(-math.degrees(slot.turn), Image.Resampling.BILINEAR, expand=True)
        x = cx + (slot.x - SIZE / 2) * scale - drop * math.sin(slot.turn) - mask.width / 2
        y = cy + (slot.y - SIZE / 2) * scale + drop * math.cos(slot.turn) - mask.height / 2
        image.paste(ink_colour, (round(x), round(y)), mask)

    pixels = np.asarray(image.reduce(SUPERSAMPLE), dtype=np.float32)
    wide = SIZE * enlarged
    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(0, jitter.light)
    down, across = np.mgrid[0:wide, 0:wide].astype(np.float32) / (wide - 1) - 0.5
    pixels = pixels * (1 + 2 * strength * (across * math.cos(angle) + down * math.sin(angle)))[..., None]
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


def sheet(pictures: list[np.ndarray], columns: int = 8) -> Image.Image:
    rows = [np.concatenate(pictures[i : i + columns], 1) for i in range(0, len(pictures), columns)]
    return Image.fromarray(np.concatenate(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="signs.png")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    pictures = []
    for _ in range(48):
        spec = sample_spec(rng)
        print(prompt(spec, rng))
        pictures.append(render(spec, rng))
    sheet(pictures).save(args.out)


if __name__ == "__main__":
    main()
