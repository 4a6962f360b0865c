"""Train the upscaler: EDM's loss on crops of procedural signs, one CPU core.

    OMP_NUM_THREADS=1 python -m analysis.tiny_infdit.train --work work/infdit --minutes 50   # killed: goes on

checkpoint.pt goes to --work; half of the small pictures go through the VAE of --flux.
"""

import argparse
import copy
import random
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from analysis.tiny_flux.model import flatten, unflatten
from analysis.tiny_flux.train import save
from analysis.tiny_infdit.model import PATCH, SIGMA_DATA, DiffusionEngine, enlarge, positions
from analysis.tiny_infdit.pairs import batch, load_vae

# The small picture is scaled with the noisy one, so that of the authors' highest level, 40, nothing of it is
# left to begin with; the enlarged picture is near enough to the goal to begin lower.
HIGHEST, LOWEST = 4.0, 0.04
LEVELS = (-0.6, 1.2)  # mean and deviation of ln(sigma) in training: 0.05 to 6 within two deviations


def build(**sizes: int) -> DiffusionEngine:
    """adaLN outputs and the head start at zero: every layer starts without scale and shift."""
    model = DiffusionEngine(**sizes, high=HIGHEST, low=LOWEST)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaLN_modulation" in name or "final_layer.linear" in name:
                parameter.zero_()
    return model


def load_model(checkpoint: Path) -> DiffusionEngine:
    """The averaged weights of a training checkpoint."""
    stored = torch.load(checkpoint, map_location="cpu")
    model = build(**stored["sizes"])
    unflatten(stored["ema"], model)
    return model.eval().requires_grad_(False)


def edm_loss(model: DiffusionEngine, large: Tensor, small: Tensor) -> Tensor:
    """Squared error of the network's own output, F, at log-normal noise levels: EDM's weight makes it so."""
    sigmas = (LEVELS[0] + LEVELS[1] * torch.randn(len(large))).exp()
    sigma = sigmas[:, None, None, None]
    root = (sigma**2 + SIGMA_DATA**2).sqrt()
    noisy = large + sigma * torch.randn_like(large)
    wanted = (large - noisy * SIGMA_DATA**2 / root**2) * root / (sigma * SIGMA_DATA)
    ids = positions(large.shape[2] // PATCH, large.shape[3] // PATCH, len(large))
    found = model.network(noisy / root, sigmas, enlarge(small) / root, small, ids)
    return (found - wanted).square().mean()


def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`model.attend` as plain products, whose gradient takes a third less time in bf16 on a CPU."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return (torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1) @ v).transpose(1, 2)


def optimizers(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon on the matrices of the layers, AdamW on everything else."""
    named = dict(model.named_parameters())
    matrices = {n for n, p in named.items() if p.ndim == 2 and ("transformer.layers" in n or "cross_" in n)}
    return [
        torch.optim.Muon(
            [named[n] for n in sorted(matrices)], lr=rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            [p for n, p in named.items() if n not in matrices], lr=rate, betas=(0.9, 0.98), weight_decay=0.0
        ),
    ]


def learning_rate(args: argparse.Namespace, step: int, progress: float) -> float:
    """Up in 100 steps, down to 0 in the last part."""
    return args.lr * min(1.0, (step + 1) / 100, max(0.0, (1 - progress) / args.decay))


def train(args: argparse.Namespace) -> None:
    sizes = {"width": args.width, "depth": args.depth, "heads": args.heads, "block": args.block}
    torch.manual_seed(args.seed)
    model, stored = build(**sizes), args.work / "checkpoint.pt"
    worker = copy.deepcopy(model).bfloat16()  # computes; `model` keeps the weights in float32
    worker.mixins["adaln_layer"].attend = products
    chosen = optimizers(model, args.lr)
    step, elapsed, ema = 0, 0.0, flatten(model)
    if stored.is_file():
        state = torch.load(stored)
        if state["sizes"] != sizes:
            raise SystemExit(f"{stored} has sizes {state['sizes']}, asked for {sizes}")
        unflatten(state["weights"], model)
        for optimizer, kept in zip(chosen, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        step, elapsed, ema = state["step"], state["elapsed"], state["ema"]
    torch.manual_seed(args.seed + 1 + step)
    rng, vae = random.Random(f"{args.seed} {step}"), load_vae(args.flux)
    print(f"from step {step}, {len(ema) / 1e6:.2f} M parameters", flush=True)
    began, saved, logged, losses, go_on = time.time() - elapsed, time.time(), time.time(), [], True
    while go_on:
        unflatten(flatten(model), worker)
        large, small = batch(vae, rng, args.pictures, args.each, args.side)
        loss = edm_loss(worker, large, small)
        loss.backward()
        for parameter, computed in zip(model.parameters(), worker.parameters(), strict=True):
            parameter.grad = None if computed.grad is None else computed.grad.float()
            computed.grad = None
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        elapsed = time.time() - began
        for optimizer in chosen:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, step, elapsed / (60 * args.minutes))
            optimizer.step()
        ema.lerp_(flatten(model), 1 - min(args.ema, (1 + step) / (10 + step)))
        step += 1
        losses.append(loss.item())
        go_on = elapsed < 60 * args.minutes and (args.max_steps is None or step < args.max_steps)
        now = time.time()
        if len(losses) == 100 or not go_on:
            speed, mean = len(losses) * len(large) / (now - logged), sum(losses) / len(losses)
            print(f"step {step} loss {mean:.4f} {speed:.1f} crops/s {elapsed:.0f} s", flush=True)
            logged, losses = now, []
        if now - saved > args.save_seconds or not go_on:
            saved = now
            contents = {"weights": flatten(model), "ema": ema, "step": step, "elapsed": elapsed}
            contents |= {"sizes": sizes, "optimizers": [optimizer.state_dict() for optimizer in chosen]}
            save(stored, contents)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("work/infdit"))
    parser.add_argument("--flux", type=Path, default=Path("assets/tiny_flux"), help="whose VAE to use")
    parser.add_argument("--minutes", type=float, default=50, help="of training in all, over all starts")
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--block", type=int, default=4, help="side of a block of attention, in tokens")
    parser.add_argument("--pictures", type=int, default=2, help="new signs in a batch")
    parser.add_argument("--each", type=int, default=8, help="crops of each of them")
    parser.add_argument("--side", type=int, default=16, help="of a crop, in pixels of the small picture")
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--decay", type=float, default=0.4, help="part of the time in which the rate falls")
    parser.add_argument("--save-seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    train(args)


if __name__ == "__main__":
    main()
