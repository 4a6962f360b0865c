"""Score a model folder on prompts it never saw: shape, colours, motion, speed, letters.

    python -m analysis.tiny_wan.evaluate --out evaluation.json --sheet samples.png --movie preview.mp4
    python -m analysis.tiny_wan.evaluate --steps 2 4 8 16 30 50 --out steps.json   # accuracy against steps
    python -m analysis.tiny_wan.evaluate --renderings --out ceiling.json     # what the checks allow

Everything is measured on the frames: the mask of what is drawn is the distance from the measured background,
motion the slope of its centre, growth and fading its area and strength, shape the silhouette that fits best
at the measured centre, letters the glyphs that fit best in the cells of the line. Seed i draws prompt i.
"""

import argparse
import json
import random
import time
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch

from analysis.records.provenance import provenance
from analysis.records.store import write_atomically
from analysis.tiny_flux.signs import COLOURS, LETTERS
from analysis.tiny_wan import clips
from analysis.tiny_wan.clips import DIRECTIONS, FRAMES, SHAPES, SIZE, ClipSpec

HELD_OUT_SEED = 20261127
SLOWEST = 0.5  # pixels a frame below which a thing counts as standing
BATCH = 8


def held_out(count: int) -> list[ClipSpec]:
    rng, found = random.Random(HELD_OUT_SEED), []
    while len(found) < count:
        spec = clips.sample_spec(rng)
        if clips.is_held_out(spec):
            found.append(spec)
    return found


def nearest_colour(pixels: np.ndarray) -> str:
    """The name nearest to the per-channel median."""
    middle = np.median(pixels.reshape(-1, 3), 0)
    return min(COLOURS, key=lambda name: float(np.abs(middle - np.array(COLOURS[name])).sum()))


def never_covered(spec: ClipSpec) -> np.ndarray:
    """(64, 64): pixels that stay background throughout, two pixels away from anything drawn."""
    union = np.max([cover.max(0) for _, cover in clips.covers(spec)], 0) > 0.02
    for axis in (0, 1):
        union = union | np.roll(union, 2, axis) | np.roll(union, -2, axis)
    return ~union


def difference(frames: np.ndarray, empty: np.ndarray) -> np.ndarray:
    """(17, 64, 64): distance of every pixel from its frame's background, a fitted plane of light."""
    down, across = np.mgrid[0:SIZE, 0:SIZE] / SIZE - 0.5
    planes = np.stack([np.ones_like(down), down, across], -1).astype(np.float32)  # (64, 64, 3)
    values = frames.astype(np.float32)
    seen = values[:, empty].transpose(1, 0, 2).reshape(int(empty.sum()), -1)  # (pixels, 17 * 3)
    light = np.linalg.lstsq(planes[empty], seen, rcond=None)[0]
    ground = (planes.reshape(-1, 3) @ light).reshape(SIZE, SIZE, len(frames), 3).transpose(2, 0, 1, 3)
    return np.maximum(np.abs(values - ground).sum(-1) - 24, 0)


def strength(distance: np.ndarray) -> np.ndarray:
    """(17,): mean of the 40 strongest pixels of every frame."""
    return np.sort(distance.reshape(len(distance), -1), 1)[:, -40:].mean(1)


def centres(masks: np.ndarray) -> np.ndarray:
    """(frames, 2): x, y; nan where nothing is seen."""
    place = np.arange(SIZE, dtype=np.float32) + 0.5
    weight = masks.sum((1, 2)).astype(np.float64)
    weight[weight < 1e-3] = np.nan
    return np.stack([(masks.sum(1) @ place) / weight, (masks.sum(2) @ place) / weight], 1)


def slope(values: np.ndarray, first: int, last: int) -> np.ndarray:
    """Least-squares change a frame of every column between two frames."""
    late = np.arange(first, last + 1, dtype=np.float64)
    late -= late.mean()
    return late @ np.nan_to_num(values[first : last + 1]) / (late @ late)


def seen_move(speed: np.ndarray) -> tuple[str, float]:
    """Direction ("" for none) and pixels a frame along it."""
    axis = int(np.argmax(np.abs(speed)))
    if abs(speed[axis]) < SLOWEST:
        return "", 0.0
    step = (int(np.sign(speed[0])), 0) if axis == 0 else (0, int(np.sign(speed[1])))
    return next(name for name, way in DIRECTIONS.items() if way == step), float(abs(speed[axis]))


def pace_of(speed: float) -> str:
    return min(clips.SPEEDS, key=lambda name: abs(clips.SPEEDS[name] - speed))


