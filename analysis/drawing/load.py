"""Loading a pipeline under one of the engines, from command-line options that the scripts share.

diffusers: the model as it is. nunchaku: the same pipeline around a 4-bit transformer, V2 (Python blocks), or
V1 (C++ blocks) where only that can do what is asked: a LoRA, offload, float16.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from analysis.drawing.draw import PICKLES, check_device, load_pipeline
from analysis.options import finite
from analysis.records import store
from h2cache.nunchaku_install import Place, gpu_problem, install_problem, require_gpu, require_nunchaku

QUANTIZED = (  # 4-bit files of nunchaku-tech: the last part of the original's hub id, in lower case
    "flux.1-dev",
    "flux.1-schnell",
    "flux.1-kontext-dev",
    "flux.1-krea-dev",
    "flux.1-fill-dev",
    "flux.1-canny-dev",
    "flux.1-depth-dev",
)


def add_loading_arguments(parser: argparse.ArgumentParser, device: str | None) -> None:
    """The options that `load` reads, besides --model; `device` is the default."""
    parser.add_argument("--device", default=device, help="default here: this machine's accelerator")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: by device")
    parser.add_argument(
        "--engine",
        choices=("auto", "diffusers", "nunchaku"),
        default="auto",
        help="auto: nunchaku's 4-bit model where it is installed, runs on the GPU and has --model",
    )
    parser.add_argument(
        "--checkpoint", help="nunchaku's .safetensors, file or hub path (default: by --model)"
    )
    parser.add_argument("--lora", metavar="PATH", help="LoRA: file, owner/name or owner/name/file")
    parser.add_argument("--lora-scale", type=finite, help="its strength (default: 1; the paper: 0.8)")
    parser.add_argument("--offload", action="store_true", help="keep idle parts in main memory: slower")


def load(args: argparse.Namespace, device: str | None = None) -> tuple[DiffusionPipeline, str]:
    """The pipeline that `args` ask for, and its name in records: the model, with engine and LoRA if any.

    device: in place of args.device. Raises as `load_pipeline`, ImportError or ValueError with what to install
    or change where nunchaku cannot run, and ValueError for options that do not go together.
    """
    device = device or args.device
    engine, name = check_loading(args, device), store.place(args.model)
    if engine == "nunchaku":
        transformer, dtype = load_quantized(args, device)
        pipeline = load_pipeline(args.model, device, dtype, place=not args.offload, transformer=transformer)
        name += f" ({type(transformer).__name__}, {Path(checkpoint(args)).name})"
    else:
        pipeline = load_pipeline(args.model, device, args.dtype, place=not args.offload)
        if args.lora:
            source = _lora_source(args.lora)
            try:
                pipeline.load_lora_weights(**source, adapter_name="lora", use_safetensors=True)
                pipeline.set_adapters("lora", strength(args))
            except Exception as error:  # whatever a file of another kind leads to
                raise ValueError(
                    f"--lora {args.lora}: {type(error).__name__}: {error}. Is it a LoRA for this model?"
                ) from error
    if args.offload:
        # nunchaku moves its own blocks, which diffusers' whole-model moves would undo
        offload = pipeline.enable_sequential_cpu_offload if engine == "nunchaku" else None
        (offload or pipeline.enable_model_cpu_offload)(device=device)
    return pipeline, name + (f" + {store.place(args.lora)} at {strength(args):g}" if args.lora else "")


def check_loading(args: argparse.Namespace, device: str) -> str:
    """The engine that `args` lead to; ValueError for options that cannot be, before anything is loaded."""
    check_device(device)
    for name in ("lora", "checkpoint"):
        if getattr(args, name) is not None and not getattr(args, name).strip():
            raise ValueError(f"--{name} is empty: name a file, or leave it out")
    if args.lora_scale is not None and not args.lora:
        raise ValueError(f"--lora-scale {args.lora_scale:g} is the strength of a LoRA: give one with --lora")
    if args.checkpoint and not args.checkpoint.endswith(".safetensors"):
        raise ValueError(
            f"--checkpoint {args.checkpoint}: a .safetensors file is needed, others may run what they hold"
        )
    if args.offload and torch.device(device).type == "cpu":
        raise ValueError(
            "--offload keeps parts of the model off an accelerator: there is none with device=cpu"
        )
    engine = choose_engine(args.engine, args.model, args.checkpoint, device)
    if args.checkpoint and engine != "nunchaku":
        raise ValueError("--checkpoint is a file of nunchaku's: it needs --engine nunchaku")
    return engine


def strength(args: argparse.Namespace) -> float:
    """What the LoRA is multiplied with."""
    return 1.0 if args.lora_scale is None else args.lora_scale


def choose_engine(engine: str, model: str, checkpoint: str | None, device: str) -> str:
    """The engine that was asked for, diffusers or nunchaku; for auto, what this machine can do."""
    if engine != "auto":
        return engine
    known = checkpoint or _last(model) in QUANTIZED
    if (
        not known
        or torch.device(device).type != "cuda"
        or gpu_problem(torch.cuda.get_device_capability(device))
    ):
        return "diffusers"
    return "diffusers" if install_problem(Place.here()) else "nunchaku"


def load_quantized(args: argparse.Namespace, device: str, v1: bool = False) -> tuple[Any, str]:
    """nunchaku's transformer for `args` with its LoRA, V1 if asked for or needed; and the dtype's name."""
    require_gpu()
    require_nunchaku()
    from nunchaku import NunchakuFluxTransformer2dModel, NunchakuFluxTransformer2DModelV2

    turing = torch.cuda.get_device_capability() == (7, 5)  # has no bfloat16
    dtype = args.dtype or ("float16" if turing else "bfloat16")
    if dtype == "float32":
        raise ValueError("dtype=float32: nunchaku computes in bfloat16 or float16")
    v1 = v1 or args.lora or args.offload or dtype == "float16"
    kind = NunchakuFluxTransformer2dModel if v1 else NunchakuFluxTransformer2DModelV2
    options = {"offload": True} if args.offload else {}
    transformer = kind.from_pretrained(
        checkpoint(args), device=device, torch_dtype=getattr(torch, dtype), **options
    )
    if args.lora:
        transformer.update_lora_params(args.lora)
        transformer.set_lora_strength(strength(args))
    return transformer.eval(), dtype


def checkpoint(args: argparse.Namespace) -> str:
    """The quantized file: --checkpoint, or nunchaku-tech's for the model in this GPU's precision."""
    if args.checkpoint:
        return args.checkpoint
    name = _last(args.model)
    if name not in QUANTIZED:
        raise ValueError(
            f"no 4-bit checkpoint is known for {args.model!r} (only for {', '.join(QUANTIZED)}): name it "
            "with --checkpoint FILE.safetensors, or use --engine diffusers"
        )
    from nunchaku.utils import get_precision

    return f"nunchaku-tech/nunchaku-{name}/svdq-{get_precision()}_r32-{name}.safetensors"


def _last(model: str) -> str:
    """Last part of a folder or hub id, in lower case."""
    return re.split(r"[/\\]", model.rstrip("/\\"))[-1].lower()


def _lora_source(lora: str) -> dict[str, str]:
    """Arguments of diffusers' `load_lora_weights` for a file, owner/name or owner/name/file."""
    path = Path(lora).expanduser()
    if path.suffix in PICKLES:
        raise ValueError(f"--lora {lora}: a .safetensors file is needed, a pickle may run what it holds")
    if path.is_dir():
        return {"pretrained_model_name_or_path_or_dict": str(path)}
    if path.is_file():
        return {"pretrained_model_name_or_path_or_dict": str(path.parent), "weight_name": path.name}
    owner, *rest = lora.split("/")
    if (
        len(rest) not in (1, 2)
        or not re.fullmatch(r"\w[\w.-]*", owner)
        or (len(rest) == 1 and path.suffix == ".safetensors")
    ):
        raise FileNotFoundError(
            f"no LoRA file {lora!r}, and it has not the form owner/name or owner/name/file"
        )
    source = {"pretrained_model_name_or_path_or_dict": f"{owner}/{rest[0]}"}
    return source | ({"weight_name": rest[1]} if len(rest) == 2 else {})
