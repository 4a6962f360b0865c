"""The page of `analysis.demo`, and what it shows of a picture: its difference, steps and costs, and notes.

Annotations are no strings here: Gradio reads that of `request`.
"""

import argparse
from contextvars import copy_context
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops

from analysis.cli import ERRORS, is_embedded, told
from analysis.drawing.draw import Drawn, Limits
from analysis.drawing.prompts import check_text
from analysis.drawing.studio import QUALITY, SPEED, Studio, asked
from analysis.measures.fidelity import fidelity
from analysis.options import seed
from analysis.records.compare import as_table
from h2cache import method_names

CSS = "#steps svg { width: 100%; height: 56px } #gap img { width: 100%; object-fit: contain }"


def difference(cached: Image.Image, uncached: Image.Image) -> tuple[Image.Image, int]:
    """Black where they do not differ, white where they do most; and how much that is, of 255."""
    gap = np.asarray(ImageChops.difference(cached.convert("RGB"), uncached.convert("RGB"))).max(2)
    most = int(gap.max())
    return Image.fromarray((gap * (255 / max(1, most))).astype(np.uint8)), most


def line_of_steps(drawn: Drawn) -> str:
    """A bar for each step, as high as the share of the model's blocks that ran."""
    run, blocks = np.zeros(drawn.summary.steps), np.zeros(drawn.summary.steps)
    for record in drawn.trace:
        run[record["step"]] += record["blocks_run"]
        blocks[record["step"]] += record["blocks"]
    heights = 2 + 48 * run / np.maximum(1, blocks)
    bars = [f'<rect x="{8 * n}" y="{50 - h:.1f}" width="6" height="{h:.1f}"/>' for n, h in enumerate(heights)]
    text = f"{len(bars)} steps; the model ran at {', '.join(map(str, drawn.summary.evaluated))}"
    box = f'viewBox="0 0 {8 * len(bars)} 50" preserveAspectRatio="none" fill="currentColor"'
    return f'<svg {box} role="img" aria-label="{text}">{"".join(bars)}</svg><p>{text}</p>'


def numbers(uncached: Drawn, drawn: Drawn, mean: float | None) -> str:
    """What both cost, and how similar they are."""
    base, mine, alike = uncached.summary, drawn.summary, fidelity(drawn.image, uncached.image)
    expected = f"{mean:.1f} dB, mean at 50 steps" if mean else None
    if mine.expected_psnr:
        expected = f"{mine.expected_psnr[0]:.1f} dB, +- {mine.expected_error:.1f}"
    true = "identical" if alike["identical"] else f"{alike['psnr']:.1f} dB, SSIM {alike['ssim']:.3f}"
    fewer = f"{mine.blocks_run}, {base.blocks_run / max(1, mine.blocks_run):.2f}x fewer"
    costs = [("seconds", f"{uncached.seconds:.2f}", f"{drawn.seconds:.2f}")]
    costs += [("evaluations", len(base.evaluated), len(mine.evaluated)), ("blocks", base.blocks_run, fewer)]
    rows = [*costs, ("expected PSNR", None, expected), ("true PSNR", None, true)]
    return "\n".join(as_table(("", "uncached", mine.method), rows))


def notes_of(*texts: str | None) -> str:
    """Lines that a screen reader reads out."""
    return f'<div role="status">{"".join(f"<p>{escape(text)}</p>" for text in texts if text)}</div>'


def page(model: str, limits: Limits, studio: Studio, example: str) -> Any:
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
            config, mean, note = asked(model, method, wish, speed, quality)
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
        gr.Markdown(f"# H2-Cache on {Path(model).name}")
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
        live = is_embedded(model)  # a picture takes a fifth of a second: draw while a slider moves
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