def seen_change(distance: np.ndarray) -> str:
    """Fading, growing or neither, from the first and the last quarter."""
    strong = strength(distance) + 1e-3
    area = distance.sum((1, 2)) / strong
    (faint, bright), (small, large) = ((v[:4].mean(), v[-4:].mean()) for v in (strong, area))
    if max(faint, bright) > 1.6 * min(faint, bright):
        return "fades in" if bright > faint else "fades out"
    if max(small, large) > 1.8 * min(small, large):
        return "grows" if large > small else "shrinks"
    return ""


def fitted(shape: str, radius: float, degrees: float, centre: np.ndarray) -> np.ndarray:
    """The canonical mask, moved so that its centre of gravity is the given one."""
    middle = SIZE / 2
    off = centres(clips.mask(shape, middle, middle, radius, degrees)[None])[0] - middle
    return clips.mask(shape, *(centre - off), radius, degrees)


def seen_shape(mask: np.ndarray, radius: float) -> str:
    centre = centres(mask[None])[0]
    if np.isnan(centre).any():
        return ""
    misfit = {
        shape: min(np.abs(mask - fitted(shape, radius * s, 0.0, centre)).mean() for s in (0.92, 1.0, 1.08))
        for shape in SHAPES
    }
    return min(misfit, key=misfit.get)


def seen_turn(masks: np.ndarray, shape: str) -> str:
    """Which of the three hypotheses fits all frames best."""
    places = centres(masks)
    if np.isnan(places).any():
        return ""
    misfit = {}
    for action, sign in (("turns clockwise", 1), ("turns anticlockwise", -1), ("stands still", 0)):
        wanted = [fitted(shape, clips.RADIUS, sign * clips.DEGREES * f, c) for f, c in enumerate(places)]
        misfit[action] = np.abs(masks - np.stack(wanted)).mean()
    return min(misfit, key=misfit.get)


def check_thing(frames: np.ndarray, spec: ClipSpec) -> dict:
    thing, distance = spec.things[0], difference(frames, never_covered(spec))
    strong = strength(distance)
    masks = np.clip(distance / np.maximum(strong, 30)[:, None, None], 0, 1)
    way, speed = seen_move(slope(centres(masks), 3, 13))
    change = seen_change(distance)
    if way:
        action = f"moves {way}{pace_of(speed)}"
    else:
        action = change or (
            seen_turn(masks, thing.shape) if thing.shape in clips.TURNABLE else "stands still"
        )
    # The frame that shows the shape upright, whole and strong; of things that move, the middle one.
    last = FRAMES - 1
    clearest = {"grows": last, "fades in": last, "shrinks": 0, "fades out": 0}.get(thing.action, 8)
    clearest = 0 if thing.action in clips.TURNS else clearest
    inner = masks[clearest] > 0.75
    found = {
        "colour_ok": bool(inner.any()) and nearest_colour(frames[clearest][inner]) == thing.colour,
        "shape_ok": seen_shape(masks[clearest], clips.place(thing.action, clearest)[2]) == thing.shape,
        "action_ok": action == thing.action,
        "seen_action": action,
    }
    if thing.action in clips.MOVES:
        wanted_way, _, pace = thing.action.removeprefix("moves ").partition(" ")
        wanted_speed = clips.SPEEDS[f" {pace}" if pace else ""]
        found |= {"direction_ok": way == wanted_way, "speed_ok": pace_of(speed) == pace_name(pace)}
        found["speed_error"] = round(abs(speed - wanted_speed), 3)
    return found


def pace_name(pace: str) -> str:
    return f" {pace}" if pace else ""


def check_pair(frames: np.ndarray, spec: ClipSpec) -> dict:
    """Each thing is followed by its own colour, before and after the two meet."""
    colours = np.array([COLOURS[spec.background], *(COLOURS[t.colour] for t in spec.things)], np.float32)
    distances = np.abs(frames[..., None, :].astype(np.float32) - colours).sum(-1)  # (17, 64, 64, 3)
    owner = np.where(distances.min(-1) < 100, distances.argmin(-1), -1)  # blends at edges belong to nobody
    ends = [0, 1, 2, FRAMES - 3, FRAMES - 2, FRAMES - 1]
    found = dict.fromkeys(("colour_ok", "shape_ok", "direction_ok", "speed_ok"), True)
    errors = []
    for number, thing in enumerate(spec.things, 1):
        core = clips.thing_cover(thing.shape, thing.action) > 240
        for frame in (0, FRAMES - 1):
            found["colour_ok"] &= nearest_colour(frames[frame][core[frame]]) == thing.colour
        mine = (owner == number).astype(np.float32)
        found["shape_ok"] &= seen_shape(mine[0], clips.RADIUS) == thing.shape
        places = centres(mine)[ends]
        late = np.array(ends, np.float64) - 8
        speed = late @ np.nan_to_num(places) / (late @ late)
        way, pixels = seen_move(speed)
        found["direction_ok"] &= f"moves {way}" == thing.action
        found["speed_ok"] &= pace_of(pixels) == ""
        errors.append(abs(pixels - clips.SPEEDS[""]))
    found["action_ok"] = found["direction_ok"] and found["speed_ok"]
    front = clips.thing_cover(spec.things[0].shape, spec.things[0].action)[8] > 240
    found["front_ok"] = nearest_colour(frames[8][front]) == spec.things[0].colour
    return found | {"speed_error": round(mean(errors), 3)}


