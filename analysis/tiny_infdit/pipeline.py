"""The small Inf-DiT as a diffusers pipeline: a picture in, the same four times as large out.

pipe = InfDiTPipeline.from_pretrained("assets/tiny_infdit")
large = pipe(Image.open("small.png")).images[0]
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from analysis.drawing.families import in_colour
from analysis.tiny_infdit.model import DiffusionEngine, enlarge
from h2cache.engines.infdit import Evaluations, Upscaler

SMALLEST, LARGEST = 16, 512  # sides of a picture to enlarge, in pixels


class InfDiTPipeline(DiffusionPipeline):
    """Enlarges a picture four times."""

    model_cpu_offload_seq = "model"

    def __init__(self, model: DiffusionEngine) -> None:
        super().__init__()
        self.register_modules(model=model)
        self.upscaler = Upscaler(model)

    @property
    def transformer(self) -> torch.nn.Module:
        return self.upscaler.transformer

    @property
    def scheduler(self) -> Evaluations:
        return self.upscaler.scheduler

    @property
    def num_timesteps(self) -> int:
        """Evaluations of the newest call: two for each of Heun's steps but the last, which has one."""
        return len(self.scheduler.timesteps)

    def check_picture(self, image: Image.Image) -> None:
        """ValueError for a size that the model does not take."""
        side, (width, height) = self.model.small_block, image.size
        if width % side or height % side or not SMALLEST <= min(image.size) <= max(image.size) <= LARGEST:
            raise ValueError(
                f"the picture is {width}x{height}: this model enlarges sides of {SMALLEST} to {LARGEST} "
                f"pixels that are multiples of {side}; crop or scale it"
            )

    def __call__(
        self,
        image: Image.Image,
        num_inference_steps: int = 20,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[..., Any] | None = None,
    ) -> ImagePipelineOutput:
        """The enlarged picture.

        num_inference_steps: of Heun's sampler. callback_on_step_end: called after each evaluation with this
        pipeline, its number, its time and {}. output_type: "pil", or a tensor in [-1, 1] for anything else.
        """
        self.check_picture(image)
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps}: one at least is needed")
        device = self._execution_device
        pixels = torch.from_numpy(np.array(in_colour(image))).to(device)
        small = pixels.permute(2, 0, 1)[None].float() / 127.5 - 1
        large, numbers = enlarge(small), count()

        def evaluated() -> None:
            bar.update()
            if callback_on_step_end:
                step = next(numbers)
                callback_on_step_end(self, step, self.scheduler.timesteps[step], {})

        with self.progress_bar(total=2 * num_inference_steps - 1) as bar:
            found = self.upscaler(
                tuple(large.shape),
                images=large,
                lr_imgs=small,
                num_steps=num_inference_steps,
                noise=randn_tensor(large.shape, generator, device),
                evaluated=evaluated,
            )
        if output_type != "pil":
            return ImagePipelineOutput(images=found)
        levels = ((found[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
        return ImagePipelineOutput(images=[Image.fromarray(levels.cpu().numpy())])
