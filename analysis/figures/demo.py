"""What the page of `analysis.demo` shows of a picture: its difference, its steps, its costs, notes."""

from __future__ import annotations

from html import escape

import numpy as np
from PIL import Image, ImageChops

from analysis.drawing.draw import Drawn
from analysis.measures.fidelity import fidelity
from analysis.records.compare import as_table


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
