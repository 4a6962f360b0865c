"""Put the trained parts together as a diffusers folder (fp16) that `DiTPipeline.from_pretrained` loads.

    python -m analysis.tiny_dit.assemble --work work/dit --out assets/tiny_dit

--work holds vae (from `vae`) and checkpoint.pt (from `train`). Only the files of the pipeline and limits.json
are written; others in --out stay.
"""

from pathlib import Path

from diffusers import AutoencoderKL, DiTPipeline

from analysis.recipes import assemble_command, change_json, finished, write_json
from analysis.tiny_dit.digits import NAMES
from analysis.tiny_dit.train import load_transformer, scheduler

STEPS, GUIDANCE, EXAMPLE = 50, 1.5, "seven"


def limits() -> dict:
    """What the model can be asked for, and with which settings, in the form the command line reads."""
    return {
        "vocabulary": list(NAMES),
        "example": EXAMPLE,
        "call": {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE},
        "cpu_threads": 1,  # so small a model only loses by sharing its work
    }


def name_classes(index: Path) -> None:
    """DiTPipeline reads its labels from the index but does not write them; each class has two: seven, 7."""
    labels = {str(number): f"{name}, {number}" for number, name in enumerate(NAMES)}
    change_json(index, id2label=labels)


def assemble(work: Path, out: Path) -> None:
    pipe = DiTPipeline(
        transformer=load_transformer(work / "checkpoint.pt").half(),
        vae=AutoencoderKL.from_pretrained(work / "vae").half(),
        scheduler=scheduler(),
    )
    with finished(out) as folder:
        pipe.save_pretrained(folder)
        name_classes(folder / "model_index.json")
        write_json(folder / "limits.json", limits())


def main() -> None:
    assemble_command(__doc__, assemble, "work/dit")


if __name__ == "__main__":
    main()
