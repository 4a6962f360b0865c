"""Score the tiny DiT: classes, likeness to real scans, copies of training data, numbers of steps, guidance.

    python -m analysis.tiny_dit.evaluate --work work/dit --out evaluation.json --sheets sheets
    python -m analysis.tiny_dit.evaluate --work work/dit --out guidance.json --steps      # guidance only

Draws --per-class pictures of every class, seeds 0, 1, 2, ..., uncached, for every number of steps, and keeps
them in --work, so that a stopped run goes on (empty it for another model). The real scans need scikit-learn.
Three measures, each beside its value for the held-out scans, which neither the model nor the judge has seen:

- classes right, as the judge of --model/judge says;
- Fréchet distance of the judge's features to the training scans, of the held-out ones too for equally many;
- distance to the nearest training picture (also varied as in training), root mean square of the grey values
  at 32x32: near enough is within the 95th percentile of the held-out scans, too near below their 1st.

And the mean PSNR between the pictures of few steps and those of most steps.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DiTPipeline
from PIL import Image

from analysis.records.provenance import provenance
from analysis.tiny_dit import digits
from analysis.tiny_dit.classifier import Judge
from analysis.tiny_flux.train import save

STEPS = (2, 3, 4, 5, 7, 10, 15, 20, 30, 50)
GUIDANCES, GUIDANCE_STEPS = (1.0, 1.5, 2.0, 3.0, 4.0), 10
BATCH, COPIES = 50, 8


def draw(pipe: DiTPipeline, per_class: int, steps: int, guidance: float) -> tuple[digits.Digits, float]:
    """Pictures of every class in turn, picture i from seed i, and seconds per picture."""
    labels = torch.arange(digits.CLASSES).repeat(per_class)
    began, found = time.perf_counter(), []
    for part in torch.arange(len(labels)).split(BATCH):
        generators = [torch.Generator().manual_seed(int(i)) for i in part]
        drawn = pipe(
            labels[part].tolist(),
            guidance_scale=guidance,
            generator=generators,
            num_inference_steps=steps,
            output_type="pt",
        ).images
        found.append(drawn.float().mean(1, keepdim=True) * 2 - 1)
    return digits.Digits(torch.cat(found), labels), (time.perf_counter() - began) / len(labels)


def drawn_once(args: argparse.Namespace, steps: int, guidance: float) -> tuple[digits.Digits, float]:
    """`draw`, or what an earlier run drew."""
    stored = args.work / f"drawn_{steps}_steps_{guidance}_guidance_{args.per_class}_each.pt"
    if not stored.is_file():
        pipe = DiTPipeline.from_pretrained(args.model)
        pipe.set_progress_bar_config(disable=True)
        found, seconds = draw(pipe, args.per_class, steps, guidance)
        save(stored, (found.pictures, found.labels, seconds))
        print(f"{steps} steps, guidance {guidance}: {seconds:.3f} s a picture", flush=True)
    pictures, labels, seconds = torch.load(stored)
    return digits.Digits(pictures, labels), seconds


class Neighbours:
    """The training pictures, as they are and varied, to find the nearest one of a picture."""

    def __init__(self, train_set: digits.Digits, copies: int) -> None:
        generator = torch.Generator().manual_seed(1)
        varied = [digits.vary(train_set.pictures, generator) for _ in range(copies)]
        self.pictures = torch.cat([train_set.pictures, *varied])
        self.seen = self.small(self.pictures)

    @staticmethod
    def small(pictures: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(pictures, 2).flatten(1)

    def nearest(self, pictures: torch.Tensor, count: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Distances, nearest first, and places in `pictures`: (N, count) each."""
        asked = self.small(pictures)
        found = torch.cdist(asked, self.seen).topk(count, largest=False)
        return found.values / asked.shape[1] ** 0.5, found.indices


def scores(judge: Judge, neighbours: Neighbours, found: digits.Digits, real: dict | None = None) -> dict:
    """real: those of the held-out scans, whose nearest distances say what is too far and what too near."""
    said = torch.tensor(judge.classes(found.pictures))
    right = said == found.labels
    distances = neighbours.nearest(found.pictures)[0][:, 0]
    percentiles = {str(q): distances.quantile(q / 100).item() for q in (1, 50, 95)}
    limits = real["nearest_percentiles"] if real else percentiles
    return {
        "pictures": len(found),
        "right": right.float().mean().item(),
        "right_per_class": [right[found.labels == label].float().mean().item() for label in range(10)],
        "frechet": judge.distance(found.pictures),
        "nearest_percentiles": percentiles,
        "near_enough": (distances <= limits["95"]).float().mean().item(),
        "too_near": (distances < limits["1"]).float().mean().item(),
    }


