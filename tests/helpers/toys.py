"""Small models that every test can afford: a FLUX of random weights, and calls of the embedded one."""

import torch
from diffusers import FluxTransformer2DModel

TINY = "assets/tiny_flux"
PROMPT = 'a red round sign that says "CAFE" on a striped green background'


def make_flux(double: int = 3, single: int = 4, seed: int = 0) -> FluxTransformer2DModel:
    """A FLUX transformer of random weights, 32 wide."""
    torch.manual_seed(seed)
    model = FluxTransformer2DModel(
        in_channels=8,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return model.eval()


def make_inputs(
    batch: int = 1, tokens: int = 16, text: int = 5, seed: int = 0, timestep: float = 1.0
) -> dict:
    """Arguments of one forward call of `make_flux`'s model."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.zeros(tokens, 3)
    ids[:, 2] = torch.arange(tokens)
    return {
        "hidden_states": torch.randn(batch, tokens, 8, generator=g),
        "encoder_hidden_states": torch.randn(batch, text, 12, generator=g),
        "pooled_projections": torch.randn(batch, 10, generator=g),
        "timestep": torch.full((batch,), timestep),
        "guidance": torch.full((batch,), 3.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3),
    }


def denoise(model, steps: int = 6, branch: str | None = "cond", inputs: dict | None = None, **extra) -> list:
    """A denoising loop as a pipeline drives it; returns the transformer's output at every step."""
    inputs = dict(inputs or make_inputs())
    latents, outputs = inputs.pop("hidden_states"), []
    for n in range(steps):
        call = inputs | extra | {"timestep": torch.full((latents.shape[0],), 1 - n / steps)}
        with torch.no_grad():
            if branch is None:
                out = model(hidden_states=latents, **call).sample
            else:
                with model.cache_context(branch):
                    out = model(hidden_states=latents, **call).sample
        outputs.append(out)
        latents = latents - out / steps
    return outputs


def standing_still(model, calls: list[dict], branch: str = "cond") -> list:
    """The outputs at falling timesteps, of which the model sees the first only: nothing changes by itself.

    A cache must have been enabled before.
    """

    def stand_still(module, args, kwargs):
        return args, kwargs | {"timestep": torch.ones_like(kwargs["timestep"])}

    held, outputs = model.register_forward_pre_hook(stand_still, with_kwargs=True), []
    for n, inputs in enumerate(calls):
        timestep = torch.full_like(inputs["timestep"], 1 - n / len(calls))
        with torch.no_grad(), model.cache_context(branch):
            outputs.append(model(**inputs | {"timestep": timestep}).sample)
    held.remove()
    return outputs


def generate(pipeline, prompt=PROMPT, steps: int = 8, seed: int = 0, **kwargs) -> torch.Tensor:
    """Latents of `prompt` (a string, or a list: the n-th sample then has seed + n)."""
    many = isinstance(prompt, list)
    generators = [torch.Generator().manual_seed(seed + n) for n in range(len(prompt) if many else 1)]
    settings = {"height": 128, "width": 128, "max_sequence_length": 24, "output_type": "latent"} | kwargs
    return pipeline(
        prompt, num_inference_steps=steps, generator=generators if many else generators[0], **settings
    ).images
