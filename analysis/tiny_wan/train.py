"""Flow-matching training of the tiny Wan; one command, killed runs go on from their last checkpoint.

    python -m analysis.tiny_wan.train --work work/wan --minutes 90

    python -m analysis.tiny_wan.train --work work/wan --device cuda --workers 10 --layers 12 --batch 512

--work holds text_encoder and tokenizer (from text_encoder); checkpoint.pt is written there. Clips are
drawn on the fly. On a CPU one single-threaded process does all: two OpenMP threads collapse as soon as
anything else runs; eager, for torch.compile made it slower (32 clips a core-second against 44). For a GPU,
--workers processes draw clips into a pool on the device, and a step is one CUDA graph.
"""

import argparse
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch

from analysis.sample_pool import Pool, captured
from analysis.tiny_flux.model import flatten, unflatten
from analysis.tiny_flux.train import save
from analysis.tiny_wan.clips import (
    BAD,
    SIZE,
    ClipSpec,
    is_held_out,
    prompt,
    render,
    sample_spec,
    spoil,
    thing_cover,
    word_cover,
)
from analysis.tiny_wan.latents import GROUP, LATENT_FRAMES, to_latent
from analysis.tiny_wan.model import WanMuon, build_transformer, load_transformer, use_bmm_attention
from analysis.tiny_wan.text_encoder import FrozenEncoder

TOKEN = 16  # pixels per side of a token
EMPTY, SPOILED = (
    0.08,
    0.04,
)  # shares of clips with an empty prompt, and of spoiled ones with the negative prompt
HIGH_NOISE = 0.5  # share of samples from uniform(.55, 1), the levels where words and places are decided
COVER_WEIGHT = 3.0
CHUNK = 64  # clips that a worker process delivers at once


@cache
def touched(shape: str, action: str, letters: int = 0) -> np.ndarray:
    """(5, 4, 4): tokens that the thing, or a word of so many letters, ever covers."""
    cover = word_cover("H" * letters, action) if letters else thing_cover(shape, action) / 255
    cover = np.concatenate([cover[:1].repeat(GROUP, 0), cover[1:]])
    tokens = cover.reshape(LATENT_FRAMES, GROUP, SIZE // TOKEN, TOKEN, SIZE // TOKEN, TOKEN)
    return tokens.max((1, 3, 5)) > 0.02


def cover_weight(spec: ClipSpec) -> np.ndarray:
    """More weight where something is drawn. It depends on the prompt alone, so it biases nothing."""
    found = [touched(thing.shape, thing.action) for thing in spec.things]
    found += [touched("", spec.action, len(spec.word))] if spec.word else []
    weight = np.where(np.logical_or.reduce(found), COVER_WEIGHT, 1.0)
    return weight / weight.mean()


def make_batch(
    encoder: FrozenEncoder, rng: random.Random, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents (B, 16, 5, 8, 8), text states (B, 20, 128), weights (B, 5, 4, 4)."""
    clips, prompts, weights = [], [], []
    for _ in range(count):
        spec, chance = sample_spec(rng), rng.random()
        while is_held_out(spec):
            spec = sample_spec(rng)
        frames = render(spec, rng)
        ordinary = chance >= EMPTY + SPOILED
        clips.append(spoil(frames, rng) if EMPTY <= chance < EMPTY + SPOILED else frames)
        prompts.append(prompt(spec, rng) if ordinary else "" if chance < EMPTY else BAD)
        weights.append(cover_weight(spec) if ordinary else np.ones((LATENT_FRAMES, 4, 4)))
    latents = to_latent(torch.from_numpy(np.stack(clips)))
    return latents, encoder(prompts), torch.from_numpy(np.stack(weights)).float()


def flow_loss(
    transformer: torch.nn.Module, batch: tuple[torch.Tensor, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Weighted squared error of the velocity, and the noise level, one value per sample."""
    clean, text, weight = batch
    count, device = len(clean), clean.device
    sigma = torch.sigmoid(torch.randn(count, device=device) + 0.2)
    high = torch.rand(count, device=device) < HIGH_NOISE
    sigma = torch.where(high, 0.55 + 0.45 * torch.rand(count, device=device), sigma)
    noise, level = torch.randn_like(clean), sigma[:, None, None, None, None]
    velocity = transformer(
        hidden_states=((1 - level) * clean + level * noise).to(dtype),
        timestep=1000 * sigma,
        encoder_hidden_states=text.to(dtype),
        return_dict=False,
    )[0]
    error = (velocity.float() - (noise - clean)).pow(2).mean(1)  # (B, 5, 8, 8)
    error = error.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5))  # (B, 5, 4, 4)
    return (error * weight).mean((1, 2, 3)), sigma


def chunks(work: Path, seed: str) -> Iterator[list[np.ndarray]]:
    """What a worker process delivers."""
    encoder, rng = FrozenEncoder(work), random.Random(seed)
    while True:
        yield [part.half().numpy() for part in make_batch(encoder, rng, CHUNK)]


def batches(args: argparse.Namespace, seed: str) -> Callable[[int], Sequence[torch.Tensor]]:
    """A function of the count: drawn by this process, or from a pool on the device."""
    if not args.workers:
        encoder, rng = FrozenEncoder(args.work), random.Random(seed)
        return lambda count: [part.to(args.device) for part in make_batch(encoder, rng, count)]
    pool = Pool(partial(chunks, args.work), seed, args.workers, args.pool, args.device)
    return lambda count: [part.float() for part in pool.draw(count)]


