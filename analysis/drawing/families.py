"""What differs between pipelines: how they are called, and whether pictures or frames come out."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import struct
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline
from diffusers.utils import export_to_video
from PIL import Image
from torch import Tensor

from analysis.drawing.samplers import SAMPLERS
from analysis.options import at_least_one, finite

# Arguments that take the picture a user gives, in this order; VACE takes references in a list.
PICTURE = ("image", "control_image", "reference_images")


def add_family_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `runs.prepare` reads, besides the size."""
    parser.add_argument("--guidance", type=finite, help="default: the pipeline's own")
    parser.add_argument("--negative-prompt", help="what to guide away from, where the family can")
    parser.add_argument("--true-cfg", type=finite, help="how strongly, with --negative-prompt")
    parser.add_argument("--sampler", choices=SAMPLERS, help="default: the one that the model came with")
    parser.add_argument("--frames", type=at_least_one, help="of a video (default: the pipeline's own)")
    parser.add_argument("--input-image", type=Path, help="picture to begin with, to edit or to animate")


def takes(pipeline: DiffusionPipeline, argument: str) -> bool:
    """Whether calling `pipeline` takes `argument`."""
    return argument in inspect.signature(pipeline.__call__).parameters


def default_of(pipeline: DiffusionPipeline, argument: str) -> Any:
    """What `pipeline` takes where `argument` is not given; None too where it takes no such thing."""
    parameter = inspect.signature(pipeline.__call__).parameters.get(argument)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def with_prompt(pipeline: DiffusionPipeline, call: dict[str, Any]) -> dict[str, Any]:
    """`call`, its prompt turned into the class that DiT takes: a number, or one of the model's labels.

    Where a pipeline takes neither, an empty prompt falls away, and ValueError for any other.
    """
    if "prompt" not in call or takes(pipeline, "prompt"):
        return call
    if not takes(pipeline, "class_labels"):
        if call["prompt"]:
            raise ValueError(f"{type(pipeline).__name__} takes no text: leave --prompt and --prompts out")
        return {k: v for k, v in call.items() if k != "prompt"}
    prompt = call["prompt"].strip()
    labels = getattr(pipeline, "labels", None) or {}
    if prompt not in labels and not prompt.isdecimal():
        known = f", or one of {', '.join(list(labels)[:5])} ..." if labels else ""
        raise ValueError(f"this model draws classes, not {prompt!r}: give a number{known} as --prompt")
    label = labels[prompt] if prompt in labels else int(prompt)
    return {k: v for k, v in call.items() if k != "prompt"} | {"class_labels": [label]}


def for_picture(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """A pipeline of the same parts that takes a picture: itself, or image-to-image in its family.

    Raises ValueError for a family that has none.
    """
    if any(takes(pipeline, name) for name in PICTURE):
        return pipeline
    try:
        return AutoPipelineForImage2Image.from_pipe(pipeline)
    except ValueError:
        raise ValueError(f"--input-image: {type(pipeline).__name__} takes no picture") from None


# What Pillow raises for a file that is no picture, is damaged, or is too large to open.
BROKEN = OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError


def in_colour(picture: Image.Image) -> Image.Image:
    """`picture` as RGB, 8 bits a channel. Pillow alone cuts grey of 16 bits off at 255: white."""
    if picture.mode.startswith("I"):
        levels = np.asarray(picture).astype(np.int64).clip(0, 65535)
        picture = Image.fromarray((levels / 257).round().astype(np.uint8))
    return picture.convert("RGB")


def picture_argument(pipeline: DiffusionPipeline, path: Path | None) -> dict[str, Any]:
    """The picture in file `path` as an argument of `pipeline`'s call.

    Raises ValueError for a file that is no picture, and for a pipeline that cannot do without one, or needs
    a mask too.
    """
    if takes(pipeline, "mask_image"):
        raise ValueError(f"{type(pipeline).__name__} needs a mask: call it in Python, with mask_image")
    if path is None:
        needed = ("Edit", "Img2Img", "ImageToVideo", "Control", "VACE", "InfDiT")
        if any(word in type(pipeline).__name__ for word in needed):
            raise ValueError(f"{type(pipeline).__name__} begins with a picture: give one with --input-image")
        return {}
    try:
        picture = in_colour(Image.open(path))
    except BROKEN as error:
        raise ValueError(f"--input-image {path}: {error}") from None
    name = next(name for name in PICTURE if takes(pipeline, name))
    return {name: [picture] if name == "reference_images" else picture}


def guidance_arguments(
    pipeline: DiffusionPipeline, guidance: float | None, negative: str | None, true_cfg: float | None
) -> dict[str, Any]:
    """--guidance, --negative-prompt and --true-cfg as arguments of `pipeline`'s call, or its defaults."""
    given = {"guidance_scale": guidance, "negative_prompt": negative, "true_cfg_scale": true_cfg}
    words = {
        "guidance_scale": "--guidance",
        "negative_prompt": "--negative-prompt",
        "true_cfg_scale": "--true-cfg",
    }
    for name, option in words.items():
        if given[name] is not None and not takes(pipeline, name):
            raise ValueError(f"{option}: {type(pipeline).__name__} takes none")
    if true_cfg is not None and negative is None:
        raise ValueError('--true-cfg guides away from a --negative-prompt: give one, it may be " "')
    chosen = {k: default_of(pipeline, k) if v is None else v for k, v in given.items()}
    return {k: v for k, v in chosen.items() if v is not None and takes(pipeline, k)}


def frames_of(output: Any) -> list[Image.Image]:
    """The frames of the first video in a pipeline's output, or its first picture alone."""
    if hasattr(output, "images"):
        return [output.images[0]]
    frames = output.frames[0]
    if isinstance(frames, Tensor):  # latents: nothing was decoded
        return [frames]
    return [f if isinstance(f, Image.Image) else _picture(np.asarray(f)) for f in frames]


def _picture(pixels: np.ndarray) -> Image.Image:
    """(H, W, 3) in [0, 1] as a picture."""
    return Image.fromarray((pixels * 255).round().clip(0, 255).astype(np.uint8))


def strip(frames: list[Image.Image]) -> Image.Image:
    """All frames in a row: what is compared and kept without loss. One frame is itself."""
    if len(frames) == 1:
        return frames[0]
    width, height = frames[0].size
    row = Image.new("RGB", (width * len(frames), height))
    for n, frame in enumerate(frames):
        row.paste(frame, (n * width, 0))
    return row


def save_video(stem: Path, frames: list[Image.Image], fps: int = 16) -> Path | None:
    """Frames as STEM.mp4, or as STEM.gif where imageio-ffmpeg is not installed; None for a single one."""
    if len(frames) == 1:
        return None
    if importlib.util.find_spec("imageio_ffmpeg"):
        path = stem.with_suffix(".mp4")
        export_to_video(frames, str(path), fps=fps)
    else:
        path = stem.with_suffix(".gif")
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 // fps, loop=0)
    return path
