"""The tiny Wan transformer, its first weights, and attention for training on a CPU."""

import math
from functools import lru_cache
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from analysis.tiny_flux.model import unflatten
from analysis.tiny_flux.optimizer import DECAY, MuonAdamW
from analysis.tiny_wan.latents import CHANNELS
from analysis.tiny_wan.text_encoder import WIDTH as TEXT_WIDTH

HEAD = 32
# Heads of the first two blocks look, at first, one token right, left, down, up, later, earlier.
EDGE_FINDERS = (((0, 0, 1), (0, 0, -1), (0, 1, 0), (0, -1, 0)), ((1, 0, 0), (-1, 0, 0)))
EDGE_WIDTHS = (10, 12)  # dimensions that each such head compares
SHARPNESS, FLAG = 8.0, 1.0


def build_transformer(width: int = 128, layers: int = 8, ffn: int = 512) -> WanTransformer3DModel:
    """The head starts at zero, the blocks nearly as identities, the first two as edge finders."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=width // HEAD,
        attention_head_dim=HEAD,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=128,
        ffn_dim=ffn,
        num_layers=layers,
        cross_attn_norm=True,
        rope_max_seq_len=64,
    )
    with torch.no_grad():
        for layer in (transformer.proj_out, transformer.condition_embedder.time_proj):
            layer.weight.zero_()
            layer.bias.zero_()
        for block in transformer.blocks:
            block.scale_shift_table.zero_()
            block.scale_shift_table[:, [2, 5]] = 0.1  # the gates; zero ones would pass no gradient back
            block.attn2.to_out[0].weight.mul_(0.1)
        if width == 128 and ffn == 512:
            find_edges(transformer)
    return transformer


def find_edges(transformer: WanTransformer3DModel) -> None:
    """First weights that know which tokens lie at an edge of the clip, even in pure noise.

    Wan tells no token where it is: cross-attention knows no place, and the rotary embedding of self-
    attention only distances. A tiny model hardly found out by itself: after 20,000 clips a linear read-out
    of place from its sixth block was right for 20, 32 and 29 % of tokens (frame, row, column; by chance 20,
    25, 25 %). So each head here copies some channels of the neighbour at one side; where there is none, it
    falls back on the token itself, the difference vanishes, and the feed-forward raises a flag: 54, 74 and
    73 % before any training.
    """
    width, source = transformer.config.num_attention_heads * HEAD, 4 * CHANNELS
    # The first rotary pair of each axis turns by one radian a token.
    pairs = (0, transformer.rope.t_dim, transformer.rope.t_dim + transformer.rope.h_dim)
    embedding = transformer.patch_embedding
    embedding.weight.zero_()
    embedding.bias.zero_()
    embedding.weight.view(width, -1)[:source] = torch.linalg.qr(torch.randn(source, source))[0]
    free = source  # the next unused dimension of the residual stream
    for block, steps, count, scale in zip(
        transformer.blocks, EDGE_FINDERS, EDGE_WIDTHS, (0.707, 1.26), strict=False
    ):
        attention, up, down = block.attn1, block.ffn.net[0].proj, block.ffn.net[2]
        for layer in (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]):
            layer.weight.zero_()
            layer.bias.zero_()
        attention.norm_q.weight.fill_(SHARPNESS)
        up.bias.zero_()
        down.bias.zero_()
        down.weight.mul_(0.1)
        for head in range(width // HEAD):
            step = steps[head] if head < len(steps) else (0, 0, 0)
            for pair, way in zip(pairs, step, strict=True):
                place = head * HEAD + pair
                attention.to_q.bias[place : place + 2] = 3 * torch.tensor([math.cos(way), math.sin(way)])
                attention.to_k.bias[place : place + 2] = torch.tensor([3.0, 0.0])
            if head >= len(steps):
                continue
            own, copied = torch.arange(16 * head, 16 * head + count), torch.arange(free, free + count)
            free += count
            channels = torch.arange(head * HEAD, head * HEAD + count)
            attention.to_v.weight[channels, own] = scale  # undoes the normalisation
            attention.to_out[0].weight[copied, channels] = 1.0
            units = slice(128 * head, 128 * (head + 1))
            some = 1.5 * torch.nn.functional.normalize(torch.randn(64, count), dim=1)
            some = torch.cat([some, -some])  # gelu(x) + gelu(-x) grows with |x|
            up.weight[units] = 0
            up.weight[units, own[0] : own[-1] + 1] = some
            up.weight[units, copied[0] : copied[-1] + 1] = -some
            flag = FLAG * math.sqrt(width) * torch.nn.functional.normalize(torch.randn(width), dim=0)
            down.weight[:, units] = flag[:, None] / 128
            down.bias -= 0.8 * flag
        block.scale_shift_table[:, [2, 5]] = 1.0
        block.attn2.to_out[0].weight.zero_()
        block.attn2.to_out[0].bias.zero_()


class WanMuon(MuonAdamW):
    """MuonAdamW that knows which parameters of a Wan are block matrices."""

    def __init__(self, transformer: torch.nn.Module, device: str = "cpu") -> None:
        super().__init__(transformer, device)  # finds no block matrix: tiny_flux's are called differently
        start = 0
        chosen = torch.ones(len(self.decayed), dtype=torch.bool)
        for name, parameter in transformer.named_parameters():
            place = slice(start, start + parameter.numel())
            start = place.stop
            if parameter.ndim == 2 and name.startswith("blocks."):
                self.groups[tuple(parameter.shape)].append(place)
                self.decayed[place] = DECAY
                chosen[place] = False
        self.adam = chosen.nonzero()[:, 0].to(device)
        self.first, self.second = (torch.zeros(len(self.adam), device=device) for _ in range(2))


def load_transformer(checkpoint: Path) -> WanTransformer3DModel:
    """The averaged weights of a training checkpoint."""
    stored = torch.load(checkpoint, map_location="cpu")
    transformer = build_transformer(**stored["sizes"])
    unflatten(stored["ema"], transformer)
    return transformer.eval()


@lru_cache
def pair_swap(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Multiplying by it from the right turns the pairs (a, b) into (-b, a)."""
    return torch.block_diag(*[torch.tensor([[0.0, 1.0], [-1.0, 0.0]])] * (size // 2)).to(device, dtype)


class BmmAttention:
    """WanAttnProcessor's maths with fewer passes, and plain products on a CPU, where bf16 SDPA is slow."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(source))
        query, key, value = (t.unflatten(-1, (attn.heads, -1)) for t in (query, key, attn.to_v(source)))
        if rotary_emb is not None:
            cos, sin = (part.to(query.dtype) for part in rotary_emb)  # (1, tokens, 1, 32), every value twice
            swap = pair_swap(
                query.shape[-1], query.dtype, query.device
            )  # a product: strided reads are slow in bf16
            query, key = query * cos + (query @ swap) * sin, key * cos + (key @ swap) * sin
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))  # (B, heads, tokens, 32)
        if query.is_cuda:
            mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        else:
            scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
            mixed = torch.softmax(scores, -1) @ value
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))


def use_bmm_attention(transformer: WanTransformer3DModel) -> None:
    for block in transformer.blocks:
        block.attn1.processor = block.attn2.processor = BmmAttention()
