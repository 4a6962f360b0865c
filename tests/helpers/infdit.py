"""A small Inf-DiT of our own, written after the specification; the names of its weights are the authors'.

The model of arXiv 2405.04312 without what a cache never meets: training, text, the modes ar and ar2.
Checked against the authors' code by `tests/engines/test_infdit_real.py`, where that is at hand.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from h2cache.engines.infdit import Upscaler

SIGMA_DATA, LEVELS, RHO = 0.5, (40.0, 0.002), 7
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
    rates = 10000.0 ** -(torch.arange(0, half, 2).float() / half)
    angles = (ids[..., None].float() * rates).flatten(2).repeat_interleave(2, dim=-1).unsqueeze(2)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * angles.cos() + torch.stack([-second, first], dim=-1).flatten(-2) * angles.sin()


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
        k = k + self.re_pos_embed[i].repeat_interleave(self.block**2, dim=0)
        return layer.dense(self.picture_of(attend(q, k, v), len(x), hw))

    def cross(self, x: Tensor, hw: tuple[int, int], lr_imgs: Tensor) -> Tensor:
        layer = self.cross_attention
        q = self.blocks_of(layer.query(x).unflatten(-1, (self.heads, -1)), hw).flatten(0, 2)
        k, v = (part.unflatten(-1, (self.heads, -1)) for part in layer.key_value(lr_imgs).chunk(2, dim=-1))
        q = self.cross_q_ln(q) + self.lr_query_position_embedding
        k = self.cross_k_ln(k) + self.lr_key_position_embedding
        return layer.dense(self.picture_of(attend(q, k, v), len(x), hw))


def with_neighbours(x: Tensor) -> Tensor:
    """Of each block the tokens of itself, left-top, left and top as the authors stack them.

    At a border its own row or column stands in.
    """
    above = torch.cat([x[:, :1], x[:, :-1]], dim=1)
    left, corner = (torch.cat([y[:, :, :1], y[:, :, :-1]], dim=2) for y in (x, above))
    return torch.cat([x, corner, left, above], dim=3)


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
        angles = c_noise[:, None] * 1e-4 ** (torch.arange(self.channels // 2) / (self.channels // 2))
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class Sampler:
    """The levels of EDM."""

    num_steps = 20

    def discretization(self, n: int, device: str = "cpu") -> Tensor:
        high, low = (level ** (1 / RHO) for level in LEVELS)
        sigmas = torch.linspace(high, low, n, device=device) ** RHO
        return torch.cat([sigmas, sigmas.new_zeros(1)])


class DiffusionEngine(nn.Module):
    """The whole model; block: side of a block of attention, in tokens of 4x4 pixels."""

    def __init__(self, width: int = 16, depth: int = 6, heads: int = 2, block: int = 4) -> None:
        super().__init__()
        self.transformer, self.sampler = BaseTransformer(width, depth), Sampler()
        self.mixins = nn.ModuleDict(
            {
                "adaln_layer": AdaLNMixin(self.transformer.layers, width, heads, block),
                "final_layer": FinalLayer(width),
                "patch_embed": PatchEmbed(width),
            }
        )
        self.time_embed = TimeEmbedding(width)

    def precond_forward(self, images, sigmas, concat_lr_imgs, lr_imgs, rope_position_ids) -> Tensor:
        """The denoised picture, D(x, sigma)."""
        sigma = sigmas[:, None, None, None]
        root = (sigma**2 + SIGMA_DATA**2).sqrt()
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
            images=torch.cat([images, concat_lr_imgs], dim=1) / root,
            sigmas=sigmas.log() / 4,
            emb=emb,
            hw=[side // PATCH for side in images.shape[2:]],
            lr_imgs=self.mixins["adaln_layer"].process_lr(lr_imgs),
            rope_position_ids=rope_position_ids,
            direction="lt",
        )
        return out * sigma * SIGMA_DATA / root + images * SIGMA_DATA**2 / root**2

    @torch.no_grad()
    def sample(self, shape, images, lr_imgs, num_steps=None, noise=None) -> Tensor:
        """Heun's sampler; images: the enlarged low-resolution picture."""
        height, width = (side // PATCH for side in shape[2:])
        rows = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), dim=-1)
        ids = rows.reshape(1, -1, 2).expand(len(images), -1, -1)
        sigmas = self.sampler.discretization(num_steps or self.sampler.num_steps)
        x = images + sigmas[0] * (torch.randn_like(images) if noise is None else noise)

        def slope(x: Tensor, sigma: Tensor) -> Tensor:
            denoised = self.precond_forward(x, sigma.expand(len(x)), images, lr_imgs, ids)
            return (x - denoised) / sigma

        for here, after in pairwise(sigmas):
            d = slope(x, here)
            guess = x + (after - here) * d
            x = guess if not after else x + (after - here) * (d + slope(guess, after)) / 2
        return x


def make_infdit(seed: int = 0, **sizes: int) -> DiffusionEngine:
    """One of random weights."""
    torch.manual_seed(seed)
    return DiffusionEngine(**sizes).eval().requires_grad_(False)


def picture(height: int = 32, width: int = 32, batch: int = 1, seed: int = 0) -> dict:
    """Arguments of `sample` for a low-resolution picture of a quarter of that size."""
    g = torch.Generator().manual_seed(seed)
    small = torch.rand(batch, 3, height // SCALE, width // SCALE, generator=g) * 2 - 1
    large = F.interpolate(small, scale_factor=SCALE, mode="bicubic")
    noise = torch.randn(large.shape, generator=g)
    return {"shape": tuple(large.shape), "images": large, "lr_imgs": small, "noise": noise}


class Evaluated(Upscaler):
    """Asked for a number of evaluations, of which Heun's n steps take 2 n - 1."""

    def __call__(self, num_inference_steps: int, generator=None, **kwargs) -> Tensor:
        return super().__call__(num_steps=(num_inference_steps + 1) // 2, **kwargs)
