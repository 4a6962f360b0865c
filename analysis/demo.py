"""A page to try it: an uncached and a cached picture under one slider, drawn again while a speed is chosen.

    python -m analysis.demo                                          # the embedded model
    python -m analysis.demo --model black-forest-labs/FLUX.1-dev     # needs the weights and a GPU

Needs `pip install -r requirements-demo.txt`. Without --share only this machine can open the page.
"""

import argparse
import csv
import importlib.util
import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from analysis.cli import ERRORS, TINY, guarded, is_embedded, shipped, start, told
from analysis.drawing.draw import Drawn, Limits, default_device, draw
from analysis.drawing.families import add_family_arguments, takes
from analysis.drawing.load import add_loading_arguments
from analysis.drawing.prompts import check_text
from analysis.figures.demo import difference, line_of_steps, notes_of, numbers
from analysis.options import Parser, at_least_one, seed, side, whole
from analysis.settings import config_of
from h2cache import MethodConfig, PlanConfig, find_method, method_names
from h2cache.api import checkpoint_name, denoisers_of
from h2cache.presets import find_preset

Asked = tuple[MethodConfig, float | None, str]  # settings, mean PSNR measured with them, a note
Seen = Callable[[str, int, int], None]  # method, step, steps
SPEED, QUALITY = "a speed", "a quality"
MEASURED = Path(shipped("assets/figures/pareto_psnr.csv"))  # settings of each method on the embedded model
CSS = "#steps svg { width: 100%; height: 56px } #gap img { width: 100%; object-fit: contain }"


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


def asked(model: str, method: str, wish: str, speed: float, quality: float) -> Asked:
    """The settings of `method` that come nearest to SPEED or QUALITY, as `wish` says."""
    if method == "plan":
        return (PlanConfig(speedup=speed) if wish == SPEED else PlanConfig(psnr=quality)), None, ""
    if method == "fewer_steps" and wish == SPEED:
        return find_method(method)(factor=speed), None, ""
    rows = csv.DictReader(MEASURED.read_text(encoding="utf-8").splitlines())
    points = [(float(r["blocks_ratio"]), float(r["mean"]), r["label"]) for r in rows if r["line"] == method]
    if not points or not is_embedded(model):
        preset, why = find_preset(model, method), "not measured on this model: no slider changes it"
        return preset.config if preset else find_method(method)(), None, f"{method}: {why}"
    if wish == SPEED:
        _, mean, label = min(points, key=lambda p: abs(math.log(p[0] / speed)))
    else:  # the fastest that reaches it, else the best
        enough = [p for p in points if p[1] >= quality]
        _, mean, label = max(enough) if enough else max(points, key=lambda p: p[1])
    return config_of(label.replace(" ", ":")), mean, f"nearest setting measured at 50 steps: {label}"


@dataclass
class Studio:
    """A model, the newest uncached picture, and the thread that draws: the first picture of each is slow."""

    pipeline: DiffusionPipeline
    call: dict[str, Any]
    uncached: dict[tuple[str, int], Drawn] = field(default_factory=dict)
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def draw(self, prompt: str, number: int, config: MethodConfig, seen: Seen) -> Drawn:
        """A picture; `seen` is called where a step begins, and may raise."""
        calls, steps = count(), config.requested_steps(self.call["num_inference_steps"])

        def before(*_: Any) -> None:
            step = getattr(self.pipeline.scheduler, "step_index", next(calls)) or 0
            seen(config.name, min(step, steps - 1), steps)

        hooks = [model.register_forward_pre_hook(before) for model in denoisers_of(self.pipeline)]
        try:
            return draw(self.pipeline, config, number, **self.call, prompt=prompt)
        finally:
            for hook in hooks:
                hook.remove()

    def pair(self, prompt: str, number: int, config: MethodConfig, seen: Seen) -> tuple[Drawn, Drawn]:
        """The uncached picture, which is kept until another is asked for, and the one by `config`."""
        config = config.for_checkpoint(checkpoint_name(self.pipeline))  # refuses before anything is drawn
        if (prompt, number) not in self.uncached:
            self.uncached = {(prompt, number): self.draw(prompt, number, find_method("none")(), seen)}
        return self.uncached[prompt, number], self.draw(prompt, number, config, seen)


