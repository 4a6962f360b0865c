"""Draw pictures with H2-Cache, and the same pictures without it to compare with.

    python run.py                                          # the FLUX that ships with the repository
    python run.py --prompt 'a blue oval badge that says "OPEN" on a dotted pink background' --seed 7
    python run.py --prompts my.txt --preset tiny_flux-5x --set warmup_steps=3
    python run.py --input-image assets/example.png --prompt "..."             # to begin with, edit or animate
    python run.py --model black-forest-labs/FLUX.1-dev     # needs the weights and a GPU; 4 bits with nunchaku

Into --out go the images, a labelled side-by-side PNG of each pair (of videos all frames in a row, and MP4s),
and records.jsonl: one line per image with its settings, seconds, blocks executed, hits, fidelity to the
uncached image and the decision of every step. With --prompts, a stopped run goes on where it ended.
"""

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from analysis import keep
from analysis.families import add_family_arguments
from analysis.gallery import HEADER, Gallery, table_line
from analysis.loading import add_loading_arguments, load
from analysis.prompts import Prompt, read_prompts
from analysis.runs import Limits, default_device, prepare, warm_up
from analysis.scripts import TINY, check_prompts, chosen, guarded, size_of, warn
from h2cache import find_method, method_names
from h2cache.presets import PRESETS

PROMPT = 'a red round sign that says "CAFE" on a striped green background'


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", default=PROMPT, help="what to draw")
    what.add_argument("--prompts", type=Path, help=".txt, one a line; or .jsonl with prompt or image_caption")
    parser.add_argument("--model", default=TINY, help="folder or hub id (default: %(default)s)")
    parser.add_argument("--method", default="h2cache", choices=method_names(), help="default: %(default)s")
    parser.add_argument("--preset", choices=PRESETS, help="settings by name (default: the model's)")
    parser.add_argument("--tau1", help="structure threshold, >= 0")
    parser.add_argument("--tau2", help="detail threshold, >= 0")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other field")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="the same for every prompt (default: 0)")
    parser.add_argument("--height", type=int, help="pixels (default: the model's)")
    parser.add_argument("--width", type=int, help="pixels (default: the model's)")
    add_family_arguments(parser)
    add_loading_arguments(parser, default_device())
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder (default: %(default)s)")
    parser.add_argument("--no-compare", action="store_true", help="do not draw the uncached image")
    args = parser.parse_args(argv)
    return args if args.steps > 0 else parser.error(f"--steps {args.steps}: at least one is needed")


def run(args: argparse.Namespace) -> None:
    (config, preset), uncached = chosen(args), find_method("none")()
    limits = Limits.of(args.model)
    limits.check_size(args.height, args.width)
    prompts = read_prompts(args.prompts) if args.prompts else [Prompt("picture", args.prompt)]
    check_prompts(limits, prompts)
    args.out.mkdir(parents=True, exist_ok=True)
    keep.require_space(args.out, 16 + 8 * len(prompts))

    torch.set_num_threads(limits.cpu_threads or torch.get_num_threads())
    pipeline, name = load(args)
    pipeline, call, further = prepare(pipeline, limits, args)
    if preset and (text := preset.mismatch(args.model, args.steps, size_of(call))):
        warn(text)
    pipeline.set_progress_bar_config(delay=3, leave=False)  # seen only where a picture takes longer
    print(warm_up(pipeline, config, call | {"prompt": prompts[0].text}))
    call["num_inference_steps"] = args.steps
    gallery = Gallery(args.out, pipeline, name, call, bool(args.prompts), further)
    print(HEADER)
    for prompt in tqdm(prompts, unit="picture", delay=3, leave=False, disable=len(prompts) == 1):
        alone = args.no_compare or config == uncached
        rows = gallery.pair(prompt, None if alone else uncached, config, args.seed)
        for row in rows:
            tqdm.write(table_line(row))
        if rows[-1]["warning"]:
            warn(rows[-1]["warning"])
    print(f"pictures and records.jsonl are in {args.out}/")


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    return guarded(lambda: run(args), f"finished pictures and their records are kept in {args.out}/")


if __name__ == "__main__":
    sys.exit(main())
