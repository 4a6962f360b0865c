"""Write the figures of evaluation.json and judge/judge.json into the model card, between its two marks.

python -m analysis.tiny_dit.card --model assets/tiny_dit
"""

import argparse
import json
from pathlib import Path

from analysis.tiny_dit.digits import NAMES

FROM, TO = "<!-- scores: analysis.tiny_dit.card -->\n", "<!-- end of scores -->\n"
HEADS = ("class right", "Fréchet", "nearest, median", "near enough", "too near")


def percent(part: float) -> str:
    return f"{100 * part:.1f} %"


def line(*cells: object) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def fill(card: Path, mark: str, text: str) -> None:
    """Put `text` into a card, between `mark` and the end of scores."""
    before, rest = card.read_text(encoding="utf-8").split(mark)
    after = rest.split(TO)[1]
    card.write_text(f"{before}{mark}\n{text}\n{TO}{after}", encoding="utf-8")


def cells(row: dict, frechet: str = "frechet") -> list[str]:
    found = [percent(row["right"]), f"{row[frechet]:.2f}", f"{row['nearest_percentiles']['50']:.3f}"]
    return [*found, percent(row["near_enough"]), percent(row["too_near"])]


def real_lines(found: dict, empty: list[str]) -> list[str]:
    """What real scans score, and what copies would."""
    held = cells(found["held_out_scans"], "frechet_equally_many")
    copies = cells(found["varied_training_scans"])
    return [line("held-out scans", *held, *empty), line("varied training scans", *copies, *empty)]


def scores(found: dict, judge: dict) -> list[str]:
    machine, by_steps = found["machine"], found["by_steps"]
    name, date = machine.get("device_name") or machine["cpu"], found.get("date") or machine["date"]
    versions = machine.get("versions", machine)
    most = max(by_steps, key=int)
    count, to_most = by_steps[most]["pictures"], f"psnr_to_{most}_steps"
    command = f"python -m analysis.tiny_dit.evaluate --out evaluation.json --per-class {count // 10}"
    lines = [
        f"    {command}",
        "",
        f"{name}, 2 cores shared with other work, {machine['threads']} thread, {date[:10]},",
        f"torch {versions['torch']}, diffusers {versions['diffusers']}, guidance {found['guidance']},",
        f"uncached, {count} pictures a line, {count // 10} of each class, seeds 0 to {count - 1}:",
        "",
        line("steps", *HEADS, f"PSNR to {most} steps, dB", "seconds"),
        "|" + "---|" * 8,
    ]
    for steps, row in by_steps.items():
        last = f"{row[to_most]:.1f}" if to_most in row else ""
        lines.append(line(steps, *cells(row), last, f"{row['seconds_per_picture']:.3f}"))
    lines += real_lines(found, ["", ""])
    parts = zip(NAMES, by_steps[most]["right_per_class"], strict=True)
    classes = ", ".join(f"{name} {percent(part)}" for name, part in parts)
    right, of = judge["held_out_right"]
    lines += ["", f"Class right at {most} steps: {classes}.", ""]
    lines += [
        f"The judge names {right} of the {of} held-out scans rightly. Fréchet distance between two halves"
    ]
    lines += [f"of the training scans: {judge['frechet_half_to_half_of_training']:.2f}.", ""]
    by_guidance = dict(found["by_guidance"])
    steps = by_guidance.pop("steps", None)
    if by_guidance:
        lines += [f"At {steps} steps:", "", line("guidance", *HEADS), "|" + "---|" * 6]
        lines += [line(guidance, *cells(row)) for guidance, row in by_guidance.items()]
        lines += [*real_lines(found, []), ""]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("assets/tiny_dit"))
    args = parser.parse_args()
    found = json.loads((args.model / "evaluation.json").read_text(encoding="utf-8"))
    judge = json.loads((args.model / "judge/judge.json").read_text(encoding="utf-8"))
    fill(args.model / "README.md", FROM, "\n".join(scores(found, judge)))


if __name__ == "__main__":
    main()
