"""Flow-matching training of the tiny FLUX; one command, killed runs go on from their last checkpoint.

    python -m analysis.tiny_flux.train --work work/tiny --minutes 60               # CPU worker processes
    python -m analysis.tiny_flux.train --work work/tiny --minutes 15 --batch 768   # where there is a GPU

--work holds the text encoders (from text_encoders); checkpoint.pt is written there. Images are rendered on
the fly. On a CPU, single-threaded processes steal micro-batches of each step and add their gradients through
shared memory (two OpenMP threads in one process collapse as soon as anything else runs). On a GPU the workers
render and encode into a pool that stays on the device. The GPU path has not been run on a GPU yet.
"""

import argparse
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
import torch.multiprocessing as mp

from analysis.sample_pool import Pool
from analysis.tiny_flux.latents import PATCH, SIDE, img_ids, pack, to_latent
from analysis.tiny_flux.model import (
    build_transformer,
    flatten,
    load_transformer,
    unflatten,
    use_bmm_attention,
)
from analysis.tiny_flux.optimizer import MuonAdamW
from analysis.tiny_flux.signs import SignSpec, letter_slots, prompt, render, sample_spec
from analysis.tiny_flux.text_encoders import MAX_TOKENS, FrozenEncoders

TOKEN = 2 * PATCH  # pixels per side of a token
HIGH_NOISE = 0.5  # share of samples from uniform(.55, 1), the levels where words are decided
TEXT_WEIGHT = 3.0


@dataclass
class Batch:
    clean: torch.Tensor  # (B, 64, 64)
    txt: torch.Tensor  # (B, 24, 128)
    pooled: torch.Tensor  # (B, 96)
    weight: torch.Tensor  # (B, 64), mean 1

    def to(self, device: str) -> "Batch":
        return Batch(*(t.to(device) for t in (self.clean, self.txt, self.pooled, self.weight)))