def page(args: argparse.Namespace, limits: Limits, studio: Studio, example: str) -> Any:
    """Gradio's Blocks. One picture is drawn at a time, whoever asks for it."""
    import gradio as gr

    cancelled: set[str | None] = set()  # sessions

    def show(prompt, number, method, wish, speed, quality, request: gr.Request, progress=gr.Progress()):  # noqa: B008
        def seen(name: str, step: int, steps: int) -> None:
            if request.session_hash in cancelled:
                raise InterruptedError(f"cancelled before step {step} of {steps}, {name}")
            progress((step, steps), name)

        cancelled.discard(request.session_hash)
        try:
            check_text(prompt)
            config, mean, note = asked(args.model, method, wish, speed, quality)
            job = copy_context().run, studio.pair, prompt, seed(str(number)), config, seen
            uncached, drawn = studio.thread.submit(*job).result()
        except (*ERRORS, RuntimeError, argparse.ArgumentTypeError) as error:
            kind = "" if isinstance(error, InterruptedError) else "error: "
            return notes_of(kind + told(error)), *[gr.skip()] * 4, wish
        warnings = [f"warning: {text}" for text in (*limits.warnings(prompt), drawn.summary.warning) if text]
        both, texts = (uncached.image, drawn.image), notes_of(*warnings, note, *drawn.summary.notes)
        gap, most = difference(*both)
        shown = gr.Image(gap, label=f"Difference: black 0, white {most} of 255")
        return texts, both, shown, numbers(uncached, drawn, mean), line_of_steps(drawn), wish

    def cancel(request: gr.Request) -> None:
        cancelled.add(request.session_hash)

    names = ["plan", "h2cache", *(n for n in method_names() if n not in ("plan", "h2cache", "none"))]
    with gr.Blocks(title="H2-Cache", analytics_enabled=False, delete_cache=(600, 600)) as blocks:
        gr.Markdown(f"# H2-Cache on {Path(args.model).name}")
        prompt = gr.Textbox(example, label="Prompt")
        with gr.Row():
            number = gr.Number(0, label="Seed", precision=0, min_width=120)
            method = gr.Dropdown(names, value="plan", label="Method", min_width=160)
            wish = gr.Radio([SPEED, QUALITY], value=SPEED, label="Ask for", min_width=200)
        with gr.Row():
            speed = gr.Slider(1, 10, 5, step=0.5, label="Speed: times fewer evaluations", min_width=300)
            quality = gr.Slider(20, 70, 40, step=1, label="Quality: PSNR in dB", min_width=300)
        with gr.Row():
            go, stop = gr.Button("Draw", variant="primary"), gr.Button("Cancel")
        notes = gr.HTML(elem_id="notes")
        with gr.Row():
            with gr.Column(min_width=300):
                pair = gr.ImageSlider(label="Uncached | cached", format="png", elem_id="pair")
                line = gr.Slider(0, 100, 50, step=1, label="Line between the pictures, %")
            with gr.Column(min_width=300):
                table, steps = gr.Markdown(elem_id="numbers"), gr.HTML(elem_id="steps")
                gap = gr.Image(label="Difference", format="png", height=240, buttons=[], elem_id="gap")
        live = is_embedded(args.model)  # a picture takes a fifth of a second: draw while a slider moves
        outputs = [notes, pair, gap, table, steps, wish]
        common = {"outputs": outputs, "show_progress_on": pair, "concurrency_id": "model"}
        events = [go.click, prompt.submit, *([blocks.load, method.input, wish.input] if live else [])]
        gr.on(events, show, [prompt, number, method, wish, speed, quality], **common)
        for slider, its in ((speed, SPEED), (quality, QUALITY)):
            if live:
                moved = [prompt, number, method, gr.State(its), speed, quality]
                slider.input(show, moved, trigger_mode="always_last", show_progress="hidden", **common)
            else:
                slider.input(lambda its=its: its, None, wish, queue=False)
        line.input(lambda share: gr.ImageSlider(slider_position=share), line, pair, queue=False)
        stop.click(cancel, queue=False)
    return blocks


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
    blocks = page(args, limits, studio, example)
    local = gr.themes.Default(font=["system-ui"], font_mono=["monospace"])  # no fonts of Google's
    look = {"css": CSS, "theme": local, "ssr_mode": False, "footer_links": []}
    where = {"server_name": "127.0.0.1", "server_port": args.port, "share": args.share}
    blocks.launch(**where, **look, prevent_thread_lock=not wait)
    return None if wait else blocks


def main(argv: list[str] | None = None) -> int:
    return guarded(lambda: serve(arguments(argv)), "the page is closed")


if __name__ == "__main__":
    sys.exit(main())
