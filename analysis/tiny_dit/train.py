"""Train the class-to-picture transformer: noise prediction on varied training digits, one CPU core.

    OMP_NUM_THREADS=1 python -m analysis.tiny_dit.train --work work/dit --minutes 35   # killed: goes on

--work holds vae (from `analysis.tiny_dit.vae`); checkpoint.pt and pool.pt (latents) go there.
"""

import argparse
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor

from analysis.tiny_dit import digits
from analysis.tiny_dit.vae import CHANNELS, FACTOR, encode
from analysis.tiny_flux.model import flatten, unflatten
from analysis.tiny_flux.optimizer import MuonAdamW
from analysis.tiny_flux.train import gradient_of, save

NULL = 1000  # the class DiTPipeline asks for as "no class"; it is written into the pipeline
HEAD, PATCH = 16, 2
MOST_WEIGHT = 30.0  # see noise_loss


def scheduler() -> DDIMScheduler:
    """DiT-XL-2's own."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
        prediction_type="epsilon",
    )


def build_transformer(width: int = 64, layers: int = 10) -> DiTTransformer2DModel:
    """adaLN outputs and the head start at zero, and so do the class rows, but 0 to 9 and NULL."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=width // HEAD,
        attention_head_dim=HEAD,
        in_channels=CHANNELS,
        out_channels=CHANNELS,  # said, because the pipeline divides it by 2 to find a learned variance
        num_layers=layers,
        sample_size=digits.SIDE // FACTOR,
        patch_size=PATCH,
        num_embeds_ada_norm=NULL,
    )
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "embedding_table" in name:
                parameter.zero_()
                parameter[[*range(digits.CLASSES), NULL]] = 0.02 * torch.randn(digits.CLASSES + 1, width)
            elif "norm1.linear" in name or name.startswith("proj_out"):
                parameter.zero_()
    return transformer.eval()  # in training mode every block would drop the class by its own coin


def load_transformer(checkpoint: Path) -> DiTTransformer2DModel:
    """The averaged weights of a training checkpoint."""
    stored = torch.load(checkpoint, map_location="cpu")
    transformer = build_transformer(**stored["sizes"])
    unflatten(stored["ema"], transformer)
    return transformer


def make_pool(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of every training digit, varied --copies times (the first time as it is), and their classes."""
    stored = args.work / "pool.pt"
    if stored.is_file():
        return torch.load(stored)
    vae = AutoencoderKL.from_pretrained(args.work / "vae")
    train_set, _ = digits.load()
    generator = torch.Generator().manual_seed(args.seed)
    pool = [encode(vae, train_set.pictures)]
    for _ in range(args.copies - 1):
        pool.append(encode(vae, digits.vary(train_set.pictures, generator)))
    found = torch.cat(pool), train_set.labels.repeat(args.copies)
    save(stored, found)
    return found


def learning_rate(args: argparse.Namespace, step: int, progress: float) -> float:
    """Up in 100 steps, down to 0 in the last part."""
    return args.lr * min(1.0, (step + 1) / 100, max(0.0, (1 - progress) / args.decay))


def noise_loss(
    transformer: DiTTransformer2DModel, clean: torch.Tensor, labels: torch.Tensor, alphas: torch.Tensor
) -> torch.Tensor:
    """Squared error of the noise at uniform times, a tenth of the classes dropped, weighted by 1 / alpha.

    Unweighted, noisy times count for little, as there almost all of the input is the noise asked for; but the
    class is decided there. The weight makes the error one of velocity, up to a bound.
    """
    time_step = torch.randint(len(alphas), (len(clean),))
    alpha = alphas[time_step].view(-1, 1, 1, 1)
    noise = torch.randn_like(clean)
    noisy = (alpha.sqrt() * clean + (1 - alpha).sqrt() * noise).to(transformer.dtype)
    asked = torch.where(torch.rand(len(labels)) < 0.1, NULL, labels)
    guess = transformer(noisy, timestep=time_step, class_labels=asked).sample
    weights = (1 / alphas).clamp(max=MOST_WEIGHT)
    error = (guess.float() - noise).pow(2).mean(dim=(1, 2, 3))
    return (error * weights[time_step]).mean() / weights.mean()


def starting_point(args: argparse.Namespace) -> dict:
    stored, sizes = args.work / "checkpoint.pt", {"width": args.width, "layers": args.layers}
    if stored.is_file():
        state = torch.load(stored)
        if state["sizes"] != sizes:
            raise SystemExit(f"{stored} has sizes {state['sizes']}, asked for {sizes}")
        return state
    torch.manual_seed(args.seed)
    weights = flatten(build_transformer(**sizes))
    return {"weights": weights, "ema": weights.clone(), "step": 0, "elapsed": 0.0, "sizes": sizes}


def train(args: argparse.Namespace) -> None:
    pool, labels = make_pool(args)
    state = starting_point(args)
    weights, ema, step, sizes = state["weights"], state["ema"], state["step"], state["sizes"]
    transformer, alphas = build_transformer(**sizes), scheduler().alphas_cumprod
    optimizer = MuonAdamW(transformer)
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
    for block in transformer.transformer_blocks:
        block.attn1.set_processor(AttnProcessor())  # plain products: twice as fast in bf16 on a CPU
    transformer.bfloat16()
    torch.manual_seed(args.seed + 1 + step)
    print(f"from step {step}, {len(weights) / 1e6:.2f} M parameters, {len(pool)} latents", flush=True)
    began, saved, logged, go_on, losses = time.time() - state["elapsed"], time.time(), time.time(), True, []
    while go_on:
        unflatten(weights, transformer)
        transformer.zero_grad(set_to_none=True)
        chosen = torch.randint(len(pool), (args.batch,))
        loss = noise_loss(transformer, pool[chosen], labels[chosen], alphas)
        loss.backward()
        elapsed = time.time() - began
        rate = learning_rate(args, step, elapsed / (60 * args.minutes))
        optimizer.step(weights, gradient_of(transformer), rate)
        ema.lerp_(weights, 1 - min(args.ema, (1 + step) / (10 + step)))
        step += 1
        losses.append(loss.item())
        go_on = elapsed < 60 * args.minutes and (args.max_steps is None or step < args.max_steps)
        now = time.time()
        if len(losses) == 200 or not go_on:
            speed = len(losses) * args.batch / (now - logged)
            mean = sum(losses) / len(losses)
            print(f"step {step} loss {mean:.4f} {speed:.0f} img/s {elapsed:.0f} s", flush=True)
            logged, losses = now, []
        if now - saved > args.save_seconds or not go_on:
            saved = now
            contents = {"weights": weights, "ema": ema, "optimizer": optimizer.state_dict()}
            save(args.work / "checkpoint.pt", contents | {"step": step, "elapsed": elapsed, "sizes": sizes})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("work/dit"))
    parser.add_argument("--minutes", type=float, default=35, help="of training in all, over all starts")
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--width", type=int, default=64, help=f"a multiple of {HEAD}")
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--copies", type=int, default=24, help="of every digit in the pool, varied")
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--decay", type=float, default=0.4, help="part of the time in which the rate falls")
    parser.add_argument("--save-seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args(argv))


if __name__ == "__main__":
    main()