def text_weight(spec: SignSpec) -> torch.Tensor:
    """More weight on the tokens of the text box. It depends on the prompt alone, so it biases nothing."""
    weight = torch.ones(SIDE, SIDE)
    for slot in letter_slots(spec.shape, len(spec.word), spec.curved):
        top, bottom = (max(0, int((slot.y + sign * slot.height * 0.45) // TOKEN)) for sign in (-1, 1))
        left, right = (max(0, int((slot.x + sign * slot.width * 0.4) // TOKEN)) for sign in (-1, 1))
        weight[top : bottom + 1, left : right + 1] = TEXT_WEIGHT
    return (weight / weight.mean()).flatten()


@torch.no_grad()
def make_batch(encoders: FrozenEncoders, rng: random.Random, count: int) -> Batch:
    specs = [sample_spec(rng) for _ in range(count)]
    images = torch.from_numpy(np.stack([render(spec, rng) for spec in specs]))
    txt, pooled = encoders([prompt(spec, rng) for spec in specs])
    return Batch(pack(to_latent(images)), txt, pooled, torch.stack([text_weight(spec) for spec in specs]))


def flow_loss(transformer: torch.nn.Module, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
    """Weighted squared error of the velocity, one value per sample."""
    device, count = batch.clean.device, len(batch.clean)
    sigma = torch.sigmoid(torch.randn(count, device=device) + 0.2)
    high = 0.55 + 0.449 * torch.rand(count, device=device)
    sigma = torch.where(torch.rand(count, device=device) < HIGH_NOISE, high, sigma)
    noise = torch.randn_like(batch.clean)
    level = sigma[:, None, None]
    velocity = transformer(
        hidden_states=((1 - level) * batch.clean + level * noise).to(dtype),
        encoder_hidden_states=batch.txt.to(dtype),
        pooled_projections=batch.pooled.to(dtype),
        timestep=sigma,
        guidance=1 + 4 * torch.rand(count, device=device),  # any guidance_scale is accepted and means nothing
        img_ids=img_ids().to(device),
        txt_ids=torch.zeros(MAX_TOKENS, 3, device=device),
        return_dict=False,
    )[0]
    error = (velocity.float() - (noise - batch.clean)).pow(2).mean(2)  # (B, 64)
    return (error * batch.weight).mean(1)


def learning_rate(args: argparse.Namespace, step: int, done: float) -> float:
    """Warm-up over 100 steps, constant, then linear to 0 over the last `decay` of the budget."""
    return args.lr * min(1.0, (step + 1) / 100) * min(1.0, max(0.0, (1 - done) / args.decay))


def save(path: Path, contents: dict) -> None:
    unfinished = path.with_suffix(".tmp")
    torch.save(contents, unfinished)
    os.replace(unfinished, path)


@dataclass
class Shared:
    """What the CPU workers share."""

    gradients: torch.Tensor  # (workers, parameters)
    losses: torch.Tensor  # (workers,)
    weights: torch.Tensor  # fp32 masters
    taken: "mp.Value"  # micro-batches taken in this step
    barrier: "mp.Barrier"
    running: "mp.Value"


def starting_point(args: argparse.Namespace) -> dict:
    """The checkpoint of a killed run, else --init, else fresh weights."""
    path = args.work / "checkpoint.pt"
    sizes = {"width": args.width, "double": args.double, "single": args.single}
    if path.exists():
        stored = torch.load(path, map_location="cpu")
        if stored["sizes"] != sizes:
            raise SystemExit(f"{path} holds sizes {stored['sizes']}, asked for {sizes}: give another --work")
        return stored
    torch.manual_seed(args.seed)
    weights = flatten(load_transformer(args.init) if args.init else build_transformer(**sizes))
    return {"weights": weights, "ema": weights.clone(), "step": 0, "seen": 0, "elapsed": 0.0, "sizes": sizes}


class Trainer:
    """Optimiser, average, log and checkpoints: what happens once per step, whoever computed the gradient."""

    def __init__(
        self, args: argparse.Namespace, transformer: torch.nn.Module, weights: torch.Tensor, state: dict
    ):
        self.args, self.weights = args, weights
        self.ema = state["ema"].float().to(weights.device)
        self.optimizer = MuonAdamW(transformer, str(weights.device))
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seen, self.sizes = state["step"], state["seen"], state["sizes"]
        self.began = time.time() - state["elapsed"]
        self.logged = self.saved = time.time()
        self.logged_seen, self.losses = self.seen, []

    def update(self, gradient: torch.Tensor, loss: torch.Tensor) -> bool:
        """One step; False when the budget is spent."""
        args, elapsed = self.args, time.time() - self.began
        self.optimizer.step(
            self.weights, gradient, learning_rate(args, self.step, elapsed / (args.minutes * 60))
        )
        self.ema.lerp_(self.weights, 1 - min(args.ema, (1 + self.step) / (10 + self.step)))
        self.step, self.seen = self.step + 1, self.seen + args.batch
        self.losses.append(loss)
        go_on = elapsed < args.minutes * 60 and (args.max_steps is None or self.step < args.max_steps)
        now = time.time()
        if now - self.logged > 10 or not go_on:
            rate, mean = (
                (self.seen - self.logged_seen) / (now - self.logged),
                torch.stack(self.losses).mean().item(),
            )
            print(
                f"step {self.step} seen {self.seen} loss {mean:.4f} {rate:.1f} img/s {elapsed:.0f} s",
                flush=True,
            )
            self.logged, self.logged_seen, self.losses = now, self.seen, []
        if now - self.saved > args.save_seconds or not go_on:
            self.saved = now
            contents = {"weights": self.weights, "ema": self.ema, "optimizer": self.optimizer.state_dict()}
            contents |= {"step": self.step, "seen": self.seen, "elapsed": elapsed, "sizes": self.sizes}
            save(args.work / "checkpoint.pt", contents)
        return go_on


def gradient_of(transformer: torch.nn.Module) -> torch.Tensor:
    parts = (torch.zeros_like(p) if p.grad is None else p.grad for p in transformer.parameters())
    return torch.cat([part.float().flatten() for part in parts])


def cpu_worker(rank: int, args: argparse.Namespace, shared: Shared, state: dict) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(args.seed + 1000 * rank + state["step"])
    rng = random.Random(f"{args.seed} {rank} {state['step']}")
    encoders = FrozenEncoders(args.work)
    transformer = build_transformer(**state["sizes"])
    trainer = Trainer(args, transformer, shared.weights, state) if rank == 0 else None
    use_bmm_attention(transformer)
    transformer.bfloat16()  # whole weights: autocast gives no speed-up on a CPU
    if args.compile:
        for blocks in (transformer.transformer_blocks, transformer.single_transformer_blocks):
            for block in blocks:
                block.compile(dynamic=False)
    while shared.running.value:
        unflatten(shared.weights, transformer)
        transformer.zero_grad(set_to_none=True)
        shared.losses[rank] = 0
        while True:
            with shared.taken.get_lock():
                if shared.taken.value * args.micro >= args.batch:
                    break
                shared.taken.value += 1
            loss = (
                flow_loss(transformer, make_batch(encoders, rng, args.micro), torch.bfloat16).sum()
                / args.batch
            )
            loss.backward()
            shared.losses[rank] += loss.item()
        shared.gradients[rank] = gradient_of(transformer)
        shared.barrier.wait()
        if trainer:
            shared.taken.value = 0
            shared.running.value = trainer.update(shared.gradients.sum(0), shared.losses.sum())
        shared.barrier.wait()  # nobody reads the weights before they are updated


def train_on_cpu(args: argparse.Namespace, state: dict) -> None:
    size = len(state["weights"])
    shared = Shared(
        gradients=torch.zeros(args.workers, size).share_memory_(),
        losses=torch.zeros(args.workers).share_memory_(),
        weights=state["weights"].clone().share_memory_(),
        taken=mp.get_context("spawn").Value("i", 0),
        barrier=mp.get_context("spawn").Barrier(args.workers),
        running=mp.get_context("spawn").Value("b", True),
    )
    mp.spawn(cpu_worker, (args, shared, state), args.workers)


def chunks(work: Path, seed: str) -> Iterator[list[np.ndarray]]:
    """What a worker process delivers."""
    encoders, rng = FrozenEncoders(work), random.Random(seed)
    while True:
        batch = make_batch(encoders, rng, 128)
        yield [p.half().numpy() for p in (batch.clean, batch.txt, batch.pooled, batch.weight)]


def train_on_gpu(args: argparse.Namespace, state: dict) -> None:
    """A pool of samples on the device, refreshed as fast as the renderers can, drawn from at random."""
    seed = f"{args.seed} {state['step']}"
    pool = Pool(partial(chunks, args.work), seed, args.workers, args.pool, args.device)
    torch.manual_seed(args.seed + state["step"])
    torch.set_float32_matmul_precision("high")
    transformer = build_transformer(**state["sizes"])
    weights = state["weights"].to(args.device)
    trainer = Trainer(args, transformer, weights, state)
    transformer.to(args.device, torch.bfloat16)
    run = torch.compile(transformer, dynamic=False) if args.compile else transformer
    go_on = True
    while go_on:
        batch = Batch(*(part.float() for part in pool.draw(args.batch)))
        unflatten(weights, transformer)
        transformer.zero_grad(set_to_none=True)
        try:
            loss = flow_loss(run, batch, torch.bfloat16).mean()
        except Exception as error:  # a missing compiler must not cost a lent GPU
            if run is transformer:
                raise
            print(f"torch.compile failed ({type(error).__name__}), going on without it", flush=True)
            run = transformer
            continue
        loss.backward()
        go_on = trainer.update(gradient_of(transformer), loss.detach())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("work/tiny"))
    parser.add_argument("--init", type=Path, help="start from the averaged weights of this checkpoint")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument(
        "--width", type=int, default=96, help="a multiple of 32; 128 makes a folder of about 16 MB"
    )
    parser.add_argument("--double", type=int, default=6)
    parser.add_argument("--single", type=int, default=12)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--micro", type=int, default=12, help="samples per micro-batch of a CPU worker")
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--pool", type=int, default=400_000, help="samples kept on the GPU, 15 KB each")
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--decay", type=float, default=0.4)
    parser.add_argument("--save-seconds", type=float, default=120)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    state = starting_point(args)
    print(
        f"from step {state['step']}, {len(state['weights']) / 1e6:.2f} M parameters, {args.device}",
        flush=True,
    )
    (train_on_cpu if args.device == "cpu" else train_on_gpu)(args, state)


if __name__ == "__main__":
    main()
