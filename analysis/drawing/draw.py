"""Drawing and timing one image with a diffusers pipeline, under any caching method."""

from __future__ import annotations

import argparse
import re
import time
import warnings
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from packaging.version import Version
from PIL import Image

import h2cache
from analysis.drawing.families import (
    default_of,
    for_picture,
    frames_of,
    guidance_arguments,
    picture_argument,
    strip,
    takes,
    with_prompt,
)
from analysis.drawing.peak import PeakMemory
from analysis.drawing.prompts import check_text
from analysis.drawing.samplers import other_sampler
from analysis.records import store
from analysis.tiny_infdit.pipeline import InfDiTPipeline
from h2cache import MethodConfig, Summary
from h2cache.room import free_bytes

# Loading.

# diffusers 0.42 renames the argument; both names must work, without its warning.
DTYPE = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"


OWN = {"InfDiTPipeline": InfDiTPipeline}  # pipelines of ours, by the name in a folder's index


def default_device() -> str:
    """The accelerator of this machine (cuda, xpu, npu, mps), else cpu."""
    # a build for CUDA names it on a machine without a GPU too
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator else "cpu"


def check_device(device: str) -> None:
    """ValueError unless PyTorch can compute on `device` here."""
    try:
        torch.ones(1, device=device).item()  # meta makes tensors, and has no numbers in them
    except Exception as error:  # each backend that is missing says so in its own way
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"device {device!r} cannot be used here: {why}; try --device cpu") from None


def load_pipeline(
    model: str, device: str, dtype: str | None, place: bool = True, **parts: Any
) -> DiffusionPipeline:
    """The diffusers pipeline in folder or hub id `model`; dtype None: float32 on cpu, else bfloat16.

    place: move it to `device`. parts: components to take in place of the model's own, such as transformer=...
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
    kind = DiffusionPipeline
    if folder.exists():
        index = check_folder(folder, parts)
        kind = OWN.get(index["_class_name"], kind)
    dtype = dtype or ("float32" if torch.device(device).type == "cpu" else "bfloat16")
    transformers.logging.disable_progress_bar()
    if folder.exists():
        diffusers.logging.disable_progress_bar()  # a download keeps its bars
    try:
        pipeline = kind.from_pretrained(
            str(folder if folder.exists() else model),
            **{DTYPE: getattr(torch, dtype)},
            use_safetensors=True,  # a pickle runs what it holds when it is opened
            **parts,
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if folder.exists():
            why = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"cannot load {model}: {why}. Is the folder complete? Download it again"
            ) from error
        raise FileNotFoundError(
            f"cannot load {model!r}: there is no such folder, and the hub did not give it "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Check the name and the network. "
            f"A gated model needs `hf auth login`. Offline: `hf download {model} --local-dir DIR` on another "
            "machine, then --model DIR"
        ) from error
    if getattr(pipeline, "transformer", None) is None:
        raise ValueError(f"{model} is a {type(pipeline).__name__}, which has no transformer to cache")
    if getattr(pipeline, "vae", None) and all(
        w.ndim < 5 for w in pipeline.vae.parameters()
    ):  # a VAE of pictures
        pipeline.vae.to(memory_format=torch.channels_last)  # the faster layout for convolutions
    return pipeline.to(device) if place else pipeline


PICKLES = (".bin", ".ckpt", ".pt", ".pth")


def check_folder(folder: Path, given: Container[str] = ()) -> dict[str, Any]:
    """A pipeline folder's index; ValueError where it is none, or where weights are pickled only."""
    path = folder / "model_index.json"
    index = store.read_json(path)
    if index is None or "_class_name" not in index:
        raise ValueError(f"{path} is no index of a diffusers pipeline: download the model again")
    for name in index.keys() - set(given):
        files = list((folder / name).glob("*")) if (folder / name).is_dir() else []
        pickled = [file for file in files if file.suffix in PICKLES]
        if pickled and not any(file.suffix == ".safetensors" for file in files):
            raise ValueError(
                f"{pickled[0]}: pickled weights can run what they hold, and are not opened: get the model's "
                ".safetensors, or convert them where they are trusted"
            )
    return index


def require_memory(height: int | None, width: int | None, frames: int | None = None) -> None:
    """MemoryError unless main memory has room for the finished picture alone, as numbers."""
    needed = (
        (height or 1024) * (width or 1024) * (frames or 1) * 3 * 4 * 2
    )  # float32, from the VAE and scaled
    if needed > (free := free_bytes(torch.device("cpu"))):
        size = f"{height or 1024}x{width or 1024}" + (f", {frames} frames" if frames else "")
        raise MemoryError(
            f"{size}: the picture alone takes {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free: "
            "lower --height and --width" + " or --frames" * bool(frames)
        )


