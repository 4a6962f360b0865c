"""Draw pictures with H2-Cache and with the plan, and the same pictures without them to compare with.

    python run.py                                          # the FLUX that ships with the repository
    python run.py --prompt 'a blue oval badge that says "OPEN" on a dotted pink background' --seed 7
    python run.py --speedup 8                              # ask for a speed, or --psnr 45 for a quality
    python run.py --prompts my.txt --method h2cache --tau1 0.2 --tau2 0.05
    python run.py --input-image assets/example.png --prompt "..."             # to begin with, edit or animate
    python run.py --model assets/tiny_infdit --input-image assets/tiny_infdit/example.png   # 4 times as large
    python run.py --model black-forest-labs/FLUX.1-dev     # needs the weights and a GPU; 4 bits with nunchaku
    python run.py --prompts my.txt --processes 4           # on 4 GPUs, as torchrun --nproc-per-node 4 run.py

Without a method, both are drawn at 5x, H2-Cache by the paper's rule and the plan. Into --out go the images,
a labelled PNG of them side by side (of videos all frames in a row, and MP4s),
and records.jsonl: one line per image with its settings, seconds, blocks executed, hits, fidelity to the
uncached image and the decision of every step. With --prompts, a stopped run goes on where it ended. Processes
take prompts one by one; on many machines give --out a folder that all of them see.
"""

import argparse
import sys
from pathlib import Path

import analysis  # noqa: F401  first: from here on Ctrl-C is one line

# isort: split
import torch
from tqdm import tqdm

from analysis.cli import TINY, check_prompts, chosen, guarded, size_of, warn
from analysis.drawing.draw import Limits, prepare, require_memory, warm_up
from analysis.drawing.families import add_family_arguments
from analysis.drawing.load import add_loading_arguments, load
from analysis.drawing.prompts import Prompt, read_prompts
from analysis.gallery import HEADER, Gallery, table_line
from analysis.options import Parser, at_least_one, seed, side
from analysis.records import store
from analysis.sharing import is_first, is_one_of_many, launch, own_device, shared
from h2cache import find_method, method_names
from h2cache.presets import PRESETS

PROMPT = 'a red round sign that says "CAFE" on a striped green background'


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__, formatter_class=argparse.RawTextHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", help="what to draw (default: the model's example)")
    what.add_argument("--prompts", type=Path, help=".txt, one a line; or .jsonl with prompt or image_caption")
    parser.add_argument("--model", default=TINY, help="folder or hub id (default: %(default)s)")
    parser.add_argument("--method", choices=method_names(), help="default: h2cache and plan")
    parser.add_argument("--speedup", help="the plan, with this many times fewer evaluations")
    parser.add_argument("--evaluations", help="the plan, with this many evaluations")
    parser.add_argument("--psnr", help="the plan, the fastest with this PSNR in dB to the uncached picture")
    parser.add_argument("--preset", choices=PRESETS, help="settings by name (default: the model's)")
    parser.add_argument("--tau1", help="structure threshold, >= 0")
    parser.add_argument("--tau2", help="detail threshold, >= 0")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other field")
    parser.add_argument("--steps", type=at_least_one, help="default: the model's, else 50")
    parser.add_argument("--seed", type=seed, default=0, help="the same for every prompt (default: 0)")
    parser.add_argument("--height", type=side, help="pixels (default: the model's)")
    parser.add_argument("--width", type=side, help="pixels (default: the model's)")
    add_family_arguments(parser)
    add_loading_arguments(parser, own_device())
    parser.add_argument(
        "--processes", type=at_least_one, default=1, help="of this machine, sharing --prompts"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder (default: %(default)s)")
    parser.add_argument("--no-compare", action="store_true", help="do not draw the uncached image")
    args = parser.parse_args(argv)
    if (args.processes > 1 or is_one_of_many()) and not args.prompts:
        parser.error("several processes share the prompts of a file: give one with --prompts")
    return args


def run(args: argparse.Namespace) -> None:
    many, speaks = is_one_of_many(), is_first()
    contestants, uncached = chosen(args), find_method("none")()
    limits = Limits.of(args.model)
    limits.check_size(args.height, args.width)
    require_memory(args.height, args.width, args.frames)
    args.steps = args.steps or limits.call.get("num_inference_steps", 50)
    if args.steps == 1:
        warn("--steps 1: a cache reuses what earlier steps computed, so nothing can be skipped")
    alone = Prompt("picture", args.prompt or (PROMPT if limits.example is None else limits.example))
    prompts = read_prompts(args.prompts) if args.prompts else [alone]
    check_prompts(limits, prompts if speaks else [])
    args.out.mkdir(parents=True, exist_ok=True)
    store.require_space(args.out, 16 + 8 * len(prompts))

    torch.set_num_threads(limits.cpu_threads or torch.get_num_threads())
    pipeline, name = load(args)
    pipeline, call, further = prepare(pipeline, limits, args)
    for _, preset in contestants:
        if speaks and preset and (text := preset.mismatch(args.model, args.steps, size_of(call))):
            warn(text)
    pipeline.set_progress_bar_config(
        delay=3, leave=False, disable=None
    )  # seen only where a picture takes longer
    configs = [config for config, _ in contestants]
    for config in configs:
        told = warm_up(pipeline, config, call | {"prompt": prompts[0].text})
        if speaks:
            print(told)
    call["num_inference_steps"] = args.steps
    gallery = Gallery(args.out, pipeline, name, call, bool(args.prompts), further)
    beside = None if args.no_compare or configs == [uncached] else uncached
    how = beside, configs, args.seed
    taken = shared(prompts, args.out, lambda p: p.id, lambda p: gallery.done(p, *how)) if many else prompts
    if speaks:
        print(HEADER)
    bar = {"unit": "picture", "delay": 3, "leave": False, "disable": len(prompts) == 1 or not speaks or None}
    for prompt in tqdm(taken, total=len(prompts), **bar):
        for row in gallery.row(prompt, *how):
            tqdm.write(table_line(row))
            if row.get("warning"):
                warn(row["warning"])
                continue
            words = [*row.get("notes", ())]
            if row.get("expected_psnr"):
                words.insert(
                    0, f"expected PSNR {row['expected_psnr']:.1f} dB, +- {row['expected_error']:.1f}"
                )
            if words:
                tqdm.write(f"  {'; '.join(words)}")
    if speaks:  # all have ended
        store.tidy(args.out / "records.jsonl")
        print(f"pictures and records.jsonl are in {args.out}/")


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.processes > 1 and not is_one_of_many():
        return launch([__file__, *(sys.argv[1:] if argv is None else argv)], args.processes)
    return guarded(lambda: run(args), f"finished pictures and their records are kept in {args.out}/")


if __name__ == "__main__":
    sys.exit(main())