def read_letters(mask: np.ndarray, count: int) -> str:
    """The glyphs that correlate best in the cells of a centred line, whose height is measured."""
    centre = centres(mask[None])[0]
    left = (SIZE - clips.CELL * count) // 2
    if np.isnan(centre).any():
        return ""
    outside = np.ones(SIZE, bool)
    outside[max(0, left - 2) : left + clips.CELL * count + 2] = False
    if outside.any() and mask[:, outside].sum() > 0.1 * mask.sum():
        return ""  # more letters than were asked for
    padded = np.pad(mask, clips.CELL)
    read = ""
    for i in range(count):
        best = (-2.0, "")
        for down in range(-4, 5):
            top = round(float(centre[1])) - clips.LETTER_HEIGHT // 2 + down + clips.CELL
            for across in range(-2, 3):
                start = left + i * clips.CELL + across + clips.CELL
                window = padded[top : top + clips.LETTER_HEIGHT, start : start + clips.CELL]
                if window.shape != (clips.LETTER_HEIGHT, clips.CELL):
                    continue
                flat = window - window.mean()
                scores = TEMPLATES @ flat.ravel() / (np.linalg.norm(flat) + 1e-6)
                best = max(best, (float(scores.max()), LETTERS[int(scores.argmax())]))
        read += best[1]
    return read


def templates() -> np.ndarray:
    """(26, 320), each of mean 0 and norm 1."""
    rows = np.stack([clips.glyph(letter).ravel() for letter in LETTERS])
    rows = rows - rows.mean(1, keepdims=True)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


TEMPLATES = templates()


def check_word(frames: np.ndarray, spec: ClipSpec) -> dict:
    distance = difference(frames, never_covered(spec))
    masks = np.clip(distance / np.maximum(strength(distance), 30)[:, None, None], 0, 1)
    way, speed = seen_move(slope(centres(masks), 2, 14))
    change = seen_change(distance)
    action = f"scrolls {way}" if way in ("up", "down") else way or change or "stands still"
    frame = {"fades in": FRAMES - 1, "fades out": 0}.get(spec.action, 8)
    read = read_letters(masks[frame], len(spec.word))
    right = [a == b for a, b in zip(read, spec.word, strict=False)]
    found = {"read": read, "word_ok": read == spec.word, "letters_right": sum(right)}
    found |= {"action_ok": action == spec.action, "seen_action": action}
    if spec.action.startswith("scrolls"):
        wanted = spec.action.removeprefix("scrolls ")
        found |= {"direction_ok": way == wanted, "speed_ok": pace_of(speed) == ""}
        found["speed_error"] = round(abs(speed - 2), 3)
    return found


def check(frames: np.ndarray, spec: ClipSpec) -> dict:
    """What is seen in one clip, and whether it is what the prompt asked for."""
    kind = "word" if spec.word else "two things" if len(spec.things) == 2 else "one thing"
    empty = never_covered(spec)
    found = {"kind": kind, "background_ok": nearest_colour(frames[:, empty]) == spec.background}
    found |= {"word": check_word, "two things": check_pair, "one thing": check_thing}[kind](frames, spec)
    found["all_ok"] = all(value for name, value in found.items() if name.endswith("_ok"))
    truth, drawn = clips.render(spec).astype(np.float32), frames.astype(np.float32)
    found["psnr"] = round(float(10 * np.log10(255**2 / (np.square(drawn - truth).mean() + 1e-9))), 2)
    found["flicker"] = round(float(np.abs(np.diff(drawn, axis=0) - np.diff(truth, axis=0)).mean()), 3)
    return found


