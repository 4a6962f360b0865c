"""Score a model folder on held-out prompts: words read back, colours, shape, texture, seconds per image.

    python -m analysis.tiny_flux.evaluate --model assets/tiny_flux --out evaluation.json --sheet samples.png
    python -m analysis.tiny_flux.evaluate --renderings --out ceiling.json     # true pictures: the ceiling

Prompts come from a seed the training never uses. Colours and textures are measured where the geometry says
sign and background are; the shape is the one whose canonical silhouette the picture's own colours match best.
`fine` is the power at the finest half of the frequencies over that of the true rendering: too few steps blur.
"""

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image, ImageDraw

from analysis.measures.spectrum import BANDS, grey, power
from analysis.measures.words import read_words, word_recall
from analysis.records.provenance import provenance
from analysis.records.store import write_atomically
from analysis.tiny_flux import signs
from analysis.tiny_flux.signs import COLOURS, SHAPES, SIZE, TEXTURES, SignSpec

HELD_OUT_SEED = 20261121
MAX_TOKENS = 24


def held_out(count: int) -> list[tuple[SignSpec, str]]:
    rng = random.Random(HELD_OUT_SEED)
    specs = (signs.sample_spec(rng) for _ in range(count))
    return [(spec, signs.prompt(spec, rng)) for spec in specs]


@lru_cache
def silhouettes(scale: float = 1.0) -> np.ndarray:
    """(shapes, 128, 128): True where a canonical sign of this relative size covers the background."""
    masks = []
    for shape in SHAPES:
        mask = Image.new("1", (SIZE, SIZE))
        reach = signs.RADIUS * scale
        corners = [(SIZE / 2 + x * reach, SIZE / 2 + y * reach) for x, y in signs.outline(shape)]
        ImageDraw.Draw(mask).polygon(corners, fill=1)
        masks.append(np.asarray(mask))
    return np.stack(masks)


@lru_cache
def always_background() -> np.ndarray:
    """Pixels that no shape covers."""
    return ~silhouettes().any(0)


def nearest_colour(pixels: np.ndarray) -> str:
    """The name nearest to the per-channel median, which letters and lighting hardly move."""
    middle = np.median(pixels.reshape(-1, 3), 0)
    return min(COLOURS, key=lambda name: float(np.abs(middle - np.array(COLOURS[name])).sum()))


@lru_cache
def within_rim(shape: str) -> np.ndarray:
    """(128, 128): True inside the rim of a sign."""
    mask = silhouettes()[SHAPES.index(shape)].copy()
    shrunk = signs.RADIUS * (signs.INNER_RIM - 0.05)
    for y, x in np.argwhere(mask):
        mask[y, x] = signs.inside(shape, (x - 63.5) / shrunk, (y - 63.5) / shrunk)
    return mask


def sign_pixels(picture: np.ndarray, spec: SignSpec) -> np.ndarray:
    """Pixels inside the rim that no letter cell covers."""
    mask = within_rim(spec.shape).copy()
    for slot in signs.letter_slots(spec.shape, len(spec.word), spec.curved):
        top, left = int(slot.y - slot.height / 2 - 3), int(slot.x - slot.width / 2 - 3)
        mask[
            max(0, top) : int(slot.y + slot.height / 2 + 4), max(0, left) : int(slot.x + slot.width / 2 + 4)
        ] = False
    return picture[mask]


def background_colour(picture: np.ndarray, spec: SignSpec) -> str:
    """Against both colours of every texture: half of a striped ground is the darker one."""
    pixels = picture[always_background()].astype(float)

    def misfit(name: str) -> float:
        pair = np.array([COLOURS[name], signs.texture_colour(COLOURS[name])], float)
        pair = pair[:1] if spec.texture == "plain" else pair
        return float(np.abs(pixels[:, None] - pair).sum(-1).min(1).mean())

    return min(COLOURS, key=misfit)


def seen_texture(picture: np.ndarray, spec: SignSpec) -> str:
    """The texture whose canonical pattern the background's brightness follows best; none above .35: plain."""
    outside = ~silhouettes()[SHAPES.index(spec.shape)]
    gray = picture.astype(float).mean(-1)
    down, across = np.mgrid[0:SIZE, 0:SIZE] / (SIZE - 1) - 0.5
    planes = np.stack([np.ones(outside.sum()), down[outside], across[outside]], 1)  # lighting is a plane
    values = gray[outside]
    values = values - planes @ np.linalg.lstsq(planes, values, rcond=None)[0]
    scores = {"plain": 0.35}
    for texture in TEXTURES[1:]:
        pattern = signs.render(replace(spec, texture=texture, word="")).astype(float).mean(-1)[outside]
        pattern = pattern - planes @ np.linalg.lstsq(planes, pattern, rcond=None)[0]
        norms = np.linalg.norm(values) * np.linalg.norm(pattern)
        scores[texture] = abs(float(values @ pattern)) / (float(norms) + 1e-6)
    return max(scores, key=scores.get)


