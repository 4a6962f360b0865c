"""A folder of pictures with their records: draws what is missing, finds what is there."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from PIL import Image

from analysis.drawing.draw import draw
from analysis.drawing.families import save_video
from analysis.drawing.prompts import Prompt
from analysis.figures.sheets import side_by_side
from analysis.measures.fidelity import fidelity
from analysis.records import provenance, store
from analysis.records.saved import NUMBER, check_fields
from h2cache import MethodConfig

# What resuming reads of a record, and what it gets beside another picture.
NEEDS = {
    "file": str,
    "seconds": NUMBER,
    "blocks": int,
    "blocks_run": int,
    "hits": dict,
    "trace": list,
}
MEASURED = {"speed_up": None, "psnr": None, "ssim": None, "identical": None}


def _complete(row: dict) -> bool:
    """Whether a record has all that is read of it."""
    try:
        check_fields(row, NEEDS)
    except ValueError:
        return False
    return all(isinstance(step, dict) and "stage" in step for step in row["trace"])


@dataclass
class Gallery:
    """Pictures of one pipeline with fixed settings in `folder`, and `records.jsonl` beside them.

    resume: take a picture whose record and file are there as it is; else draw it again and replace both.
    """

    folder: Path
    pipeline: DiffusionPipeline
    model: str  # folder or hub id, for the records
    call: dict[str, Any]  # keyword arguments of the pipeline, the same for all pictures
    resume: bool = False
    further: dict[str, Any] = field(default_factory=dict)  # settings that records must tell apart, as JSON
    rows: dict[str, dict] = field(init=False)
    _known: tuple[int, int] = field(init=False, default=(0, 0))  # what has been read of the records

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows = store.tidy(self.folder / "records.jsonl")
        named = {"model": self.model, **self.further}
        self.model, self.further = (before := store.as_before(named, self.rows.values())).pop("model"), before

    def picture(
        self,
        prompt: Prompt,
        config: MethodConfig,
        seed: int,
        uncached: tuple[Image.Image, dict] | None = None,
    ) -> tuple[Image.Image, dict]:
        """The picture of `prompt` by the method of `config`, and its record.

        uncached: picture and record to compare with, for speed-up, PSNR and SSIM.
        """
        key, decisive, path = self._named(prompt, config, seed)
        row = self.rows.get(key)
        image = store.whole_picture(path) if self.resume and row and _complete(row) else None
        if image is None:
            drawn = draw(self.pipeline, config, decisive["seed"], prompt=prompt.text, **self.call)
            store.save_png(path, drawn.image)
            video = save_video(path, drawn.frames)
            row = {
                "key": key,
                "id": prompt.id,
                **decisive,
                "file": path.name,
                **({"video": video.name} if video else {}),
                **drawn.costs(),
                **MEASURED,
                "machine": provenance.machine(self.pipeline.device),
                "date": provenance.now(),
                "trace": drawn.trace,
            }
            image = drawn.image
        row = MEASURED | row
        if uncached and row["identical"] is None:
            row |= {
                "speed_up": round(uncached[1]["seconds"] / row["seconds"], 3) if row["seconds"] > 0 else None,
                **fidelity(image, uncached[0]),
            }
        if row != self.rows.get(key):
            store.add_records(self.folder / "records.jsonl", {key: row})
            self.rows[key] = row
        return image, row

    def row(
        self, prompt: Prompt, uncached: MethodConfig | None, configs: list[MethodConfig], seed: int
    ) -> list[dict]:
        """Draw `prompt` without a cache and with each of `configs`, all side by side too: the records.

        uncached: None leaves the picture to compare with out.
        """
        if uncached is None:
            return [self.picture(prompt, config, seed)[1] for config in configs]
        reference = self.picture(prompt, uncached, seed)
        cached = [self.picture(prompt, config, seed, reference) for config in configs]
        images, rows = zip(reference, *cached, strict=True)
        labels = [f"{r['method']}  {r['seconds']:.2f} s\n{label_of(r)}" for r in rows]
        store.save_png(self._compared(prompt, configs, seed), side_by_side(list(images), labels))
        return list(rows)

    def done(
        self, prompt: Prompt, uncached: MethodConfig | None, configs: list[MethodConfig], seed: int
    ) -> bool:
        """Whether all that `row` makes is there: by this process, or by another that writes here too."""
        others, self._known = store.read_new(self.folder / "records.jsonl", self._known)
        self.rows |= others
        for config in configs if uncached is None else [uncached, *configs]:
            key, _, path = self._named(prompt, config, seed)
            row = self.rows.get(key, {})
            compared = uncached in (None, config) or row.get("identical") is not None
            if not (_complete(row) and compared and store.has_end(path)):
                return False
        return uncached is None or store.has_end(self._compared(prompt, configs, seed))

    def _named(self, prompt: Prompt, config: MethodConfig, seed: int) -> tuple[str, dict[str, Any], Path]:
        """The key of a picture, what decides how it looks, and its file."""
        decisive = {
            "prompt": prompt.text,
            "seed": seed if prompt.seed is None else prompt.seed,
            "model": self.model,
            "steps": self.call["num_inference_steps"],
            "height": self.call.get("height"),
            "width": self.call.get("width"),
            "guidance": self.call.get("guidance_scale"),
            **self.further,
            "device": self.pipeline.device.type,  # of several processes, each has its own of a kind
            "dtype": str(self.pipeline.dtype),
            "method": config.name,
            "config": store.settings_of(config),
        }
        key = store.run_key(id=prompt.id, **decisive)
        return key, decisive, self.folder / f"{prompt.id}-{config.name}-{key[:6]}.png"

    def _compared(self, prompt: Prompt, configs: list[MethodConfig], seed: int) -> Path:
        """The file in which all pictures of `prompt` stand side by side."""
        last = self._named(prompt, configs[-1], seed)[2]
        return last.with_name(f"{last.stem}-compared.png")


def label_of(row: dict) -> str:
    """How much was computed, and how like the uncached picture it is."""
    ratio = row["blocks"] / max(1, row["blocks_run"])
    cost = f"{ratio:.2f}x fewer blocks" if ratio > 1 else "every block"
    return cost if row["psnr"] is None else f"{cost}, {row['psnr']:.1f} dB"


HEADER = (
    f"{'id':<10} {'method':<11}{'seconds':>8} {'speed-up':>9} {'blocks run':>11}  {'PSNR, SSIM':<16} hits"
)


def table_line(row: dict) -> str:
    """One record as a line of the table under `HEADER`."""
    decisions = Counter(step["stage"] for step in row["trace"])  # in all guidance branches
    hits = ", ".join(f"{stage} {n}/{decisions[stage]}" for stage, n in row["hits"].items())
    speed = f"{row['speed_up']:.2f}x" if row["speed_up"] else "-"
    blocks = f"{row['blocks_run']}/{row['blocks']}"
    likeness = "identical" if row["identical"] else "-"
    if row["psnr"] is not None:
        likeness = f"{row['psnr']:.1f} dB, {row['ssim']:.3f}"
    return (
        f"{row['id']:<10.10} {row['method']:<11}{row['seconds']:>8.2f} {speed:>9} {blocks:>11}  "
        f"{likeness:<16} {hits}"
    )