def summarise(rows: list[dict]) -> dict:
    """Shares of what is right, over the clips to which each question applies."""
    found = {"clips": len(rows)}
    for name in ("all", "background", "colour", "shape", "action", "direction", "speed", "front", "word"):
        asked = [row[f"{name}_ok"] for row in rows if f"{name}_ok" in row]
        found[name] = round(mean(asked), 4) if asked else None
        found[f"{name}_asked"] = len(asked)
    for kind in ("one thing", "two things", "word"):
        asked = [row["all_ok"] for row in rows if row["kind"] == kind]
        found[f"all, {kind}"] = round(mean(asked), 4) if asked else None
    words = [row for row in rows if "letters_right" in row]
    letters = sum(len(row["spec"]["word"]) for row in words)
    found["letters"] = round(sum(row["letters_right"] for row in words) / letters, 4) if letters else None
    errors = [row["speed_error"] for row in rows if "speed_error" in row]
    found["speed_error_px_per_frame"] = round(mean(errors), 3) if errors else None
    found["psnr_to_canonical_db"] = round(mean(row["psnr"] for row in rows), 2)
    found["flicker_levels"] = round(mean(row["flicker"] for row in rows), 3)
    return found


class Drawer:
    """The model folder with its own limits.json."""

    def __init__(self, folder: str, guidance: float | None, negative: str | None) -> None:
        from diffusers import WanPipeline

        self.usual = json.loads((Path(folder) / "limits.json").read_text())["call"]
        self.pipe = WanPipeline.from_pretrained(folder)
        self.pipe.set_progress_bar_config(disable=True)
        self.guidance = self.usual["guidance_scale"] if guidance is None else guidance
        self.negative = self.usual["negative_prompt"] if negative is None else negative

    def __call__(self, prompts: list[str], seeds: list[int], steps: int) -> list[np.ndarray]:
        drawn = self.pipe(
            prompts,
            [self.negative] * len(prompts),
            height=SIZE,
            width=SIZE,
            num_frames=FRAMES,
            num_inference_steps=steps,
            guidance_scale=self.guidance,
            max_sequence_length=self.usual["max_sequence_length"],
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).frames
        return list((drawn * 255).round().astype(np.uint8))


def draw_all(args: argparse.Namespace, specs: list[ClipSpec], steps: int, drawer: Drawer | None) -> list:
    if drawer is None:
        rng = random.Random(1)
        return [clips.render(spec, rng) for spec in specs]
    drawn = []
    for first in range(0, len(specs), BATCH):
        seeds = list(range(first, min(first + BATCH, len(specs))))
        drawn += drawer([clips.prompt(specs[i]) for i in seeds], seeds, steps)
    return drawn


def save_movie(path: str, drawn: list[np.ndarray], columns: int, scale: int = 2, fps: int = 8) -> None:
    """A grid of clips, each held for half a second at its end."""
    import imageio

    rows = [np.concatenate(drawn[i : i + columns], 2) for i in range(0, len(drawn), columns)]
    grid = np.concatenate(rows, 1).repeat(scale, 1).repeat(scale, 2)
    imageio.mimwrite(path, [*grid, *[grid[-1]] * 4], fps=fps, macro_block_size=16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="assets/tiny_wan")
    parser.add_argument("--renderings", action="store_true", help="score true clips instead of a model")
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--steps", type=int, nargs="+", help="default: the model's own number")
    parser.add_argument("--guidance", type=float, help="default: the model's own")
    parser.add_argument("--negative", help="default: the model's own negative prompt")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sheet", help="also write the first 24 clips, unpicked, to this PNG")
    parser.add_argument("--movie", help="and to this MP4")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    drawer = None if args.renderings else Drawer(args.model, args.guidance, args.negative)
    specs = held_out(args.count)
    record = provenance("tiny_wan.evaluate", "cpu")
    if drawer is not None:
        record |= {"guidance_scale": drawer.guidance, "negative_prompt": drawer.negative}
    counts = args.steps or ([0] if drawer is None else [drawer.usual["num_inference_steps"]])
    summaries = {}
    for steps in counts:
        drawn = draw_all(args, specs, steps, drawer)
        rows = [
            {"prompt": clips.prompt(spec), "seed": i, "spec": asdict(spec)} | check(frames, spec)
            for i, (spec, frames) in enumerate(zip(specs, drawn, strict=True))
        ]
        summaries[str(steps)] = summarise(rows)
        print(steps, json.dumps(summaries[str(steps)]), flush=True)
    if drawer is not None:
        took = []
        for i in range(5):
            start = time.perf_counter()
            drawer([clips.prompt(specs[i])], [i], counts[-1])
            took.append(time.perf_counter() - start)
        record["median_seconds_one_clip"] = round(median(took), 3)
    record |= {"summaries": summaries, "rows_steps": counts[-1], "rows": rows}
    write_atomically(args.out, (json.dumps(record, indent=1) + "\n").encode())
    if args.sheet:
        clips.sheet(drawn[:24], columns=3).save(args.sheet)
    if args.movie:
        save_movie(args.movie, drawn[:24], columns=6)


if __name__ == "__main__":
    main()