@dataclass(frozen=True)
class Limits:
    """What a small model can draw, as it says itself in `limits.json` of its folder; empty: anything."""

    height: tuple[int, ...] = ()
    width: tuple[int, ...] = ()
    quoted_word: str | None = None  # regular expression for a word in double quotes
    vocabulary: tuple[str, ...] = ()  # lower-case words it knows
    word: str | None = None  # regular expression for what it can spell besides
    example: str | None = None
    cpu_threads: int | None = None  # too small for more: waiting threads starve each other on a busy machine
    call: dict[str, Any] = field(default_factory=dict)  # of its pipeline, where nothing else is asked

    @classmethod
    def of(cls, model: str) -> Limits:
        path = Path(model).expanduser() / "limits.json"
        if not path.is_file():
            return cls()
        facts = store.read_json(path)
        if facts is None:
            raise ValueError(f"{path}: it is no JSON object; correct it or remove it")
        for name, value in facts.items():
            if name not in LIMITS:
                raise ValueError(f"{path}: {name!r} is none of {', '.join(LIMITS)}")
            if not LIMITS[name](value):
                raise ValueError(f"{path}: {name} cannot be {value!r:.60}")
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
                raise ValueError(f"{name}={value}: sides are multiples of 16 pixels")

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
            unknown = [w for w in unknown if not (self.word and re.fullmatch(self.word, w))]
            if unknown:
                names = ", ".join(dict.fromkeys(unknown))
                found.append(f"this model does not know: {names}; example: {self.example}")
        return found


def _pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except re.error:
        return False


def _count(value: Any) -> bool:
    return type(value) is int and value > 0


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _text(value: Any) -> bool:
    return isinstance(value, str)


LIMITS: dict[str, Callable[[Any], bool]] = {
    "height": _list_of(_count),
    "width": _list_of(_count),
    "quoted_word": _pattern,
    "vocabulary": _list_of(_text),
    "word": _pattern,
    "example": _text,
    "cpu_threads": _count,
    "call": lambda value: isinstance(value, dict),
}


def call_arguments(
    pipeline: DiffusionPipeline,
    limits: Limits,
    height: int | None,
    width: int | None,
    guidance: float | None,
    negative: str | None = None,
    true_cfg: float | None = None,
) -> dict[str, Any]:
    """Keyword arguments for calling `pipeline`: the size asked for, else that of the limits, else its own.

    Of FLUX.1 the number of text tokens is its tokenizer's: 512, of the embedded model 24.
    """
    call = guidance_arguments(pipeline, guidance, negative, true_cfg)
    for name, asked, allowed in (("height", height, limits.height), ("width", width, limits.width)):
        if asked and not takes(pipeline, name):
            raise ValueError(f"--{name}: {type(pipeline).__name__} takes no size, its pictures have one")
        own = default_of(pipeline, name)
        if own is None and takes(pipeline, name) and hasattr(pipeline, "default_sample_size"):
            own = pipeline.default_sample_size * pipeline.vae_scale_factor
        if size := asked or next(iter(allowed), own):
            call[name] = size
    if type(pipeline).__name__.startswith("Flux") and hasattr(pipeline, "tokenizer_2"):
        call["max_sequence_length"] = min(pipeline.tokenizer_2.model_max_length, 512)
    given = {"guidance_scale": guidance, "negative_prompt": negative}
    return call | {name: value for name, value in limits.call.items() if given.get(name) is None}


def prepare(
    pipeline: DiffusionPipeline, limits: Limits, args: argparse.Namespace
) -> tuple[DiffusionPipeline, dict[str, Any], dict[str, str | float]]:
    """What `args` (a script's, with those of `add_family_arguments`) ask of `pipeline`.

    Returns the pipeline to call, the arguments of the call, and those of them that records must tell apart.
    """
    if args.negative_prompt:
        check_text(args.negative_prompt)
    if args.input_image:
        pipeline = for_picture(pipeline)
    if args.sampler:
        pipeline.scheduler = other_sampler(pipeline, args.sampler)
    call = call_arguments(
        pipeline, limits, args.height, args.width, args.guidance, args.negative_prompt, args.true_cfg
    )
    call |= picture_argument(pipeline, args.input_image)
    if args.frames is not None:
        if not takes(pipeline, "num_frames"):
            raise ValueError(f"--frames: {type(pipeline).__name__} draws pictures")
        call["num_frames"] = args.frames
    further = {key: getattr(args, key) for key in ("negative_prompt", "true_cfg", "sampler", "frames")}
    further["input_image"] = args.input_image and store.place(str(args.input_image))
    return pipeline, call, {key: value for key, value in further.items() if value is not None}