def gradient(
    transformer: torch.nn.Module, weights: torch.Tensor, *batch: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The flat gradient of the summed loss at `weights`; loss and noise level of every sample."""
    unflatten(weights, transformer)
    loss, sigma = flow_loss(transformer, batch, torch.bfloat16)
    parts = torch.autograd.grad(loss.sum(), list(transformer.parameters()), materialize_grads=True)
    return torch.cat([part.float().flatten() for part in parts]), loss.detach(), sigma


def learning_rate(args: argparse.Namespace, step: int, done: float) -> float:
    """Warm-up over 100 steps, constant, then linear to 0 over the last `decay` of the budget."""
    return args.lr * min(1.0, (step + 1) / 100) * min(1.0, max(0.0, (1 - done) / args.decay))


def starting_point(args: argparse.Namespace) -> dict:
    """The checkpoint of a killed run, else --init, else fresh weights."""
    path = args.work / "checkpoint.pt"
    sizes = {"width": args.width, "layers": args.layers, "ffn": 4 * args.width}
    if path.exists():
        stored = torch.load(path, map_location="cpu")
        if stored["sizes"] != sizes:
            raise SystemExit(f"{path} holds sizes {stored['sizes']}, asked for {sizes}: give another --work")
        return stored
    torch.manual_seed(args.seed)
    weights = flatten(load_transformer(args.init) if args.init else build_transformer(**sizes))
    return {"weights": weights, "ema": weights.clone(), "step": 0, "seen": 0, "elapsed": 0.0, "sizes": sizes}


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    state = starting_point(args)
    draw = batches(args, f"{args.seed} {state['step']}")  # first: the workers start while this goes on
    torch.manual_seed(args.seed + 1 + state["step"])
    transformer = build_transformer(**state["sizes"])
    weights, ema = (state[name].to(args.device) for name in ("weights", "ema"))
    optimizer = WanMuon(transformer, args.device)
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
    use_bmm_attention(transformer)
    transformer.to(args.device, torch.bfloat16)  # whole weights: autocast gives no speed-up on a CPU
    compute = partial(gradient, transformer, weights)
    if args.graph:
        compute = captured(compute, draw(args.micro))
    step, seen = state["step"], state["seen"]
    print(f"from step {step}, {len(weights) / 1e6:.2f} M parameters, {args.device}", flush=True)
    began = time.time() - state["elapsed"]
    budget = args.until - began if args.until else 60 * args.minutes
    logged = saved = time.time()
    logged_seen, losses = seen, []
    go_on, asked_to_stop = True, []
    signal.signal(signal.SIGTERM, lambda *_: asked_to_stop.append(True))  # kill PID: saves, then ends
    while go_on:
        total = torch.zeros_like(weights)
        for _ in range(args.batch // args.micro):
            part, loss, sigma = compute(*draw(args.micro))
            total.add_(part, alpha=1 / args.batch)
            losses.append(torch.stack([sigma, loss]))
        elapsed = time.time() - began
        optimizer.step(weights, total, learning_rate(args, step, elapsed / budget))
        ema.lerp_(weights, 1 - min(args.ema, (1 + step) / (10 + step)))
        step, seen = step + 1, seen + args.batch
        go_on = elapsed < budget and (args.max_steps is None or step < args.max_steps)
        go_on = go_on and not asked_to_stop
        now = time.time()
        if now - logged > args.log_seconds or not go_on:
            levels, values = torch.cat(losses, 1).cpu()  # waits for the device
            bins = [
                f"{values[(levels >= a) & (levels < b)].mean():.3f}"
                for a, b in ((0, 0.5), (0.5, 0.9), (0.9, 1.1))
            ]
            print(
                f"step {step} seen {seen} loss {values.mean():.4f} by level {' '.join(bins)} "
                f"{(seen - logged_seen) / (now - logged):.1f} clips/s {elapsed:.0f} s",
                flush=True,
            )
            logged, logged_seen, losses = now, seen, []
        if now - saved > args.save_seconds or not go_on:
            saved = now
            averaged = {"ema": ema, "step": step, "seen": seen, "elapsed": elapsed, "sizes": state["sizes"]}
            save(
                args.work / "checkpoint.pt",
                averaged | {"weights": weights, "optimizer": optimizer.state_dict()},
            )
            if args.export:
                save(args.export, averaged)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("work/wan"))
    parser.add_argument("--init", type=Path, help="start from the averaged weights of this checkpoint")
    parser.add_argument("--minutes", type=float, default=90, help="of training in all, resumed runs included")
    parser.add_argument("--until", type=float, help="end then, seconds since 1970, whatever --minutes says")
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--width", type=int, default=128, help="a multiple of 32")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--micro", type=int, help="clips a forward pass; all of --batch if not given")
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--ema", type=float, default=0.997)
    parser.add_argument("--decay", type=float, default=0.4)
    parser.add_argument("--save-seconds", type=float, default=120)
    parser.add_argument("--log-seconds", type=float, default=20)
    parser.add_argument("--export", type=Path, help="the averaged weights alone, written at every save")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw clips; 0: this one does")
    parser.add_argument("--pool", type=int, default=400_000, help="clips kept on the device, 16 KB each")
    parser.add_argument("--no-graph", dest="graph", action="store_false", help="on a GPU, no CUDA graph")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.micro = args.micro or args.batch
    args.graph = args.graph and torch.device(args.device).type == "cuda"
    train(args)


if __name__ == "__main__":
    main()
