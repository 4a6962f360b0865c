"""The AutoencoderKLWan of the fixed latent space: a decoder latents -> clip, an encoder clip -> latents.

    python -m analysis.tiny_wan.vae --out work/wan --minutes 30             # a killed run goes on
    python -m analysis.tiny_wan.vae --out work/wan --device cuda --workers 4 --batch 48

The decoder sees latents with a little noise, as the transformer will hand it. 32-pixel crops for the first
three quarters, whole pictures after; Muon on the decoder's kernels, as for tiny_flux. Two levels and a
patch of 2 pixels, as in Wan 2.2's VAE, keep the finest level a quarter as large.
"""

import argparse
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

from analysis.sample_pool import Pool, captured
from analysis.tiny_flux.train import save
from analysis.tiny_flux.vae import muon_step, psnr
from analysis.tiny_wan.clips import render, sample_spec
from analysis.tiny_wan.latents import CHANNELS, GROUP, PATCH, to_latent

CROP = 4  # latents per side
CHUNK = 16  # clips that a worker process delivers at once


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


def load_vae(checkpoint: Path) -> AutoencoderKLWan:
    """The averaged weights of a training checkpoint."""
    vae = build_vae()
    vae.load_state_dict(torch.load(checkpoint, map_location="cpu")["average"])
    return vae.eval()


def rendered(rng: random.Random, count: int) -> np.ndarray:
    return np.stack([render(sample_spec(rng), rng) for _ in range(count)])


def chunks(seed: str) -> Iterator[list[np.ndarray]]:
    """What a worker process delivers."""
    rng = random.Random(seed)
    while True:
        yield [rendered(rng, CHUNK)]


def batches(args: argparse.Namespace, rng: random.Random) -> Callable[[], torch.Tensor]:
    """A function that gives the next clips, uint8: drawn by this process, or from a pool on the device."""
    if not args.workers:
        return lambda: torch.from_numpy(rendered(rng, args.batch)).to(args.device)
    pool = Pool(chunks, f"{args.seed} {rng.random()}", args.workers, args.pool, args.device)
    return lambda: pool.draw(args.batch, 1)[0]


