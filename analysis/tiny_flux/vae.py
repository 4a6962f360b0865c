"""The AutoencoderKL of the fixed latent space: a decoder latent -> image, an encoder image -> latent.

    python -m analysis.tiny_flux.vae --out work/tiny --minutes 24             # a killed run goes on
    python -m analysis.tiny_flux.vae --out work/tiny --init assets/tiny_flux/vae --minutes 6

The decoder sees latents with a little noise, as the transformer will hand it. 64-pixel crops for the first
three
quarters, whole pictures after; Muon on the decoder's kernels is far ahead of AdamW alone.
"""

import argparse
import math
import os
import random
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from analysis.tiny_flux.latents import CHANNELS, PATCH, to_latent
from analysis.tiny_flux.optimizer import orthogonalise
from analysis.tiny_flux.signs import render, sample_spec
from analysis.tiny_flux.train import save

CROP = 8  # latents per side


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(8, 16, 32, 64),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=1,  # with 8 channels a level, several groups would normalise colour away
        sample_size=128,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def is_kernel(name: str, parameter: torch.Tensor) -> bool:
    return parameter.ndim == 4 and "conv_out" not in name and min(parameter.flatten(1).shape) >= 8


@torch.no_grad()
def muon_step(kernels: list[torch.Tensor], momenta: list[torch.Tensor], rate: float) -> None:
    for kernel, momentum in zip(kernels, momenta, strict=True):
        momentum.mul_(0.95).add_(kernel.grad)
        update = orthogonalise((kernel.grad + 0.95 * momentum).flatten(1)[None])[0]
        kernel.mul_(1 - rate * 0.01).sub_(
            update.view_as(kernel), alpha=rate * 0.2 * math.sqrt(max(update.shape))
        )


def picture_loss(drawn: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """L1 of the pixels and of their differences, so that edges stay sharp."""
    error = drawn - wanted
    return error.abs().mean() + 0.5 * (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean())


def batch_of(rng: random.Random, count: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.from_numpy(np.stack([render(sample_spec(rng), rng) for _ in range(count)])).to(device)
    return (images.float() / 127.5 - 1).permute(0, 3, 1, 2).contiguous(), to_latent(images)


def cropped(
    pictures: torch.Tensor, latents: torch.Tensor, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    row, column = (rng.randrange(latents.shape[-1] - CROP + 1) for _ in range(2))
    top, left, side = row * PATCH, column * PATCH, CROP * PATCH
    inner = latents[:, :, row : row + CROP, column : column + CROP]
    return pictures[:, :, top : top + side, left : left + side].contiguous(), inner.contiguous()


def psnr(drawn: torch.Tensor, wanted: torch.Tensor) -> float:
    return 10 * math.log10(4 / (drawn.clamp(-1, 1) - wanted).pow(2).mean().item())


@torch.no_grad()
def report(vae: AutoencoderKL, device: str) -> None:
    pictures, latents = batch_of(random.Random(9), 24, device)
    decoded = psnr(vae.decode(latents).sample, pictures)
    again = psnr(vae.decode(vae.encode(pictures).latent_dist.mode()).sample, pictures)
    print(f"decoder {decoded:.2f} dB, encode and decode {again:.2f} dB", flush=True)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    vae = AutoencoderKL.from_pretrained(args.init).float() if args.init else build_vae()
    vae = vae.to(args.device).train()
    named = list(vae.decoder.named_parameters())
    kernels = [p for name, p in named if is_kernel(name, p)]
    momenta = [torch.zeros_like(kernel) for kernel in kernels]
    others = [p for name, p in named if not is_kernel(name, p)]
    adam_decoder = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=1e-4)
    adam_encoder = torch.optim.AdamW(vae.encoder.parameters(), betas=(0.9, 0.98))
    average = {name: value.clone() for name, value in vae.state_dict().items()}
    step, spent, file = 0, 0.0, args.out / "vae_checkpoint.pt"
    if file.exists():
        stored = torch.load(file, map_location=args.device)
        vae.load_state_dict(stored["weights"])
        average, momenta, step, spent = (stored[key] for key in ("average", "momenta", "step", "spent"))
        adam_decoder.load_state_dict(stored["adam_decoder"])
        adam_encoder.load_state_dict(stored["adam_encoder"])
    report(vae, args.device)
    rng = random.Random(f"{args.seed} {step}")
    began = saved = time.time()
    began -= spent
    kind = torch.device(args.device).type
    while (done := (time.time() - began) / 60 / args.minutes) < 1:
        rate = args.lr * min(1, (step + 1) / 50) * min(1, 2 * (1 - done))
        pictures, latents = batch_of(rng, args.batch, args.device)
        if done < 0.75:
            pictures, latents = cropped(pictures, latents, rng)
        for optimizer in (adam_decoder, adam_encoder):
            optimizer.param_groups[0]["lr"] = rate
        with torch.autocast(kind, torch.bfloat16):
            noise = 0.12 * torch.rand(len(latents), 1, 1, 1, device=args.device) * torch.randn_like(latents)
            drawn = vae.decode(latents + noise).sample.float()
        vae.decoder.zero_grad()
        picture_loss(drawn, pictures).backward()
        torch.nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        adam_decoder.step()
        muon_step(kernels, momenta, rate)
        if step % 4 == 0:  # the pipeline never encodes: the encoder gets a quarter of the work
            with torch.autocast(kind, torch.bfloat16):
                mean, log_variance = vae.encoder(pictures).float().chunk(2, 1)
            vae.encoder.zero_grad()
            ((mean - latents).pow(2).mean() + 0.01 * (log_variance + 8).pow(2).mean()).backward()
            torch.nn.utils.clip_grad_norm_(vae.encoder.parameters(), 1.0)
            adam_encoder.step()
        step += 1
        for name, value in vae.state_dict().items():
            average[name].lerp_(value, 1 - min(0.995, (1 + step) / (10 + step)))
        if step % 100 == 0:
            print(
                f"step {step} {psnr(drawn.detach(), pictures):.2f} dB {time.time() - began:.0f} s", flush=True
            )
        if time.time() - saved > 60:
            saved = time.time()
            contents = {"weights": vae.state_dict(), "average": average, "momenta": momenta, "step": step}
            contents |= {"adam_decoder": adam_decoder.state_dict(), "adam_encoder": adam_encoder.state_dict()}
            save(file, contents | {"spent": saved - began})
    vae.load_state_dict(average)
    report(vae.eval(), args.device)
    vae.half().save_pretrained(args.out / "vae")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("work/tiny"))
    parser.add_argument("--init", help="start from the AutoencoderKL in this folder")
    parser.add_argument("--minutes", type=float, default=24)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    os.makedirs(args.out, exist_ok=True)
    train(args)


if __name__ == "__main__":
    main()
