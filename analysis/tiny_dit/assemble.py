"""Put the trained parts together as a diffusers folder (fp16) that `DiTPipeline.from_pretrained` loads.

    python -m analysis.tiny_dit.assemble --work work/dit --out assets/tiny_dit

--work holds vae (from `vae`) and checkpoint.pt (from `train`). Only the files of the pipeline and limits.json
are written; others in --out stay.
"""

import json
import shutil
import tempfile
from pathlib import Path

from diffusers import AutoencoderKL, DiTPipeline

from analysis.tiny_dit.digits import NAMES
from analysis.tiny_dit.train import load_transformer, scheduler
from analysis.tiny_flux.assemble import command, forget_origin

STEPS, GUIDANCE, EXAMPLE = 50, 1.5, "seven"


def limits() -> dict:
    """What the model can be asked for, and with which settings, in the form the command line reads."""
    return {
        "vocabulary": list(NAMES),
        "example": EXAMPLE,
        "call": {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE},
        "cpu_threads": 1,  # so small a model only loses by sharing its work
    }


def write_json(path: Path, contents: dict) -> None:
    path.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def name_classes(index: Path) -> None:
    """DiTPipeline reads its labels from the index but does not write them; each class has two: seven, 7."""
    labels = {str(number): f"{name}, {number}" for number, name in enumerate(NAMES)}
    write_json(index, json.loads(index.read_text(encoding="utf-8")) | {"id2label": labels})


def assemble(work: Path, out: Path) -> None:
    pipe = DiTPipeline(
        transformer=load_transformer(work / "checkpoint.pt").half(),
        vae=AutoencoderKL.from_pretrained(work / "vae").half(),
        scheduler=scheduler(),
    )
    with tempfile.TemporaryDirectory() as scratch:  # a half-written folder must never be taken for a model
        folder = Path(scratch) / "model"
        pipe.save_pretrained(folder)
        name_classes(folder / "model_index.json")
        forget_origin(folder / "vae/config.json")
        write_json(folder / "limits.json", limits())
        shutil.copytree(folder, out, dirs_exist_ok=True)


def main() -> None:
    command(__doc__, assemble, "work/dit")


if __name__ == "__main__":
    main()