def with_latents(clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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
    clips, latents = with_latents(torch.from_numpy(rendered(random.Random(9), 16)).to(vae.device))
    decoded = psnr(vae.decode(latents).sample, clips)
    again = psnr(vae.decode(vae.encode(clips).latent_dist.mode()).sample, clips)
    print(f"decoder {decoded:.2f} dB, encode and decode {again:.2f} dB", flush=True)


def precision(device: torch.device) -> torch.autocast | nullcontext:
    """On a GPU the convolutions are too small to gain by bfloat16: TF32."""
    return nullcontext() if device.type == "cuda" else torch.autocast("cpu", torch.bfloat16)


def decoder_step(
    vae: AutoencoderKLWan, weights: list[torch.Tensor], clips: torch.Tensor, latents: torch.Tensor
) -> list[torch.Tensor]:
    """Squared error, then the gradients of `weights`."""
    noise = 0.12 * torch.rand(len(latents), 1, 1, 1, 1, device=latents.device) * torch.randn_like(latents)
    with precision(latents.device):
        drawn = decode(vae, latents + noise).float()
    error = (drawn.detach().clamp(-1, 1) - clips).pow(2).mean()
    return [error, *torch.autograd.grad(clip_loss(drawn, clips), weights)]


def encoder_step(
    vae: AutoencoderKLWan, weights: list[torch.Tensor], clips: torch.Tensor, latents: torch.Tensor
) -> list[torch.Tensor]:
    with precision(latents.device):
        mean, log_variance = vae._encode(clips).float().chunk(2, 1)
    loss = (mean - latents).pow(2).mean() + 0.01 * (log_variance + 8).pow(2).mean()
    vae.clear_cache()
    return list(torch.autograd.grad(loss, weights))


def by_shape(compute: Callable[..., list[torch.Tensor]], graph: bool) -> Callable[..., list[torch.Tensor]]:
    """`compute` itself, or a CUDA graph of it for every shape it is called with."""
    graphs: dict[torch.Size, Callable] = {}

    def run(*inputs: torch.Tensor) -> list[torch.Tensor]:
        if inputs[0].shape not in graphs:
            graphs[inputs[0].shape] = captured(compute, inputs)
        return graphs[inputs[0].shape](*inputs)

    return run if graph else compute


def clipped(weights: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    torch.nn.utils.clip_grad_norm_(weights, 1.0)


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    stored, file = {}, args.out / "vae_checkpoint.pt"
    if file.exists():
        stored = torch.load(file, map_location="cpu")
    step, spent = stored.get("step", 0), stored.get("spent", 0.0)
    rng = random.Random(f"{args.seed} {step}")
    draw = batches(args, rng)  # first: the workers start while this goes on
    vae = build_vae().train()
    if stored:
        vae.load_state_dict(stored["weights"])
    vae.to(args.device)
    decoding = [*vae.decoder.named_parameters(), *vae.post_quant_conv.named_parameters()]
    kernels = [p for name, p in decoding if is_kernel(name, p)]
    momenta = [torch.zeros_like(kernel) for kernel in kernels]
    others = [p for name, p in decoding if not is_kernel(name, p)]
    decoding = [p for _, p in decoding]
    encoding = [*vae.encoder.parameters(), *vae.quant_conv.parameters()]
    adam_decoder = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=1e-4)
    adam_encoder = torch.optim.AdamW(encoding, betas=(0.9, 0.98))
    average = {name: value.clone() for name, value in vae.state_dict().items()}
    if stored:
        average = {name: value.to(args.device) for name, value in stored["average"].items()}
        momenta = [momentum.to(args.device) for momentum in stored["momenta"]]
        adam_decoder.load_state_dict(stored["adam_decoder"])
        adam_encoder.load_state_dict(stored["adam_encoder"])
    decoder_gradients = by_shape(partial(decoder_step, vae, decoding), args.graph)
    encoder_gradients = by_shape(partial(encoder_step, vae, encoding), args.graph)
    began, saved, errors, go_on, asked_to_stop = time.time() - spent, time.time(), [], True, []
    budget = args.until - began if args.until else 60 * args.minutes
    signal.signal(signal.SIGTERM, lambda *_: asked_to_stop.append(True))  # kill PID: saves, then ends
    while go_on:
        done = (time.time() - began) / budget
        rate = args.lr * min(1, (step + 1) / 50) * min(1, max(0.0, 2 * (1 - done)))
        clips = draw()
        if done < 0.75:
            clips, latents = cropped(*with_latents(clips), rng)
        else:
            clips, latents = with_latents(clips[: max(1, args.batch // 4)])
        for optimizer in (adam_decoder, adam_encoder):
            optimizer.param_groups[0]["lr"] = rate
        error, *gradients = decoder_gradients(clips, latents)
        errors.append(error.clone())
        clipped(decoding, gradients)
        adam_decoder.step()
        muon_step(kernels, momenta, rate)
        if step % 4 == 0:  # the pipeline never encodes: the encoder gets a quarter of the work
            clipped(encoding, encoder_gradients(clips, latents))
            adam_encoder.step()
        step += 1
        share = 1 - min(0.995, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.values()), list(vae.state_dict().values()), share)
        if step % 100 == 0:
            quality = (10 * torch.log10(4 / torch.stack(errors))).mean()  # waits for the device
            print(f"step {step} {quality:.2f} dB {time.time() - began:.0f} s", flush=True)
            errors = []
        go_on = done < 1 and not asked_to_stop and (args.max_steps is None or step < args.max_steps)
        if time.time() - saved > args.save_seconds or not go_on:
            saved = time.time()
            contents = {"weights": vae.state_dict(), "average": average, "momenta": momenta, "step": step}
            contents |= {"adam_decoder": adam_decoder.state_dict(), "adam_encoder": adam_encoder.state_dict()}
            save(file, contents | {"spent": saved - began})
            if args.export:
                save(args.export, {"average": average, "step": step})
    vae.load_state_dict(average)
    report(vae.eval())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("work/wan"))
    parser.add_argument("--minutes", type=float, default=30, help="of training in all, resumed runs included")
    parser.add_argument("--until", type=float, help="end then, seconds since 1970, whatever --minutes says")
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--save-seconds", type=float, default=60)
    parser.add_argument("--export", type=Path, help="the averaged weights alone, written at every save")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw clips; 0: this one does")
    parser.add_argument("--pool", type=int, default=20_000, help="clips kept on the device, 0.2 MB each")
    parser.add_argument("--no-graph", dest="graph", action="store_false", help="on a GPU, no CUDA graph")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.graph = args.graph and torch.device(args.device).type == "cuda"
    train(args)


if __name__ == "__main__":
    main()
