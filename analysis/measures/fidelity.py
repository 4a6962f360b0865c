"""How like the uncached image a cached one is, and how good it is by itself.

Fidelity by torchmetrics in float64 on [0, 1]: in float32 identical images give an SSIM below 1. A metric that
cannot be had (too small an image, weights that are not there) is null with the reason, never 0.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

CLIP = "openai/clip-vit-large-patch14"
MS_SSIM_SIDE = 176  # five scales of an 11-pixel window need more than 175 pixels


def to_tensor(image: Image.Image) -> torch.Tensor:
    """(1, 3, H, W) float64 in [0, 1]."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), np.float64) / 255).permute(2, 0, 1)[None]


def fidelity(image: Image.Image, uncached: Image.Image) -> dict[str, float | bool | None]:
    """PSNR in dB and SSIM of `image` against `uncached`; identical images have no PSNR (null), SSIM 1."""
    # here, because it loads matplotlib: a second at the start of every command
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    x, y = to_tensor(image), to_tensor(uncached)
    if torch.equal(x, y):
        return {"psnr": None, "ssim": 1.0, "identical": True}
    return {
        "psnr": round(peak_signal_noise_ratio(x, y, data_range=1.0).item(), 3),
        "ssim": round(structural_similarity_index_measure(x, y, data_range=1.0).item(), 5),
        "identical": False,
    }


def more_fidelity(image: Image.Image, uncached: Image.Image) -> dict[str, float | None]:
    """MS-SSIM (null below 176 pixels), GMSD and, where the package `lpips` is installed, LPIPS."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    x, y = to_tensor(image), to_tensor(uncached)
    large = min(image.size) >= MS_SSIM_SIDE
    lpips = lpips_model()
    return {
        "ms_ssim": multiscale_structural_similarity_index_measure(x, y, data_range=1.0).item()
        if large
        else None,
        "gmsd": round(gmsd(x, y).item(), 6),
        "lpips": lpips(x.float() * 2 - 1, y.float() * 2 - 1).item() if lpips else None,
    }


def gmsd(x: torch.Tensor, y: torch.Tensor, constant: float = 170 / 255**2) -> torch.Tensor:
    """Gradient magnitude similarity deviation of (N, 3, H, W) images in [0, 1]: (N,), 0 for identical ones.

    Xue et al., IEEE TIP 2014: Prewitt gradients of the luminance at half size, deviation of their similarity.
    """
    weights = x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    prewitt = x.new_tensor([[1.0, 0.0, -1.0]] * 3) / 3
    kernels = torch.stack([prewitt, prewitt.T])[:, None]

    def gradient(image: torch.Tensor) -> torch.Tensor:
        luminance = F.avg_pool2d((image * weights).sum(1, keepdim=True), 2)
        return F.conv2d(luminance, kernels, padding=1).square().sum(1).sqrt()

    gx, gy = gradient(x), gradient(y)
    similarity = (2 * gx * gy + constant) / (gx.square() + gy.square() + constant)
    return similarity.flatten(1).std(1, correction=0)


@lru_cache
def lpips_model():
    """LPIPS (AlexNet) of the package `lpips`; None where it or its weights are not there."""
    try:
        import lpips

        return lpips.LPIPS(net="alex", verbose=False).eval()
    except (ImportError, OSError):  # the package; its weights, which it downloads (a URLError is an OSError)
        return None


class ClipIqa:
    """CLIP-IQA with ViT-L/14: how much nearer an image is to "Good photo." than to "Bad photo.".

    Wang et al., AAAI 2023, on another backbone; the authors of H2-Cache use torchmetrics with this one. The
    model's own processor resizes the image to 224 pixels.
    """

    name = "clip_iqa_vitl14"

    def __init__(self, model: str | None = None) -> None:
        """model: folder, or hub id that may be downloaded; None: CLIP if it is in the hub's cache.

        Raises OSError with the command to get it when it cannot be had.
        """
        from transformers import CLIPModel, CLIPProcessor

        path, local = model or CLIP, model is None
        try:
            self.model = CLIPModel.from_pretrained(path, local_files_only=local, use_safetensors=True).eval()
            self.processor = CLIPProcessor.from_pretrained(path, local_files_only=local)
        except (OSError, ValueError) as error:
            raise OSError(
                f"no CLIP weights in {path} ({type(error).__name__}): `hf download {CLIP} --local-dir DIR`, "
                "then --clip DIR"
            ) from None
        prompts = self.processor(text=["Good photo.", "Bad photo."], return_tensors="pt", padding=True)
        with torch.inference_mode():
            self.texts = self._unit(self.model.get_text_features(**prompts))

    @staticmethod
    def _unit(features) -> torch.Tensor:
        """Rows of length 1; transformers 5 wraps them in an output object."""
        tensor = features if torch.is_tensor(features) else features.pooler_output
        return F.normalize(tensor.float(), dim=-1)

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> float:
        """The score in [0, 1]."""
        pixels = self.processor(images=[image.convert("RGB")], return_tensors="pt")["pixel_values"]
        features = self._unit(self.model.get_image_features(pixel_values=pixels))
        return (100 * features @ self.texts.T).softmax(-1)[0, 0].item()
