"""The AutoencoderKL: 64x64 grey pictures (as RGB) to 4 channels of 16x16 and back.

    python -m analysis.tiny_dit.vae --out work/dit --minutes 8      # started again: goes on until 8 in all

Writes --out/vae (a diffusers folder) and --out/vae.pt (to go on from). The decoder learns from latents with a
little noise, as the transformer will hand it; a small KL term keeps the latents near a normal distribution.
"""

import argparse
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from analysis.tiny_dit import digits
from analysis.tiny_flux.train import save
from analysis.tiny_flux.vae import is_kernel, muon_step, picture_loss

CHANNELS, FACTOR = 4, 4
NOISE = 0.1  # largest standard deviation beside that of the latents
KL = 1e-4  # weight beside the picture loss


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(8, 16, 24),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=1,
        sample_size=digits.SIDE,
        scaling_factor=1.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def rgb(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.expand(-1, 3, -1, -1)


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: torch.Tensor, batch: int = 64) -> torch.Tensor:
    """Scaled latents (N, 4, 16, 16), the means of the posterior."""
    found = [vae.encode(rgb(part)).latent_dist.mode() for part in pictures.split(batch)]
    return torch.cat(found) * vae.config.scaling_factor


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: torch.Tensor) -> float:
    """Decibels of encoding and decoding, peak 2, from the mean squared error over all pictures."""
    drawn = torch.cat([vae.decode(vae.encode(rgb(p)).latent_dist.mode()).sample for p in pictures.split(64)])
    return (10 * torch.log10(4 / (drawn - pictures).pow(2).mean())).item()


def loss_of(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    posterior = vae.encode(rgb(pictures)).latent_dist
    latents = posterior.sample()
    noise = torch.rand(len(latents), 1, 1, 1) * NOISE * latents.detach().std()
    drawn = vae.decode(latents + noise * torch.randn_like(latents)).sample
    return picture_loss(drawn, rgb(pictures)) + KL * posterior.kl().mean() / latents[0].numel()


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    train_set, held = digits.load()
    vae, step, elapsed = build_vae(), 0, 0.0
    kernels = [p for name, p in vae.named_parameters() if is_kernel(name, p)]
    rest = [p for name, p in vae.named_parameters() if not is_kernel(name, p)]
    momenta = [torch.zeros_like(p) for p in kernels]
    adam = torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0)
    stored = args.out / "vae.pt"
    if stored.is_file():
        state = torch.load(stored)
        vae.load_state_dict(state["vae"])
        adam.load_state_dict(state["adam"])
        momenta, step, elapsed = state["momenta"], state["step"], state["elapsed"]
    generator = torch.Generator().manual_seed(args.seed + step)
    began, saved, go_on, losses = time.time() - elapsed, time.time(), True, []
    while go_on:
        chosen = torch.randint(len(train_set), (args.batch,), generator=generator)
        loss = loss_of(vae, digits.vary(train_set.pictures[chosen], generator))
        loss.backward()
        elapsed = time.time() - began
        rate = args.lr * min(1.0, (step + 1) / 50, 2.5 * max(0.0, 1 - elapsed / (60 * args.minutes)))
        muon_step(kernels, momenta, rate)
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
        vae.zero_grad()
        step += 1
        losses.append(loss.item())
        go_on = elapsed < 60 * args.minutes and (args.max_steps is None or step < args.max_steps)
        if step % 100 == 0:
            print(f"step {step} loss {sum(losses) / len(losses):.4f} {elapsed:.0f} s", flush=True)
            losses = []
        if time.time() - saved > 60 or not go_on:
            saved = time.time()
            state = {"vae": vae.state_dict(), "adam": adam.state_dict(), "momenta": momenta}
            save(stored, state | {"step": step, "elapsed": elapsed})
    latents = encode(vae, train_set.pictures)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    channels = ", ".join(f"{value:.2f}" for value in encode(vae, train_set.pictures).std(dim=(0, 2, 3)))
    vae.eval().save_pretrained(args.out / "vae")
    print(f"{step} steps, held-out pictures {psnr(vae, held.pictures):.2f} dB, deviations {channels}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("work/dit"))
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    train(args)


if __name__ == "__main__":
    main()
