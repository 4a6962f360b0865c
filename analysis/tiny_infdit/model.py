"""A small Inf-DiT of our own, written after the specification; the names of its weights are the authors'.

The model of arXiv 2405.04312 without what a cache never meets: text, the modes ar and ar2.
Checked against the authors' code by `tests/engines/test_infdit_real.py`, where that is at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

SIGMA_DATA, RHO = 0.5, 7
PATCH, LR_PATCH, SCALE = 4, 2, 4


class Norm(nn.LayerNorm):
    def __init__(self, width: int, affine: bool = False) -> None:
        super().__init__(width, eps=1e-6, elementwise_affine=affine)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, tokens, heads, d) each."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def rotate(x: Tensor, ids: Tensor) -> Tensor:
    """2D rotary positions: x (B, N, heads, d), ids (B, N, 2) rows and columns."""
    half = x.shape[-1] // 2
    rates = 10000.0 ** -(torch.arange(0, half, 2, device=x.device).float() / half)
    angles = (ids[..., None].float() * rates).flatten(2).repeat_interleave(2, dim=-1).unsqueeze(2)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return x * angles.cos().to(x.dtype) + turned * angles.sin().to(x.dtype)


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_key_value, self.dense = nn.Linear(width, 3 * width), nn.Linear(width, width)


class CrossAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.dense = nn.Linear(width, width)


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense_h_to_4h, self.dense_4h_to_h = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh"))


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(width), Norm(width)
        self.attention, self.mlp = Attention(width), Mlp(width)


class BaseTransformer(nn.Module):
    """As SwissArmyTransformer's: its layers are not called, but its hook for each of them."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.hooks: dict[str, Callable] = {}

    def forward(self, input_ids, position_ids, attention_mask, **kwargs):
        hidden_states = self.hooks["word_embedding_forward"](input_ids, **kwargs)
        for i, _ in enumerate(self.layers):
            hidden_states = self.hooks["layer_forward"](
                hidden_states, attention_mask, layer_id=torch.tensor(i), **kwargs
            )
        outputs = [{} for _ in self.layers]  # of each layer, empty here
        return [self.hooks["final_forward"](hidden_states, **kwargs), *outputs]


