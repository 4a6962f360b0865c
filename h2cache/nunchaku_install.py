"""Is nunchaku here, does it fit this Python, PyTorch and GPU, and if not: what exactly to do.

Facts, with sources in engines/nunchaku.md: `nunchaku` on PyPI is another project. The wheels are files of the
release page, named `nunchaku-1.2.1+cu12.8torch2.9-cp311-cp311-linux_x86_64.whl`, one for each CUDA, and each
minor version of PyTorch and Python. Its kernels need 4-bit tensor cores that Hopper (sm 90) and data-centre
Blackwell (sm 100) do not have.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

RELEASE = "1.2.1"  # the newest whose build files could be read, on 2026-11-27
PAGE = "https://github.com/nunchaku-ai/nunchaku/releases"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
CUDAS = {"2.8": ("12.8",), "2.9": ("12.8", "13.0"), "2.10": ("12.8", "13.0")}  # of the wheels, by PyTorch
PLATFORMS = ("linux_x86_64", "win_amd64")
PRECISIONS = {"75": "int4", "80": "int4", "86": "int4", "89": "int4", "120": "fp4", "121": "fp4"}  # by sm
WITHOUT = "or run without nunchaku, with --engine diffusers"


@dataclass(frozen=True)
class Place:
    """What a nunchaku wheel must fit, and what is installed under its name."""

    python: str  # "3.11"
    torch: str  # "2.9"
    platform: str  # as in wheel names
    cuda: str | None = None  # that PyTorch is built for: "12.8"
    package: Path | None = None  # folder of the installed `nunchaku`
    version: str | None = None  # of the installed distribution, with the wheel's local part

    @classmethod
    def here(cls) -> Place:
        spec = importlib.util.find_spec("nunchaku")
        folders = list(spec.submodule_search_locations or []) if spec else []
        try:
            version = importlib.metadata.version("nunchaku")
        except importlib.metadata.PackageNotFoundError:
            version = None
        machine = {"Linux": "linux_", "Windows": "win_"}.get(platform.system(), platform.system() + "_")
        return cls(
            python=".".join(map(str, sys.version_info[:2])),
            torch=_minor(torch.__version__),
            platform=machine + platform.machine().lower(),
            cuda=torch.version.cuda,
            package=Path(folders[0]) if folders else None,
            version=version,
        )


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def wheel_advice(place: Place) -> str:
    """The command that installs the wheel for `place`, or what must change so that there is one."""
    missing = []
    if place.python not in PYTHONS:
        missing.append(f"Python {PYTHONS[0]} to {PYTHONS[-1]} (this is {place.python})")
    cudas = CUDAS.get(place.torch, ())
    if not cudas:
        missing.append(f"PyTorch {', '.join(CUDAS)} (this is {place.torch})")
    elif place.cuda is not None and place.cuda not in cudas:
        missing.append(f"a PyTorch for CUDA {' or '.join(cudas)} (this is for {place.cuda})")
    if place.platform not in PLATFORMS:
        missing.append(f"Linux or Windows on x86-64 (this is {place.platform})")
    if missing:
        return f"its wheels need {' and '.join(missing)}; newer ones may be on {PAGE}; {WITHOUT}"
    tag = "cp" + place.python.replace(".", "")
    build = f"cu{place.cuda or cudas[0]}torch{place.torch}"
    name = f"nunchaku-{RELEASE}+{build}-{tag}-{tag}-{place.platform}.whl"
    return f"`pip install {PAGE}/download/v{RELEASE}/{name}`, {WITHOUT}"


def install_problem(place: Place) -> str | None:
    """What is wrong with the nunchaku of `place`, and what to do; None if it looks right."""
    if place.package is None:
        return f"nunchaku is not installed: {wheel_advice(place)}"
    if not (place.package / "models" / "transformers").is_dir():
        return (
            f"the installed `nunchaku` {place.version or ''} is another project of that name from PyPI: "
            f"`pip uninstall nunchaku`, then {wheel_advice(place)}"
        )
    built_for = re.search(r"\+.*torch(\d+\.\d+)", place.version or "")
    if built_for and built_for[1] != place.torch:
        return (
            f"the installed nunchaku {place.version} is built for PyTorch {built_for[1]}, this is "
            f"{place.torch}: "
            f"`pip uninstall nunchaku`, then {wheel_advice(place)}"
        )
    compiled = sorted(p.name for p in place.package.glob("_C.*"))
    tag = "cp" + place.python.replace(".", "")
    if compiled and not any(re.search(rf"{tag}\b|cpython-{tag[2:]}\b|abi3", name) for name in compiled):
        return (
            f"the installed nunchaku is built for another Python ({', '.join(compiled)}), this is "
            f"{place.python}: `pip uninstall nunchaku`, then {wheel_advice(place)}"
        )
    if not compiled:
        return (
            f"the nunchaku in {place.package} is sources without their compiled part _C: "
            f"leave that folder, or install over it: {wheel_advice(place)}"
        )
    return None


def gpu_problem(capability: tuple[int, int] | None) -> str | None:
    """Why nunchaku cannot compute on a GPU of this CUDA compute capability; None if it can."""
    if capability is None:
        return f"nunchaku needs an NVIDIA GPU, and PyTorch finds none here: {WITHOUT[3:]}"
    sm = "".join(map(str, capability))
    if sm not in PRECISIONS:
        return (
            f"nunchaku has no kernels for this GPU (sm {sm}): it needs Turing, Ampere, Ada or GeForce "
            f"Blackwell (sm {', '.join(PRECISIONS)}); Hopper is not among them: {WITHOUT[3:]}"
        )
    return None


def require_nunchaku() -> None:
    """ImportError, with what to do, unless nunchaku can be imported."""
    if "nunchaku._C" in sys.modules:
        return
    problem = install_problem(Place.here())
    if problem is None:
        try:
            importlib.import_module("nunchaku")
        except (ImportError, OSError) as error:
            problem = (
                f"the installed nunchaku cannot be loaded ({str(error).splitlines()[0]}), most often because "
                f"it was built for another PyTorch or CUDA: {wheel_advice(Place.here())}"
            )
    if problem:
        raise ImportError(problem)


def require_gpu() -> None:
    """ValueError, with what to do, unless the GPU in use can run nunchaku."""
    problem = gpu_problem(torch.cuda.get_device_capability() if torch.cuda.is_available() else None)
    if problem:
        raise ValueError(problem)
