"""Score the upscaler on held-out signs, and two caches on it.

    python -m analysis.tiny_infdit.evaluate --out evaluation.json --sheet samples.png

The prompts are the embedded model's held-out ones. For each of --count signs three small pictures are
enlarged: the true sign scaled down ("scaled"), the same through the embedded model's VAE ("vae"), and what
the embedded model draws of the prompt ("drawn", seed: the sign's number). The first two are compared with the
true large sign, the third has none. Beside each stands bicubic interpolation. What is read and seen: by the
checks of `analysis.tiny_flux.evaluate`, words at 512 pixels, the rest at 128.

Then the drawn ones are enlarged under the paper's rule and under the plan, and compared with the uncached.
"""

import argparse
import json
import random
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from PIL import Image

from analysis.drawing.draw import Drawn, draw, load_pipeline
from analysis.measures.fidelity import fidelity
from analysis.measures.words import read_words
from analysis.records.provenance import provenance
from analysis.records.store import write_atomically
from analysis.tiny_flux import signs
from analysis.tiny_flux.evaluate import check, drawer, held_out
from analysis.tiny_infdit.assemble import FLUX, STEPS
from analysis.tiny_infdit.model import SCALE
from analysis.tiny_infdit.pairs import load_vae, pair
from h2cache import H2Config, MethodConfig, PlanConfig, find_method

NONE = find_method("none")()
CACHES: dict[str, MethodConfig] = {
    "H2-Cache, its defaults": H2Config(),
    "H2-Cache, all it can skip": H2Config(tau1=float("inf"), tau2=float("inf")),
    "plan, 3.3x": PlanConfig(speedup=10 / 3),
    "plan, 5x": PlanConfig(speedup=5.0),
}
SEED = 1  # of the signs' shades
MIDDLE = (64, 160, 448, 352)  # of a large picture, for the sheet


def to_picture(levels: torch.Tensor) -> Image.Image:
    """(1, 3, H, W) in [-1, 1]."""
    pixels = ((levels[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    return Image.fromarray(pixels.numpy())


def bicubic(small: Image.Image) -> Image.Image:
    return small.resize((SCALE * small.width, SCALE * small.height), Image.Resampling.BICUBIC)


def seen(large: Image.Image, spec: signs.SignSpec, truth: Image.Image | None) -> dict:
    """What is right in an enlarged sign, 0 or 1, and how near it is to the true one."""
    found = check(np.asarray(large.reduce(SCALE)), spec)
    near = {"psnr": fidelity(large, truth)["psnr"]} if truth else {}
    return {"word_ok": spec.word in read_words(large)} | found | near


def averages(rows: list[dict]) -> dict[str, float]:
    return {name: round(mean(float(row[name]) for row in rows), 4) for name in rows[0]}


def evaluate(args: argparse.Namespace) -> tuple[dict, list[np.ndarray]]:
    """The scores, and pictures for a sheet: small ones enlarged by bicubic interpolation, ours, true."""
    pipeline = load_pipeline(str(args.model), "cpu", None)
    pipeline.set_progress_bar_config(disable=True)
    sign, vae, rng = drawer(FLUX), load_vae(Path(FLUX)), random.Random(SEED)

    def enlarge(small: Image.Image, number: int, config: MethodConfig = NONE) -> Drawn:
        return draw(pipeline, config, number, image=small, num_inference_steps=args.steps)

    rows: dict[str, list[dict]] = {name: [] for name in ("scaled", "vae", "drawn")}
    cached: dict[str, list[dict]] = {name: [] for name in CACHES}
    sheet = []
    for number, (spec, prompt) in enumerate(held_out(args.count)):
        state = rng.getstate()
        large, small = pair(spec, rng, None)
        rng.setstate(state)
        truth, blurred = to_picture(large), pair(spec, rng, vae)[1]
        pictures = {
            "scaled": (to_picture(small), truth),
            "vae": (to_picture(blurred), truth),
            "drawn": (sign(prompt, number, 50), None),
        }
        for name, (picture, true) in pictures.items():
            drawn = enlarge(picture, number)
            row = {"bicubic": bicubic(picture), "ours": drawn.image}
            row = {kind: seen(image, spec, true) for kind, image in row.items()}
            rows[name].append({"prompt": prompt, **row, "true": seen(truth, spec, None)})
            sheet += [np.asarray(image.crop(MIDDLE)) for image in (bicubic(picture), drawn.image, truth)]
        for name, config in CACHES.items():
            other = enlarge(pictures["drawn"][0], number, config)
            cached[name].append(
                {
                    "blocks_ratio": other.summary.blocks / other.summary.blocks_run,
                    "psnr": fidelity(other.image, drawn.image)["psnr"],
                }
            )
        print(number, prompt, {name: found[-1] for name, found in (rows | cached).items()}, flush=True)
    summary = {
        name: {kind: averages([row[kind] for row in found]) for kind in ("bicubic", "ours", "true")}
        for name, found in rows.items()
    }
    record = {**provenance("tiny_infdit.evaluate", "cpu"), "steps": args.steps, "signs": args.count}
    record |= {"enlarged": summary, "cached": {name: averages(found) for name, found in cached.items()}}
    return record | {"rows": rows, "cached_rows": cached}, sheet


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("assets/tiny_infdit"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sheet", type=Path, help="also write the first two signs, unpicked, to this PNG")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    record, sheet = evaluate(args)
    write_atomically(args.out, (json.dumps(record, indent=1) + "\n").encode())
    if args.sheet:
        signs.sheet(sheet[:18], columns=3).quantize(256).save(args.sheet, optimize=True)
    print(json.dumps({k: record[k] for k in ("enlarged", "cached")}, indent=1))


if __name__ == "__main__":
    main()
