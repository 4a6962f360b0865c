"""Write the figures of evaluation.json into the model card, between its two marks.

python -m analysis.tiny_infdit.card --model assets/tiny_infdit
"""

import argparse
import json
from pathlib import Path

from analysis.tiny_dit.card import fill, line, percent

FROM = "<!-- scores: analysis.tiny_infdit.card -->\n"
SMALL = {
    "scaled": "true sign, scaled down",
    "vae": "the same, through the VAE",
    "drawn": "drawn by the embedded model",
}
KINDS = {"bicubic": "bicubic", "ours": "this model", "true": "true large sign"}


def enlarged_lines(found: dict) -> list[str]:
    lines = [
        line("small picture", "enlarged by", "PSNR, dB", "words read", "shape", "sign colour", "texture"),
        "|" + "---|" * 7,
    ]
    for name, kinds in found.items():
        for kind, row in kinds.items():
            near = f"{row['psnr']:.2f}" if "psnr" in row else ""
            right = [percent(row[f"{part}_ok"]) for part in ("word", "shape", "sign", "texture")]
            lines.append(line(SMALL[name], KINDS[kind], near, *right))
    return lines


def cached_lines(found: dict) -> list[str]:
    lines = [line("cache", "fewer blocks", "PSNR to the uncached, dB"), "|---|---|---|"]
    return lines + [line(name, f"{r['blocks_ratio']:.2f}x", f"{r['psnr']:.1f}") for name, r in found.items()]


def scores(found: dict) -> list[str]:
    machine = found["machine"]
    lines = [
        f"    {found['command']}",
        "",
        f"{machine['device_name']}, {machine['threads']} thread, {found['date'][:10]}, torch "
        f"{machine['versions']['torch']}, diffusers {machine['versions']['diffusers']},",
        f"{found['signs']} held-out signs, {found['steps']} steps ({2 * found['steps'] - 1} evaluations):",
        "",
        *enlarged_lines(found["enlarged"]),
        "",
        "The pictures drawn by the embedded model, enlarged with a cache:",
        "",
        *cached_lines(found["cached"]),
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("assets/tiny_infdit"))
    args = parser.parse_args()
    found = json.loads((args.model / "evaluation.json").read_text(encoding="utf-8"))
    fill(args.model / "README.md", FROM, "\n".join(scores(found)) + "\n")


if __name__ == "__main__":
    main()