def seen_shape(picture: np.ndarray, spec: SignSpec) -> str:
    """The silhouette that best separates the picture from what its background should look like."""
    ground = signs.render(replace(spec, word="")).astype(float)
    empty = np.median(picture[always_background()].reshape(-1, 3), 0)
    tones = np.array([COLOURS[spec.background], signs.texture_colour(COLOURS[spec.background])], float)
    tones = tones + empty - np.median(ground[always_background()], 0)
    colour = np.array(COLOURS[spec.colour], float)
    pixels = picture.astype(float)
    to_ground = np.abs(pixels[:, :, None] - tones).sum(-1).min(-1)
    to_sign = np.minimum(np.abs(pixels - colour).sum(-1), np.abs(pixels - np.array(signs.ink(spec))).sum(-1))
    covered = np.sign(to_ground - to_sign)
    # Smaller canonical shapes count too: a model that draws a little smaller draws the right shape.
    masks = np.stack(
        [silhouettes(scale) for scale in (0.88, 0.92, 0.96, 1.0)], 1
    )  # (shapes, scales, 128, 128)
    agreement = (covered * np.where(masks, 1, -1)).mean((-1, -2)).max(1)
    return SHAPES[int(np.argmax(agreement))]


def check(picture: np.ndarray, spec: SignSpec) -> dict:
    """What is seen in one picture, and whether it is what the prompt asked for."""
    return {
        "sign_ok": nearest_colour(sign_pixels(picture, spec)) == spec.colour,
        "background_ok": background_colour(picture, spec) == spec.background,
        "shape_ok": seen_shape(picture, spec) == spec.shape,
        "texture_ok": seen_texture(picture, spec) == spec.texture,
    }


def fine(picture: np.ndarray, spec: SignSpec) -> float:
    """Power of a picture at the upper half of the frequencies, over that of the true rendering."""
    found, right = (
        power(grey(Image.fromarray(p)))[BANDS // 2 :].sum() for p in (picture, signs.render(spec))
    )
    return round(float(found / right), 4)


def share(values: Iterable[bool]) -> float:
    values = list(values)
    return round(sum(values) / len(values), 4) if values else float("nan")


def summarise(rows: list[dict]) -> dict:
    lengths, layouts = defaultdict(list), defaultdict(list)
    for row in rows:
        lengths[len(row["word"])].append(row["word_ok"])
        layouts["curved" if row["curved"] else "straight"].append(row["word_ok"])
    found = {"images": len(rows), "words": share(row["word_ok"] for row in rows)}
    found["words_by_length"] = {str(n): share(ok) for n, ok in sorted(lengths.items())}
    found["images_by_length"] = {str(n): len(ok) for n, ok in sorted(lengths.items())}
    found["words_by_layout"] = {name: share(ok) for name, ok in sorted(layouts.items())}
    for name in ("sign", "background", "shape", "texture"):
        found[name] = share(row[f"{name}_ok"] for row in rows)
    found["fine"] = round(median(row["fine"] for row in rows), 4)
    seconds = [row["seconds"] for row in rows if row["seconds"] is not None]
    found["median_seconds"] = round(median(seconds), 3) if seconds else None
    return found


def drawer(folder: str):
    """A function (prompt, seed, steps) -> picture."""
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(folder).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def draw(prompt: str, seed: int, steps: int) -> Image.Image:
        generator = torch.Generator().manual_seed(seed)
        size = {"height": SIZE, "width": SIZE, "max_sequence_length": MAX_TOKENS}
        return pipe(prompt, num_inference_steps=steps, generator=generator, **size).images[0]

    draw("a red round sign", 0, 2)  # untimed warm-up
    return draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="assets/tiny_flux")
    parser.add_argument("--renderings", action="store_true", help="score true renderings instead of a model")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[50], help="several: the rows are of the last"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sheet", help="also write the first 48 pictures, unpicked, to this PNG")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    draw = None if args.renderings else drawer(args.model)
    by_steps = {}
    for steps in args.steps:
        rng, rows, pictures = random.Random(1), [], []
        for i, (spec, prompt) in enumerate(held_out(args.count)):
            start = time.perf_counter()
            picture = Image.fromarray(signs.render(spec, rng)) if draw is None else draw(prompt, i, steps)
            seconds = None if draw is None else round(time.perf_counter() - start, 4)
            read = read_words(picture)
            pixels = np.asarray(picture)
            pictures.append(pixels)
            row = asdict(spec) | {"prompt": prompt, "seed": i, "read": read, "word_ok": spec.word in read}
            rows.append(row | check(pixels, spec) | {"fine": fine(pixels, spec), "seconds": seconds})
        by_steps[str(steps)] = summarise(rows)
        print(steps, json.dumps(by_steps[str(steps)]), flush=True)

    record = {
        **provenance("tiny_flux.evaluate", "cpu"),
        "steps": args.steps[-1],
        "by_steps": by_steps,
        "summary": summarise(rows),
        "rows": rows,
    }
    write_atomically(args.out, (json.dumps(record, indent=1) + "\n").encode())
    if args.sheet:
        signs.sheet(pictures[:48]).save(args.sheet)
    print(json.dumps(record["summary"], indent=1))


if __name__ == "__main__":
    main()


def checked(image: Image.Image, words: tuple[str, ...] | None, prompt: str) -> dict[str, float | None]:
    """What is still as the prompt asked, 0 or 1; null where the prompt is none of the embedded model's."""
    found = {"word": word_recall(words or (), image)}
    spec = signs.read_prompt(prompt)
    seen = check(np.asarray(image), spec) if spec and image.size == (signs.SIZE,) * 2 else {}
    ok = {name: seen.get(f"{name}_ok") for name in ("shape", "sign", "texture")}
    return found | {name: None if value is None else float(value) for name, value in ok.items()}