# Drawing.


def warm_up(pipeline: DiffusionPipeline, config: MethodConfig, call: dict[str, Any]) -> str:
    """Take two steps with the cache on, untimed; returns a line on what it is going to keep in memory.

    Raises MemoryError, before anything is drawn, when that is more than there is room for.
    """
    h2cache.enable(pipeline, config)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*too few steps")  # of these two
            pipeline(**with_prompt(pipeline, call | {"num_inference_steps": 2, "output_type": "latent"}))
        needed = h2cache.summary(pipeline).bytes_needed
    finally:
        h2cache.disable(pipeline)
    return f"memory kept from step to step beside the model: up to {needed / 2**20:.2f} MiB ({config.name})"


@dataclass(frozen=True)
class Drawn:
    """One image with what it cost."""

    image: Image.Image  # of a video all frames in a row
    frames: list[Image.Image]  # one, unless a video was drawn
    seconds: float  # of the whole pipeline call: text encoders, steps and VAE
    seconds_steps: float | None  # from the first entry into the transformer to the end of the last step
    peak: int | None  # bytes, see PeakMemory
    peak_kind: str
    summary: Summary
    trace: list[dict]

    def costs(self) -> dict[str, Any]:
        """What was spent, for a record."""
        s = self.summary
        return {
            "seconds": round(self.seconds, 4),
            "seconds_steps": self.seconds_steps and round(self.seconds_steps, 4),
            "blocks_run": s.blocks_run,
            "blocks": s.blocks,
            "hits": s.hits,
            "steps_recorded": s.steps,
            "bytes_held": s.bytes_held,
            "expected_psnr": s.expected_psnr and round(s.expected_psnr[0], 2),
            "expected_error": s.expected_error and round(s.expected_error, 2),
            "notes": list(s.notes),
            "peak_bytes": self.peak,
            "peak_kind": self.peak_kind,
            "warning": None if s.steps == 1 else s.warning,  # of one step nothing can be skipped
        }


class StepClock:
    """Times the denoising steps of a pipeline call: waits for the device at the first and after the last."""

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self._start: float | None = None
        self._end: float | None = None
        self._pipeline = pipeline
        self._handle = pipeline.transformer.register_forward_pre_hook(self._before_first)

    def _before_first(self, *_: Any) -> None:
        self.close()
        synchronise(self._pipeline.device)
        self._start = time.perf_counter()

    def close(self) -> None:
        """Take the hook off the transformer, whatever became of the call."""
        self._handle.remove()

    @property
    def seconds(self) -> float | None:
        """None for a pipeline that does not call back after its steps."""
        return None if self._end is None else self._end - self._start

    @property
    def argument(self) -> dict[str, Any]:
        """The callback as an argument of the pipeline's call, where it takes one."""
        called = takes(self._pipeline, "callback_on_step_end")
        return {"callback_on_step_end": self._after_step} if called else {}

    def _after_step(self, pipeline: DiffusionPipeline, step: int, timestep: Any, kwargs: dict) -> dict:
        if step == pipeline.num_timesteps - 1:
            synchronise(pipeline.device)
            self._end = time.perf_counter()
        return kwargs


def draw(pipeline: DiffusionPipeline, config: MethodConfig, seed: int, **call: Any) -> Drawn:
    """Call `pipeline(**call)` under the method of `config`, with a generator of its own from `seed`."""
    h2cache.enable(pipeline, config)
    clock, peak = StepClock(pipeline), PeakMemory(pipeline.device)
    try:
        generator = torch.Generator("cpu").manual_seed(seed)
        call["num_inference_steps"] = config.requested_steps(call["num_inference_steps"])
        call |= {"generator": generator, **clock.argument}
        synchronise(pipeline.device)
        peak.start()
        start = time.perf_counter()
        with torch.inference_mode():
            frames = frames_of(pipeline(**with_prompt(pipeline, call)))
        synchronise(pipeline.device)
        end = time.perf_counter()
        trace = [record.to_dict() for record in h2cache.step_records(pipeline)]
        return Drawn(
            image=strip(frames),
            frames=frames,
            seconds=end - start,
            seconds_steps=clock.seconds,
            peak=peak.bytes(),
            peak_kind=peak.kind,
            summary=h2cache.summary(pipeline),
            trace=trace,
        )
    finally:
        clock.close()
        h2cache.disable(pipeline)


def synchronise(device: torch.device) -> None:
    """Wait for the accelerator; the CPU has nothing to wait for."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
