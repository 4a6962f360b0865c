"""Drawing and timing one image with a diffusers pipeline, under any caching method."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import matplotlib
import torch
import transformers
from diffusers import DiffusionPipeline
from packaging.version import Version
from PIL import Image, ImageDraw, ImageFont

import h2cache
from h2cache import MethodConfig, Summary

# Loading.


def default_device() -> str:
    """The accelerator of this machine (cuda, xpu, npu, mps), else cpu."""
    accelerator = torch.accelerator.current_accelerator()
    return accelerator.type if accelerator else "cpu"


def check_device(device: str) -> None:
    """ValueError unless PyTorch can compute on `device` here."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None


def load_pipeline(model: str, device: str, dtype: str | None) -> DiffusionPipeline:
    """The diffusers pipeline in folder or hub id `model`; dtype None: float32 on cpu, else bfloat16.

    Raises FileNotFoundError with what to do when it can be had neither from a folder nor from the hub.
    """
    check_device(device)
    folder = Path(model).expanduser()
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{model} is no diffusers pipeline folder: it has no model_index.json")
    if not folder.exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise FileNotFoundError(
            f"no model folder {model!r}, and it has not the form of a hub id (owner/name)"
        )
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    # diffusers 0.42 renames the argument; both names must work, without its warning.
    keyword = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"
    transformers.logging.set_verbosity_error()  # advice on torchvision, which nothing here needs
    transformers.logging.disable_progress_bar()
    if folder.exists():
        diffusers.logging.disable_progress_bar()  # a download keeps its bars
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            str(folder if folder.exists() else model), **{keyword: getattr(torch, dtype)}
        )
    except Exception as error:
        if folder.exists():
            raise
        raise FileNotFoundError(
            f"cannot load {model!r}: there is no such folder, and the hub did not give it "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Check the name and the network. "
            f"A gated model needs `hf auth login`. Offline: `hf download {model} --local-dir DIR` on another "
            "machine, then --model DIR"
        ) from error
    pipeline.vae.to(memory_format=torch.channels_last)  # the faster layout for convolutions
    return pipeline.to(device)


@dataclass(frozen=True)
class Limits:
    """What a small model can draw, as it says itself in `limits.json` of its folder; empty: anything."""

    height: tuple[int, ...] = ()
    width: tuple[int, ...] = ()
    quoted_word: str | None = None  # regular expression for a word in double quotes
    vocabulary: tuple[str, ...] = ()  # lower-case words it knows
    example: str | None = None
    cpu_threads: int | None = None  # too small for more: waiting threads starve each other on a busy machine

    @classmethod
    def of(cls, model: str) -> Limits:
        path = Path(model).expanduser() / "limits.json"
        if not path.is_file():
            return cls()
        facts = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()})

    def check_size(self, height: int | None, width: int | None) -> None:
        """ValueError unless the model can draw this size; None stands for its own."""
        for name, value, allowed in (("height", height, self.height), ("width", width, self.width)):
            if value is None:
                continue
            if allowed and value not in allowed:
                raise ValueError(
                    f"{name}={value}: this model draws {name} {', '.join(map(str, allowed))} only"
                )
            if value < 16 or value % 16:
                raise ValueError(f"{name}={value}: a FLUX image has sides that are multiples of 16 pixels")

    def warnings(self, prompt: str) -> list[str]:
        """What in `prompt` the model was not made for, in words for the user."""
        found = []
        words = re.findall(r'"([^"]*)"', prompt)
        if self.quoted_word:
            for word in words:
                if not re.fullmatch(self.quoted_word, word):
                    found.append(f'this model cannot spell "{word}" (it writes {self.quoted_word})')
            if not words:
                found.append(f"this model writes a word in double quotes; example: {self.example}")
        if self.vocabulary:
            rest = re.sub(r'"[^"]*"', " ", prompt)
            unknown = [w for w in re.findall(r"[A-Za-z]+", rest) if w not in self.vocabulary]
            if unknown:
                names = ", ".join(dict.fromkeys(unknown))
                found.append(f"this model does not know: {names}; example: {self.example}")
        return found


def call_arguments(
    pipeline: DiffusionPipeline, limits: Limits, height: int | None, width: int | None, guidance: float
) -> dict[str, Any]:
    """Keyword arguments for calling `pipeline`: the size asked for, else that of the limits, else its own.

    The number of text tokens is its tokenizer's: 512 for FLUX.1, 24 for the embedded model.
    """
    own = pipeline.default_sample_size * pipeline.vae_scale_factor
    return {
        "height": height or (limits.height or (own,))[0],
        "width": width or (limits.width or (own,))[0],
        "guidance_scale": guidance,
        "max_sequence_length": min(pipeline.tokenizer_2.model_max_length, 512),
    }


# Drawing.


@dataclass(frozen=True)
class Drawn:
    """One image with what it cost."""

    image: Image.Image
    seconds: float  # of the whole pipeline call: text encoders, steps and VAE
    summary: Summary
    trace: list[dict]


def draw(pipeline: DiffusionPipeline, config: MethodConfig, seed: int, **call: Any) -> Drawn:
    """Call `pipeline(**call)` under the method of `config`, with a generator of its own from `seed`."""
    h2cache.enable(pipeline, config)
    try:
        generator = torch.Generator("cpu").manual_seed(seed)
        call["num_inference_steps"] = config.requested_steps(call["num_inference_steps"])
        synchronise(pipeline.device)
        start = time.perf_counter()
        with torch.inference_mode():
            image = pipeline(**call, generator=generator).images[0]
        synchronise(pipeline.device)
        seconds = time.perf_counter() - start
        trace = [record.to_dict() for record in h2cache.step_records(pipeline)]
        return Drawn(image, seconds, h2cache.summary(pipeline), trace)
    finally:
        h2cache.disable(pipeline)


def synchronise(device: torch.device) -> None:
    """Wait for the accelerator; the CPU has nothing to wait for."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def side_by_side(images: list[Image.Image], labels: list[str]) -> Image.Image:
    """The images in a row, small ones enlarged, each with its label below."""
    factor = max(1, 384 // images[0].height)
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 15)
    images = [i.resize((i.width * factor, i.height * factor), Image.Resampling.BICUBIC) for i in images]
    lines = max(label.count("\n") + 1 for label in labels)
    width, height = images[0].size
    sheet = Image.new("RGB", ((width + 12) * len(images) + 12, height + 24 + 20 * lines), "white")
    pen = ImageDraw.Draw(sheet)
    for n, (image, label) in enumerate(zip(images, labels, strict=True)):
        left = 12 + n * (width + 12)
        sheet.paste(image, (left, 12))
        pen.multiline_text((left, height + 16), label, font=font, fill="black", spacing=4)
    return sheet
