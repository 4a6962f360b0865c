"""What `analysis.demo` draws: pairs of pictures by one thread, with the settings nearest to a wish."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from analysis.cli import is_embedded, shipped
from analysis.drawing.draw import Drawn, draw
from analysis.settings import config_of
from h2cache import MethodConfig, PlanConfig, find_method
from h2cache.api import checkpoint_name, denoisers_of
from h2cache.presets import find_preset

Asked = tuple[MethodConfig, float | None, str]  # settings, mean PSNR measured with them, a note
Seen = Callable[[str, int, int], None]  # method, step, steps
SPEED, QUALITY = "a speed", "a quality"
MEASURED = Path(shipped("assets/figures/pareto_psnr.csv"))  # settings of each method on the embedded model


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
