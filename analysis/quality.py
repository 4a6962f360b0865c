"""Whether a wanted quality is kept: asked for 35, 40, 45 and 50 dB, what do other pictures get?

    python -m analysis.quality                                       # from the shipped records
    python -m analysis.quality --run                                 # 200 prompts, some minutes on one core
    python -m analysis.quality --run --prompts my.jsonl --limit 40

Every prompt is drawn uncached, with `psnr=` at each wanted value, and with fixed plans of about as many
evaluations, the control. Values are PSNR of 8-bit pictures. Writes quality.md.
"""

from __future__ import annotations

import argparse
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np

from analysis.cli import figure_script, shipped
from analysis.drawing.families import with_prompt
from analysis.drawing.prompts import Prompt
from analysis.figures import style
from analysis.measuring import Trial, measure, parser_of, recorded
from analysis.records.compare import as_table, groups
from analysis.records.provenance import source_of
from analysis.records.saved import MAYBE, NUMBER, read_saved
from h2cache import PlanConfig, summary
from h2cache.studio import Studio

SHIPPED = Path(shipped("assets/results/tiny_flux_quality/rows.jsonl"))
WANTED = (35.0, 40.0, 45.0, 50.0)
FIXED = (3, 4, 5, 6, 7, 8, 9)  # evaluations of the control
NEEDS = {"key": str, "id": str, "asked": str, "evaluations": NUMBER, "psnr": NUMBER, "expected": MAYBE}
SHARE = 0.9  # of the pictures that are to reach the wanted value


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_of(__doc__, "quality")
    parser.add_argument("--records", type=Path, default=SHIPPED)
    parser.set_defaults(prompts=Path(shipped("assets/prompts/tiny200.jsonl")))
    return parser.parse_args(argv)


@recorded("quality")
def run(args: argparse.Namespace) -> Path:
    """Draw and compare; the pictures are not kept. A stopped run goes on."""
    trial, path = Trial.of(args), args.out / "rows.jsonl"
    configs = {f"{p:g} dB": PlanConfig(psnr=p) for p in WANTED}
    configs |= {f"{k} evaluations": PlanConfig(evaluations=k) for k in FIXED}

    @lru_cache(1)
    def studio(prompt: Prompt) -> Studio:
        asked = with_prompt(trial.pipeline, {"prompt": prompt.text}) | {"seed": trial.seed_of(prompt)}
        return Studio(trial.pipeline, [asked], trial.call, 0)

    def draw(prompt: Prompt, config: PlanConfig) -> dict:
        value, done = studio(prompt).fidelity(0, config, saved=True), summary(trial.pipeline)
        expected = done.expected_psnr and round(done.expected_psnr[0], 3)
        return {"evaluations": len(done.evaluated), "psnr": round(value, 3), "expected": expected}

    def rows(_: Prompt, drawn: dict[str, dict]) -> dict[str, dict]:
        return {asked: {"asked": asked} | found for asked, found in drawn.items()}

    measure(path, trial.prompts, configs, draw, rows, trial.key)
    return path


def answer(rows: list[dict], source: str) -> str:
    """Of each wanted value: how many pictures reach it, beside the best fixed number of evaluations."""
    of, table = groups(rows, "asked"), []
    heads = (
        "asked",
        "at or above",
        "evaluations",
        "mean dB",
        "worst dB",
        "fixed for 90 %",
        "more than fixed",
    )
    lines = [f"Source: {source}; {len({row['id'] for row in rows})} prompts.", ""]
    for wanted in WANTED:
        mine = of.get(f"{wanted:g} dB", [])
        if not mine:
            continue
        got, mean = np.array([row["psnr"] for row in mine]), np.mean([row["evaluations"] for row in mine])
        enough = [k for k in FIXED if np.mean([r["psnr"] >= wanted for r in of[f"{k} evaluations"]]) >= SHARE]
        fixed = [str(enough[0]), f"{mean / enough[0] - 1:+.0%}"] if enough else ["-", "-"]
        cells = [f"{wanted:g} dB", f"{(got >= wanted).mean():.1%}", f"{mean:.2f}"]
        table.append([*cells, f"{got.mean():.1f}", f"{got.min():.1f}", *fixed])
    lines += as_table(heads, table)
    known = np.array([(row["expected"], row["psnr"]) for row in rows if row["expected"] is not None])
    if len(known):
        off = np.abs(known[:, 0] - known[:, 1])
        lines.append("")
        lines.append(
            f"Expected PSNR: within 3 dB of the true one for {(off <= 3).mean():.1%} of {len(off)} pictures, "
            f"root mean square error {np.sqrt((off**2).mean()):.2f} dB."
        )
    return "\n".join(lines)


@figure_script
def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    path = run(args) if args.run else args.records
    saved = read_saved([path], NEEDS, unique=("key",))
    style.write_words(args.out / "quality.md", answer(saved.rows, source_of(path.parent)))
    return saved.exit_code()


if __name__ == "__main__":
    sys.exit(main())
