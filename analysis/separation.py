"""Is the first stage structure and the second detail? Each is frozen alone, and the errors are compared.

    python -m analysis.separation                  # figures and answer from the shipped records
    python -m analysis.separation --run --limit 8  # repeat the experiment on 8 prompts
    python -m analysis.separation --run --model black-forest-labs/FLUX.1-dev --prompts my.jsonl

A stage is frozen in a window of a fifth of the steps, or from some step to the end (ablations/freeze.py). For
each picture: the error against the uncached one below and above 1/8 of the Nyquist frequency, both relative
to what the picture itself has there, and whether word, shape and colours are still right.

Writes separation.png/.pdf/.csv, separation_pictures.png/.pdf/.csv and the answer in separation.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

from analysis.ablations.freeze import STAGES, FreezeConfig
from analysis.cli import figure_script, shipped
from analysis.drawing.draw import Drawn
from analysis.drawing.prompts import Prompt
from analysis.figures import style
from analysis.figures.separation import answer, draw_pictures, draw_spectra, of, spans
from analysis.measures.fidelity import fidelity
from analysis.measures.spectrum import BANDS, error_spectrum, low_and_high
from analysis.measuring import Trial, measure, parser_of, recorded
from analysis.records import store
from analysis.records.provenance import source_of
from analysis.records.saved import MAYBE, NUMBER, Saved, find_records, read_saved
from analysis.tiny_flux.evaluate import checked
from h2cache import find_method

SHIPPED = Path(shipped("assets/results/tiny_flux_separation"))
NEEDS = {
    "id": str, "stage": str, "first": int, "last": int, "steps": int, "psnr": MAYBE, "low": NUMBER,
    "high": NUMBER, "spectrum": list, "word": MAYBE, "shape": MAYBE, "sign": MAYBE, "texture": MAYBE,
}  # fmt: skip


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, "separation")
    parser.add_argument(
        "--records", type=Path, default=SHIPPED, help="folder with records.jsonl.gz or .jsonl"
    )
    parser.add_argument("--pictured", default="sign03", help="prompt whose pictures are kept and shown")
    return parser.parse_args(argv)


@recorded("separation")
def run(args: argparse.Namespace) -> Path:
    """Draw every prompt with every stage frozen in every span; returns the folder of the records."""
    trial = Trial.of(args)
    (args.out / "pictures").mkdir(parents=True, exist_ok=True)
    pictured = args.pictured if args.pictured in {p.id for p in trial.prompts} else trial.prompts[0].id
    frozen = [FreezeConfig(stage, *span) for span in spans(args.steps) for stage in STAGES]
    contestants = {"none-1-1": find_method("none")()} | {f"{c.stage}-{c.first}-{c.last}": c for c in frozen}

    def rows(prompt: Prompt, drawn: dict[str, Drawn]) -> dict[str, dict]:
        uncached = drawn["none-1-1"].image
        return {name: row(prompt, name, found.image, uncached) for name, found in drawn.items()}

    def row(prompt: Prompt, name: str, image: Image.Image, uncached: Image.Image) -> dict:
        if prompt.id == pictured:
            store.save_png(args.out / "pictures" / f"{name}.png", image)
        stage, first, last = name.split("-")
        return _short({
            "stage": stage, "first": int(first), "last": int(last), "steps": args.steps,
            **fidelity(image, uncached), **low_and_high(image, uncached),
            "spectrum": error_spectrum(image, uncached).tolist(), **checked(image, prompt.words, prompt.text),
        })  # fmt: skip

    def key(prompt: Prompt, name: str) -> str:
        return trial.key(prompt, f"{name}, kept" if prompt.id == pictured else name)

    measure(args.out / "records.jsonl", trial.prompts, contestants, trial.draw, rows, key)
    return args.out


def _short(row: dict) -> dict:
    """Four digits are more than the prompts agree on."""
    short = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
    return short | {"spectrum": [float(f"{v:.4g}") for v in row["spectrum"]]}


def read(folder: Path) -> Saved:
    path, unique = find_records(folder, "records"), ("id", "stage", "first", "last")
    return read_saved([path], NEEDS, same={"steps": lambda row: row["steps"]}, unique=unique)


@figure_script
def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    folder = run(args) if args.run else args.records
    saved = read(folder)
    frozen = [r for r in saved.rows if r["stage"] in STAGES and len(r["spectrum"]) == BANDS]
    found = {(r["first"], r["last"]) for r in frozen}
    steps = frozen[0]["steps"] if frozen else 0
    everywhere = [s for s in spans(steps) if s in found and all(of(frozen, stage, s) for stage in STAGES)]
    if not everywhere:
        raise ValueError(f"{folder} has no span in which every stage was frozen")
    uncached = [r for r in saved.rows if r["stage"] == "none"]
    draw_spectra(frozen, uncached, everywhere, args.out / "separation")
    shown = draw_pictures(folder / "pictures", everywhere, args.out / "separation_pictures")
    if not shown:
        print(f"no picture grid: {folder}/pictures is not complete", file=sys.stderr)
    style.write_words(args.out / "separation.md", answer(frozen, uncached, everywhere, source_of(folder)))
    return saved.exit_code()


if __name__ == "__main__":
    sys.exit(main())