def psnr(pictures: torch.Tensor, wanted: torch.Tensor) -> float:
    """Mean over the pictures, in decibels, peak 2."""
    return (10 * torch.log10(4 / (pictures - wanted).pow(2).flatten(1).mean(1))).mean().item()


def small_png(picture: Image.Image, path: Path) -> None:
    """16 greys are enough for ink."""
    picture.quantize(16).save(path, optimize=True)


def neighbour_sheet(neighbours: Neighbours, drawn: digits.Digits, count: int = 20) -> Image.Image:
    """A line: drawn; its three nearest training pictures (as they are or varied). 10 pairs of lines."""
    nearest = neighbours.nearest(drawn.pictures[:count], 3)[1]
    columns = [drawn.pictures[:count], *(neighbours.pictures[nearest[:, i]] for i in range(3))]
    gap = torch.full((count, 1, digits.SIDE, 8), 0.0)
    lines = torch.cat([columns[0], gap, *columns[1:]], dim=3)  # (count, 1, 64, 4 * 64 + 8)
    half = count // 2
    gap = torch.full((half, 1, digits.SIDE, 32), 1.0)
    return digits.sheet([line[None] for line in torch.cat([lines[:half], gap, lines[half:]], dim=3)])


def evaluate(args: argparse.Namespace) -> dict:
    usual = json.loads((args.model / "limits.json").read_text())["call"]["guidance_scale"]
    drawn, seconds, guided = {}, {}, {}
    for steps in sorted(args.steps):
        drawn[steps], seconds[steps] = drawn_once(args, steps, usual)
    for guidance in args.guidances:
        guided[guidance], _ = drawn_once(args, GUIDANCE_STEPS, guidance)
    judge = Judge.of(args.model / "judge")
    train_set, held = digits.load()
    neighbours = Neighbours(train_set, COPIES)
    real = scores(judge, neighbours, held)
    few = [(held.labels == label).nonzero()[: args.per_class, 0] for label in range(digits.CLASSES)]
    few = held.pictures[torch.cat(few)]
    real |= {"equally_many": len(few), "frechet_equally_many": judge.distance(few)}
    copied = torch.randperm(len(train_set), generator=torch.Generator().manual_seed(2))[: len(few)]
    varied = digits.vary(train_set.pictures[copied], torch.Generator().manual_seed(2))
    result = provenance("tiny_dit.evaluate", "cpu") | {"guidance": usual, "held_out_scans": real}
    result["varied_training_scans"] = scores(
        judge, neighbours, digits.Digits(varied, train_set.labels[copied]), real
    )
    rows = {steps: scores(judge, neighbours, found, real) for steps, found in drawn.items()}
    for steps, row in rows.items():
        row["seconds_per_picture"] = seconds[steps]
        if (most := max(drawn)) != steps:
            row[f"psnr_to_{most}_steps"] = psnr(drawn[steps].pictures, drawn[most].pictures)
    result["by_steps"] = rows
    rows = {guidance: scores(judge, neighbours, found, real) for guidance, found in guided.items()}
    result["by_guidance"] = {"steps": GUIDANCE_STEPS} | rows
    if args.sheets and drawn:
        args.sheets.mkdir(parents=True, exist_ok=True)
        best = drawn[max(drawn)]
        rows = [row for row in best.pictures[:100].split(20) if len(row) == 20]
        small_png(digits.sheet(rows), args.sheets / "samples.png")
        small_png(digits.sheet([found.pictures[:20] for found in drawn.values()]), args.sheets / "steps.png")
        small_png(neighbour_sheet(neighbours, best), args.sheets / "neighbours.png")
    return result


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("assets/tiny_dit"))
    parser.add_argument("--work", type=Path, default=Path("work/dit"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sheets", type=Path, help="folder for samples.png, steps.png, neighbours.png")
    parser.add_argument("--per-class", type=int, default=36, help="36: all held-out scans")
    parser.add_argument("--steps", type=int, nargs="*", default=STEPS)
    parser.add_argument(
        "--guidances", type=float, nargs="*", default=GUIDANCES, help=f"at {GUIDANCE_STEPS} steps"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(evaluate(args), indent=2) + "\n")


if __name__ == "__main__":
    main()
