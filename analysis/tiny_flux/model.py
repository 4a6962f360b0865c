"""The tiny FLUX transformer, its weights as one flat vector, and attention for training on a CPU."""

import math
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel

from analysis.tiny_flux.latents import CHANNELS
from analysis.tiny_flux.text_encoders import CLIP_WIDTH, T5_WIDTH

HEAD = 32


def build_transformer(width: int = 96, double: int = 6, single: int = 12) -> FluxTransformer2DModel:
    """adaLN outputs and the head start at zero: every block starts as the identity."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * CHANNELS,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=HEAD,
        num_attention_heads=width // HEAD,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    )
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if ("norm" in name and "linear" in name) or name.startswith("proj_out"):
                parameter.zero_()
    return transformer


def flatten(transformer: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().float().flatten() for p in transformer.parameters()])


@torch.no_grad()
def unflatten(weights: torch.Tensor, transformer: torch.nn.Module) -> None:
    """Copies the flat vector into the parameters, whatever their dtype."""
    start = 0
    for parameter in transformer.parameters():
        parameter.copy_(weights[start : start + parameter.numel()].view_as(parameter))
        start += parameter.numel()


def load_transformer(checkpoint: Path) -> FluxTransformer2DModel:
    """The averaged weights of a training checkpoint."""
    stored = torch.load(checkpoint, map_location="cpu")
    transformer = build_transformer(**stored["sizes"])
    unflatten(stored["ema"], transformer)
    return transformer.eval()


class BmmAttention:
    """FluxAttnProcessor's maths as plain products: bf16 SDPA's backward takes 37 % of a CPU step."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ):
        def heads(projection, states):
            return projection(states).unflatten(-1, (attn.heads, -1))

        query, key, value = (heads(p, hidden_states) for p in (attn.to_q, attn.to_k, attn.to_v))
        query, key = attn.norm_q(query), attn.norm_k(key)
        if encoder_hidden_states is not None:
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            txt_query, txt_key, txt_value = (heads(p, encoder_hidden_states) for p in added)
            query = torch.cat([attn.norm_added_q(txt_query), query], 1)  # (B, txt + img, heads, 32)
            key = torch.cat([attn.norm_added_k(txt_key), key], 1)
            value = torch.cat([txt_value, value], 1)
        cos, sin = (part[None, :, None, 0::2].to(query.dtype) for part in image_rotary_emb)

        def rotate(states):
            real, imaginary = states.unflatten(-1, (-1, 2)).unbind(-1)
            turned = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)
            return turned.flatten(-2).transpose(1, 2)  # (B, heads, tokens, 32)

        scores = rotate(query) @ rotate(key).transpose(-1, -2) / math.sqrt(query.shape[-1])
        mixed = (torch.softmax(scores, -1) @ value.transpose(1, 2)).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return mixed
        count = encoder_hidden_states.shape[1]
        img, txt = mixed[:, count:].contiguous(), mixed[:, :count].contiguous()
        return attn.to_out[0](img), attn.to_add_out(txt)


def use_bmm_attention(transformer: FluxTransformer2DModel) -> None:
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        block.attn.processor = BmmAttention()
