"""The AutoencoderKLWan of the fixed latent space: a decoder latents -> clip, an encoder clip -> latents.

    python -m analysis.tiny_wan.vae --out work/wan --minutes 30             # a killed run goes on

The decoder sees latents with a little noise, as the transformer will hand it. 32-pixel crops for the
first three
quarters, whole pictures after; Muon on the decoder's kernels, as for tiny_flux. Two levels and a patch of 2
pixels, as in Wan 2.2's VAE, keep the finest level a quarter as large.
"""

import argparse
import os
import random
import signal
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

from analysis.tiny_flux.train import save
from analysis.tiny_flux.vae import muon_step, psnr
from analysis.tiny_wan.clips import render, sample_spec
from analysis.tiny_wan.latents import CHANNELS, GROUP, PATCH, to_latent

CROP = 4  # latents per side


def build_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * CHANNELS,  # the fixed space is normalised already
        latents_std=[1.0] * CHANNELS,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """AutoencoderKLWan.decode without its clamp, which would stop gradients."""
    vae.clear_cache()
    states, chunks = vae.post_quant_conv(latents), []
    for i in range(states.shape[2]):
        vae._conv_idx = [0]
        chunk = states[:, :, i : i + 1]
        chunks.append(
            vae.decoder(chunk, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0)
        )
    vae.clear_cache()
    return unpatchify(torch.cat(chunks, 2), patch_size=vae.config.patch_size)


def is_kernel(name: str, parameter: torch.Tensor) -> bool:
    return parameter.ndim >= 4 and "conv_out" not in name and min(parameter.flatten(1).shape) >= 8


def clip_loss(drawn: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """L1 of the values and of their differences in time and space: sharp edges, still grounds."""
    error = drawn - wanted  # (B, 3, 17, H, W)
    return error.abs().mean() + 0.4 * sum(error.diff(dim=axis).abs().mean() for axis in (2, 3, 4))


def batch_of(rng: random.Random, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    clips = torch.from_numpy(np.stack([render(sample_spec(rng), rng) for _ in range(count)]))
    return (clips.float() / 127.5 - 1).permute(0, 4, 1, 2, 3).contiguous(), to_latent(clips)


def cropped(
    clips: torch.Tensor, latents: torch.Tensor, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """A window in space, and mostly only the first 9 frames: the decoder's memory is full by then."""
    row, column = (rng.randrange(latents.shape[-1] - CROP + 1) for _ in range(2))
    top, left, side = row * PATCH, column * PATCH, CROP * PATCH
    late = 3 if rng.random() < 0.75 else latents.shape[2]
    inner = latents[:, :, :late, row : row + CROP, column : column + CROP]
    frames = clips[:, :, : 1 + GROUP * (late - 1), top : top + side, left : left + side]
    return frames.contiguous(), inner.contiguous()


@torch.no_grad()
def report(vae: AutoencoderKLWan) -> None:
    clips, latents = batch_of(random.Random(9), 16)
    decoded = psnr(vae.decode(latents).sample, clips)
    again = psnr(vae.decode(vae.encode(clips).latent_dist.mode()).sample, clips)
    print(f"decoder {decoded:.2f} dB, encode and decode {again:.2f} dB", flush=True)


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    vae = build_vae().train()
    decoding = [*vae.decoder.named_parameters(), *vae.post_quant_conv.named_parameters()]
    kernels = [p for name, p in decoding if is_kernel(name, p)]
    momenta = [torch.zeros_like(kernel) for kernel in kernels]
    others = [p for name, p in decoding if not is_kernel(name, p)]
    encoding = [*vae.encoder.parameters(), *vae.quant_conv.parameters()]
    adam_decoder = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=1e-4)
    adam_encoder = torch.optim.AdamW(encoding, betas=(0.9, 0.98))
    average = {name: value.clone() for name, value in vae.state_dict().items()}
    step, spent, file = 0, 0.0, args.out / "vae_checkpoint.pt"
    if file.exists():
        stored = torch.load(file, map_location="cpu")
        vae.load_state_dict(stored["weights"])
        average, momenta, step, spent = (stored[key] for key in ("average", "momenta", "step", "spent"))
        adam_decoder.load_state_dict(stored["adam_decoder"])
        adam_encoder.load_state_dict(stored["adam_encoder"])
    rng = random.Random(f"{args.seed} {step}")
    began, saved, scores, go_on, asked_to_stop = time.time() - spent, time.time(), [], True, []
    signal.signal(signal.SIGTERM, lambda *_: asked_to_stop.append(True))  # kill PID: saves, then ends
    while go_on:
        done = (time.time() - began) / 60 / args.minutes
        rate = args.lr * min(1, (step + 1) / 50) * min(1, max(0.0, 2 * (1 - done)))
        clips, latents = batch_of(rng, args.batch)
        clips, latents = cropped(clips, latents, rng) if done < 0.75 else (clips[:2], latents[:2])
        for optimizer in (adam_decoder, adam_encoder):
            optimizer.param_groups[0]["lr"] = rate
        noise = 0.12 * torch.rand(len(latents), 1, 1, 1, 1) * torch.randn_like(latents)
        with torch.autocast("cpu", torch.bfloat16):
            drawn = decode(vae, latents + noise).float()
        vae.zero_grad()
        clip_loss(drawn, clips).backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in decoding], 1.0)
        adam_decoder.step()
        muon_step(kernels, momenta, rate)
        if step % 4 == 0:  # the pipeline never encodes: the encoder gets a quarter of the work
            vae.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                mean, log_variance = vae._encode(clips).float().chunk(2, 1)
            ((mean - latents).pow(2).mean() + 0.01 * (log_variance + 8).pow(2).mean()).backward()
            torch.nn.utils.clip_grad_norm_(encoding, 1.0)
            adam_encoder.step()
        step += 1
        scores.append(psnr(drawn.detach(), clips))
        for name, value in vae.state_dict().items():
            average[name].lerp_(value, 1 - min(0.995, (1 + step) / (10 + step)))
        if step % 100 == 0:
            print(f"step {step} {np.mean(scores):.2f} dB {time.time() - began:.0f} s", flush=True)
            scores = []
        go_on = done < 1 and not asked_to_stop
        if time.time() - saved > 60 or not go_on:
            saved = time.time()
            contents = {"weights": vae.state_dict(), "average": average, "momenta": momenta, "step": step}
            contents |= {"adam_decoder": adam_decoder.state_dict(), "adam_encoder": adam_encoder.state_dict()}
            save(file, contents | {"spent": saved - began})
    vae.load_state_dict(average)
    report(vae.eval())
    vae.save_pretrained(args.out / "vae")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("work/wan"))
    parser.add_argument("--minutes", type=float, default=30, help="of training in all, resumed runs included")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
