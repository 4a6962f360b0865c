"""A page to try it: an uncached and a cached picture under one slider, drawn again while a speed is chosen.

    python -m analysis.demo                                          # the embedded model
    python -m analysis.demo --model black-forest-labs/FLUX.1-dev     # needs the weights and a GPU

Needs `pip install -r requirements-demo.txt`. Without --share only this machine can open the page.
"""

import argparse
import importlib.util
import sys
from typing import Any

from analysis.cli import TINY, guarded, start
from analysis.drawing.draw import Limits, default_device
from analysis.drawing.families import add_family_arguments, takes
from analysis.drawing.load import add_loading_arguments
from analysis.drawing.studio import Studio
from analysis.figures.demo import CSS, page
from analysis.options import Parser, at_least_one, side, whole
from h2cache import PlanConfig


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--model", default=TINY, help="default: %(default)s")
    parser.add_argument("--steps", type=at_least_one, help="default: the model's, else 50")
    parser.add_argument("--height", type=side, help="pixels (default: the model's)")
    parser.add_argument("--width", type=side, help="pixels (default: the model's)")
    parser.add_argument("--port", type=whole(1, 65535), help="default: the first free one from 7860 on")
    parser.add_argument("--share", action="store_true", help="for everybody, through Gradio's servers")
    add_family_arguments(parser)
    add_loading_arguments(parser, default_device())
    return parser.parse_args(argv, argparse.Namespace(seed=0))


def serve(args: argparse.Namespace, wait: bool = True) -> Any:
    """Load the model and open the page to this machine until Ctrl-C; not to `wait`: returns the page."""
    if importlib.util.find_spec("gradio") is None:
        raise ImportError("the page needs Gradio: pip install -r requirements-demo.txt")
    import gradio as gr

    limits = Limits.of(args.model)
    args.steps = args.steps or limits.call.get("num_inference_steps", 50)
    pipeline, _, call, _ = start(args, [])
    example = limits.example or ('a sign that says "CAFE"' if takes(pipeline, "prompt") else "1")
    studio = Studio(pipeline, call)
    studio.thread.submit(studio.draw, example, 0, PlanConfig(), lambda *_: None).result()
    blocks = page(args.model, limits, studio, example)
    local = gr.themes.Default(font=["system-ui"], font_mono=["monospace"])  # no fonts of Google's
    look = {"css": CSS, "theme": local, "ssr_mode": False, "footer_links": []}
    where = {"server_name": "127.0.0.1", "server_port": args.port, "share": args.share}
    blocks.launch(**where, **look, prevent_thread_lock=not wait)
    return None if wait else blocks


def main(argv: list[str] | None = None) -> int:
    return guarded(lambda: serve(arguments(argv)), "the page is closed")


if __name__ == "__main__":
    sys.exit(main())