class AdaLNMixin(nn.Module):
    """The layers' forward: block attention, and cross attention to the low-resolution picture in layer 0."""

    def __init__(self, layers: nn.ModuleList, width: int, heads: int, block: int) -> None:
        super().__init__()
        depth, head = len(layers), width // heads
        self._layers = [layers]  # not a second time among the weights
        self.attend = attend
        self.heads, self.block, self.lr_block = heads, block, block * PATCH // SCALE // LR_PATCH
        self.q_layer_norm = nn.ModuleList(Norm(head, True) for _ in range(depth))
        self.k_layer_norm = nn.ModuleList(Norm(head, True) for _ in range(depth))  # never used by the authors
        self.adaLN_modulations = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(width, 4 * width)) for _ in range(depth)
        )
        self.re_pos_embed = nn.Parameter(torch.randn(depth, 4, heads, head) * 0.1)
        self.proj_lr = nn.Conv2d(3, width, LR_PATCH, LR_PATCH)
        self.cross_attention = CrossAttention(width)
        self.post_cross_attention_layernorm = Norm(width, True)
        self.lr_query_position_embedding = nn.Parameter(torch.randn(1, block**2, heads, head) * 0.02)
        keys = (3 * self.lr_block) ** 2
        self.lr_key_position_embedding = nn.Parameter(torch.randn(1, keys, heads, head) * 0.02)
        self.cross_q_ln, self.cross_k_ln = Norm(head, True), Norm(head, True)

    def process_lr(self, lr_imgs: Tensor) -> Tensor:
        """For each block of the picture the tokens of the 3x3 blocks around it: (B blocks, tokens, C)."""
        tokens, b = self.proj_lr(lr_imgs), self.lr_block
        around = F.unfold(tokens, kernel_size=3 * b, stride=b, padding=b)
        return around.unflatten(1, (tokens.shape[1], -1)).permute(0, 3, 2, 1).flatten(0, 1)

    def blocks_of(self, x: Tensor, hw: tuple[int, int]) -> Tensor:
        """(B, H W, heads, d) as (B, rows, columns, tokens, heads, d)."""
        b = self.block
        x = x.unflatten(1, (hw[0] // b, b, hw[1] // b, b)).transpose(2, 3)
        return x.flatten(3, 4)

    def picture_of(self, x: Tensor, batch: int, hw: tuple[int, int]) -> Tensor:
        """(B rows columns, tokens, heads, d) as (B, H W, C)."""
        b = self.block
        x = x.reshape(batch, hw[0] // b, hw[1] // b, b, b, -1).transpose(2, 3)
        return x.flatten(1, 4)

    def layer_forward(self, hidden_states, mask, *, layer_id, emb, hw, lr_imgs, rope_position_ids, **_):
        i = int(layer_id)
        layer, x = self._layers[0][i], hidden_states
        shift_a, scale_a, shift_m, scale_m = self.adaLN_modulations[i](emb).chunk(4, dim=1)
        x = x + self.attention(layer.attention, i, modulate(layer.input_layernorm(x), shift_a, scale_a),
                               hw, rope_position_ids)  # fmt: skip
        normed = layer.post_attention_layernorm(x)
        if i == 0:
            x = x + self.cross(normed, hw, lr_imgs)
            normed = self.post_cross_attention_layernorm(x)
        return x + layer.mlp(modulate(normed, shift_m, scale_m))

    def attention(self, layer: Attention, i: int, x: Tensor, hw: tuple[int, int], ids: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in layer.query_key_value(x).chunk(3, dim=-1))
        norm = self.q_layer_norm[i]  # of keys too, as in the authors' code
        q, k, v = (self.blocks_of(part, hw) for part in (rotate(norm(q), ids), rotate(norm(k), ids), v))
        k, v = with_neighbours(k), with_neighbours(v)
        q, k, v = (part.flatten(0, 2) for part in (q, k, v))
        k.unflatten(1, (4, -1)).add_(self.re_pos_embed[i].unsqueeze(1))  # of each place, to all its tokens
        return layer.dense(self.picture_of(self.attend(q, k, v), len(x), hw))

    def cross(self, x: Tensor, hw: tuple[int, int], lr_imgs: Tensor) -> Tensor:
        layer = self.cross_attention
        q = self.blocks_of(layer.query(x).unflatten(-1, (self.heads, -1)), hw).flatten(0, 2)
        k, v = (part.unflatten(-1, (self.heads, -1)) for part in layer.key_value(lr_imgs).chunk(2, dim=-1))
        q = self.cross_q_ln(q) + self.lr_query_position_embedding
        k = self.cross_k_ln(k) + self.lr_key_position_embedding
        return layer.dense(self.picture_of(self.attend(q, k, v), len(x), hw))


def with_neighbours(x: Tensor) -> Tensor:
    """Of each block the tokens of itself, left-top, left and top as the authors stack them.

    At a border its own row or column stands in. x: (B, rows, columns, tokens, heads, d).
    """
    rows, columns = x.shape[1:3]
    here = torch.arange(rows * columns, device=x.device).reshape(rows, columns)
    above = torch.cat([here[:1], here[:-1]])
    left, corner = (torch.cat([y[:, :1], y[:, :-1]], dim=1) for y in (here, above))
    order = torch.stack([here, corner, left, above], dim=-1).flatten()
    return x.flatten(1, 2).index_select(1, order).unflatten(1, (rows, columns, 4)).flatten(3, 4)


class FinalLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_final, self.linear = Norm(width), nn.Linear(width, PATCH * PATCH * 3)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def final_forward(self, logits: Tensor, *, emb, hw, **_) -> Tensor:
        x = self.linear(modulate(self.norm_final(logits), *self.adaLN_modulation(emb).chunk(2, dim=1)))
        x = x.unflatten(1, tuple(hw)).unflatten(-1, (PATCH, PATCH, 3))  # (B, h, w, p, p, 3)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class PatchEmbed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(6, width, PATCH, PATCH)

    def word_embedding_forward(self, input_ids, *, images, **_) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class TimeEmbedding(nn.Module):
    def __init__(self, width: int, channels: int = 192) -> None:
        super().__init__()
        self.channels = channels
        self.mlp = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, c_noise: Tensor) -> Tensor:
        places = torch.arange(self.channels // 2, device=c_noise.device)
        angles = c_noise[:, None].float() * 1e-4 ** (places / (self.channels // 2))
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.mlp[0].weight.dtype))


class Sampler:
    """The levels of EDM."""

    num_steps = 20

    def __init__(self, high: float, low: float) -> None:
        self.levels = high, low

    def discretization(self, n: int, device: str = "cpu") -> Tensor:
        high, low = (level ** (1 / RHO) for level in self.levels)
        sigmas = torch.linspace(high, low, n, device=device) ** RHO
        return torch.cat([sigmas, sigmas.new_zeros(1)])


class DiffusionEngine(ModelMixin, ConfigMixin):
    """The whole model.

    width: of a token, a multiple of 4 times `heads`. depth: layers. block: side of a block of attention, in
    tokens of 4x4 pixels; pictures have whole blocks. high, low: the first and last noise level.
    """

    @register_to_config
    def __init__(
        self,
        width: int = 16,
        depth: int = 6,
        heads: int = 2,
        block: int = 4,
        high: float = 40.0,
        low: float = 0.002,
    ) -> None:
        super().__init__()
        self.transformer, self.sampler = BaseTransformer(width, depth), Sampler(high, low)
        self.mixins = nn.ModuleDict(
            {
                "adaln_layer": AdaLNMixin(self.transformer.layers, width, heads, block),
                "final_layer": FinalLayer(width),
                "patch_embed": PatchEmbed(width),
            }
        )
        self.time_embed = TimeEmbedding(width)

    @property
    def small_block(self) -> int:
        """Side of a block in the low-resolution picture, in pixels."""
        return self.config.block * PATCH // SCALE

    def precond_forward(
        self,
        images: Tensor,
        sigmas: Tensor,
        concat_lr_imgs: Tensor,
        lr_imgs: Tensor,
        rope_position_ids: Tensor,
    ) -> Tensor:
        """The denoised picture, D(x, sigma)."""
        sigma = sigmas[:, None, None, None]
        root = (sigma**2 + SIGMA_DATA**2).sqrt()
        out = self.network(images / root, sigmas, concat_lr_imgs / root, lr_imgs, rope_position_ids)
        return out * sigma * SIGMA_DATA / root + images * SIGMA_DATA**2 / root**2

    def network(
        self,
        images: Tensor,
        sigmas: Tensor,
        concat_lr_imgs: Tensor,
        lr_imgs: Tensor,
        rope_position_ids: Tensor,
    ) -> Tensor:
        """The transformer's own output, F, for pictures that are scaled already."""
        emb = F.silu(self.time_embed(sigmas.log() / 4))
        ones = torch.ones(1, 1)
        self.transformer.hooks.clear()  # at each call, as SwissArmyTransformer's BaseModel
        self.transformer.hooks |= {
            "word_embedding_forward": self.mixins["patch_embed"].word_embedding_forward,
            "layer_forward": self.mixins["adaln_layer"].layer_forward,
            "final_forward": self.mixins["final_layer"].final_forward,
        }
        out, *_ = self.transformer(
            input_ids=ones,
            position_ids=ones,
            attention_mask=ones,
            images=torch.cat([images, concat_lr_imgs], dim=1).to(emb.dtype),
            sigmas=sigmas.log() / 4,
            emb=emb,
            hw=[side // PATCH for side in images.shape[2:]],
            lr_imgs=self.mixins["adaln_layer"].process_lr(lr_imgs.to(emb.dtype)),
            rope_position_ids=rope_position_ids,
            direction="lt",
        )
        return out.to(images.dtype)

    @torch.no_grad()
    def sample(
        self,
        shape: tuple[int, ...],
        images: Tensor,
        lr_imgs: Tensor,
        num_steps: int | None = None,
        noise: Tensor | None = None,
        evaluated: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Heun's sampler; images: the enlarged low-resolution picture; evaluated: called after each call."""
        ids = positions(shape[2] // PATCH, shape[3] // PATCH, len(images)).to(images.device)
        sigmas = self.sampler.discretization(num_steps or self.sampler.num_steps).to(images.device)
        x = images + sigmas[0] * (torch.randn_like(images) if noise is None else noise)

        def slope(x: Tensor, sigma: Tensor) -> Tensor:
            denoised = self.precond_forward(x, sigma.expand(len(x)), images, lr_imgs, ids)
            evaluated()
            return (x - denoised) / sigma

        for here, after in pairwise(sigmas):
            d = slope(x, here)
            guess = x + (after - here) * d
            x = guess if not after else x + (after - here) * (d + slope(guess, after)) / 2
        return x


def positions(height: int, width: int, batch: int) -> Tensor:
    """Row and column of each token, (B, height width, 2)."""
    grid = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack(grid, dim=-1).reshape(1, -1, 2).expand(batch, -1, -1)


def enlarge(small: Tensor) -> Tensor:
    """Low-resolution pictures, (B, 3, h, w), four times as large by bicubic interpolation."""
    return F.interpolate(small, scale_factor=SCALE, mode="bicubic")
