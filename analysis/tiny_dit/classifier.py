"""The judge: a small convolutional net that says which digit a picture shows.

    OMP_NUM_THREADS=1 python -m analysis.tiny_dit.classifier --out assets/tiny_dit/judge --minutes 3

Trained on the training digits (varied), scored on the held-out ones. Its 64 features also measure how far
drawn pictures are from real ones (Fréchet distance). Using it needs no scikit-learn:

    judge = Judge.of("assets/tiny_dit/judge")
    judge.classes(pictures)       # of PIL images, or of a tensor (N, 1, 64, 64) from -1 to 1
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from analysis.tiny_dit import digits

FEATURES = 64


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = (1, 8, 16, 32)
        convolutions = []
        for few, many in pairwise(sizes):
            convolutions += [nn.Conv2d(few, many, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.look = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(32 * 4 * 4, FEATURES), nn.ReLU())
        self.say = nn.Linear(FEATURES, digits.CLASSES)

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and scores of pictures (N, 1, 64, 64)."""
        features = self.look(F.avg_pool2d(pictures, 2))
        return features, self.say(F.dropout(features, 0.3, self.training))


def grey(pictures: torch.Tensor | Sequence[Image.Image]) -> torch.Tensor:
    """(N, 1, 64, 64) from -1 to 1."""
    if isinstance(pictures, torch.Tensor):
        return pictures
    arrays = np.stack([np.asarray(picture.convert("L"), np.float32) for picture in pictures])
    return torch.from_numpy(arrays)[:, None] / 127.5 - 1


def frechet(mean: torch.Tensor, covariance: torch.Tensor, features: torch.Tensor) -> float:
    """Squared Fréchet distance of Gaussians: |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½)."""
    features, mean, covariance = features.double(), mean.double(), covariance.double()
    other = torch.cov(features.T)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors @ (values.clamp(min=0).sqrt()[:, None] * vectors.T)
    shared = torch.linalg.eigvalsh(root @ other @ root).clamp(min=0).sqrt().sum()
    gap = (features.mean(0) - mean).pow(2).sum()
    return (gap + covariance.trace() + other.trace() - 2 * shared).item()


class Judge:
    """The trained net, and mean and covariance of its features over the real training digits."""

    def __init__(self, net: Net, mean: torch.Tensor, covariance: torch.Tensor) -> None:
        self.net, self.mean, self.covariance = net.eval(), mean, covariance

    @classmethod
    def of(cls, folder: str | Path) -> Judge:
        stored = {
            name: value.float() for name, value in load_file(Path(folder) / "judge.safetensors").items()
        }
        mean, covariance = stored.pop("real_mean"), stored.pop("real_covariance")
        net = Net()
        net.load_state_dict(stored)
        return cls(net, mean, covariance)

    @torch.no_grad()
    def features(self, pictures: torch.Tensor | Sequence[Image.Image]) -> torch.Tensor:
        return self.net(grey(pictures))[0]

    @torch.no_grad()
    def classes(self, pictures: torch.Tensor | Sequence[Image.Image]) -> list[int]:
        return self.net(grey(pictures))[1].argmax(1).tolist()

    def distance(self, pictures: torch.Tensor | Sequence[Image.Image]) -> float:
        """Fréchet distance to the real training digits; compare only between equally many pictures."""
        return frechet(self.mean, self.covariance, self.features(pictures))


def train(minutes: float, seed: int, max_steps: int | None = None) -> tuple[Judge, dict]:
    torch.manual_seed(seed)
    train_set, held = digits.load()
    net, generator = Net(), torch.Generator().manual_seed(seed)
    adam = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
    began, step, progress = time.time(), 0, 0.0
    while progress < 1 and (max_steps is None or step < max_steps):
        chosen = torch.randint(len(train_set), (64,), generator=generator)
        pictures = digits.vary(train_set.pictures[chosen], generator, strength=1.5)
        loss = F.cross_entropy(net(pictures)[1], train_set.labels[chosen], label_smoothing=0.05)
        adam.zero_grad()
        loss.backward()
        adam.param_groups[0]["lr"] = 2e-3 * (1 - progress)
        adam.step()
        step += 1
        progress = (time.time() - began) / (60 * minutes)
        if step % 200 == 0:
            print(f"step {step} loss {loss.item():.4f}", flush=True)
    net = net.half().float().eval()  # as it is stored
    with torch.no_grad():
        real = net(train_set.pictures)[0]
    judge = Judge(net, real.mean(0), torch.cov(real.T))
    halves = [real[torch.arange(len(real)) % 2 == odd] for odd in (0, 1)]
    named = {"training": train_set, "held_out": held}
    right = {
        name: sum(a == b for a, b in zip(judge.classes(part.pictures), part.labels.tolist(), strict=True))
        for name, part in named.items()
    }
    wrong = [
        {"picture": i, "shows": label, "said": said}
        for i, (label, said) in enumerate(
            zip(held.labels.tolist(), judge.classes(held.pictures), strict=True)
        )
        if label != said
    ]
    facts = {"steps": step, "minutes": minutes, "torch": torch.__version__, "seed": seed}
    facts |= {f"{name}_right": [right[name], len(part)] for name, part in named.items()}
    facts |= {
        "held_out_wrong": wrong,
        "frechet_held_out_to_training": judge.distance(held.pictures),
        "frechet_half_to_half_of_training": frechet(halves[0].mean(0), torch.cov(halves[0].T), halves[1]),
    }
    return judge, facts


def save(judge: Judge, facts: dict, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    stored = {name: value.half().contiguous() for name, value in judge.net.state_dict().items()}
    stored |= {"real_mean": judge.mean, "real_covariance": judge.covariance}
    save_file(stored, out / "judge.safetensors", metadata={"format": "pt"})
    (out / "judge.safetensors").chmod(0o644)
    (out / "judge.json").write_text(json.dumps(facts, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    judge, facts = train(args.minutes, args.seed, args.max_steps)
    save(judge, facts, args.out)
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
