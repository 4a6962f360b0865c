"""Put the trained model in a diffusers folder (fp16) with a picture to enlarge, drawn by the embedded model.

    python -m analysis.tiny_infdit.assemble --work work/infdit --out assets/tiny_infdit

--work holds checkpoint.pt (from `train`). Only the files of the pipeline, limits.json and example.png are
written; others in --out stay.
"""

from pathlib import Path

from analysis.recipes import assemble_command, finished, write_json
from analysis.tiny_flux.evaluate import drawer
from analysis.tiny_infdit.pipeline import InfDiTPipeline
from analysis.tiny_infdit.train import load_model

STEPS = 8  # 15 evaluations
FLUX, EXAMPLE = "assets/tiny_flux", 'a red round sign that says "CAFE" on a striped green background'


def limits() -> dict:
    """With which settings the model is used, in the form the command line reads."""
    return {
        "example": "",  # it takes no text
        "call": {"num_inference_steps": STEPS},
        "cpu_threads": 1,  # so small a model only loses by sharing its work
    }


def assemble(work: Path, out: Path) -> None:
    with finished(out) as folder:
        InfDiTPipeline(load_model(work / "checkpoint.pt").half()).save_pretrained(folder)
        write_json(folder / "limits.json", limits())
        drawer(FLUX)(EXAMPLE, 0, 50).save(folder / "example.png", optimize=True)


def main() -> None:
    assemble_command(__doc__, assemble, "work/infdit")


if __name__ == "__main__":
    main()
