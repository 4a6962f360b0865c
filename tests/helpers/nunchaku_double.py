"""A stand-in for nunchaku's FLUX classes: the same names, signatures and orders, over plain float32 blocks.

Written from the signatures, without quantization: what an engine of h2cache relies on, and no more.
`test_nunchaku_real.py` compares it with the real package where that can be imported.
"""

from __future__ import annotations

import math
from collections import Counter

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

CONFIG = {
    "in_channels": 8,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}


class QuantizedFluxModel:
    """The compiled handle: `log` holds the executed blocks in order, `calls` how often each method came."""

    def __init__(self, double: nn.ModuleList, single: nn.ModuleList) -> None:
        self.double, self.single = double, single
        self.log: list[tuple[str, int]] = []
        self.calls: Counter = Counter()
        self.returned: list[torch.Tensor] = []
        self.callback = None

    def isBF16(self):
        return True

    def reset(self):
        self.calls["reset"] += 1

    def loadDict(self, dict, partial=False):
        """As a LoRA: new values for parameters of blocks."""
        self.calls["loadDict"] += 1
        for name, value in dict.items():
            list_name, rest = name.split(".", 1)
            blocks = self.double if list_name == "transformer_blocks" else self.single
            blocks.get_parameter(rest).data.copy_(value)

    def setLoraScale(self, skipRanks, scale):
        self.calls["setLoraScale"] += 1

    def setAttentionImpl(self, name, attn_func):
        self.calls["setAttentionImpl"] += 1

    def set_residual_callback(self, callback):
        self.callback = callback

    def _run_double(self, index, img, txt, temb, rot_img, rot_txt):
        self.log.append(("double", index))
        rotary = torch.cat([rot_txt, rot_img], dim=1)  # (2, S + I, D): cosines and sines
        txt, img = self.double[index](img, txt, temb, (rotary[0], rotary[1]))
        return img, txt

    def _run_single(self, index, joint, temb, rotary):
        self.log.append(("single", index))
        return self.single[index](joint, joint[:, :0], temb, (rotary[0], rotary[1]))[1]

    def _control(self, samples, index, blocks):
        return samples[index // math.ceil(len(blocks) / len(samples))]

    def forward(
        self,
        hidden_states,
        encoder_hidden_states,
        temb,
        rotary_emb_img,
        rotary_emb_context,
        rotary_emb_single,
        controlnet_block_samples=None,
        controlnet_single_block_samples=None,
        skip_first_layer=False,
    ):
        self.calls["forward"] += 1
        img, txt = hidden_states, encoder_hidden_states
        for index in range(int(skip_first_layer), len(self.double)):
            img, txt = self._run_double(index, img, txt, temb, rotary_emb_img, rotary_emb_context)
            if controlnet_block_samples is not None:
                img = img + self._control(controlnet_block_samples, index, self.double)
            if self.callback is not None and index % 2 == 0:
                img = img + self.callback(img)
        joint = torch.cat([txt, img], dim=1)
        for index in range(len(self.single)):
            joint = self._run_single(index, joint, temb, rotary_emb_single)
            img = joint[:, txt.shape[1] :]
            if controlnet_single_block_samples is not None:
                img = img + self._control(controlnet_single_block_samples, index, self.single)
            if self.callback is not None and index % 4 == 0:
                img = img + self.callback(img)
            joint = torch.cat([joint[:, : txt.shape[1]], img], dim=1)
        return self._give(joint)

    def forward_layer(
        self,
        idx,
        hidden_states,
        encoder_hidden_states,
        temb,
        rotary_emb_img,
        rotary_emb_context,
        controlnet_block_samples=None,
        controlnet_single_block_samples=None,
    ):
        self.calls["forward_layer"] += 1
        img, txt = self._run_double(
            idx, hidden_states, encoder_hidden_states, temb, rotary_emb_img, rotary_emb_context
        )
        if controlnet_block_samples is not None:
            img = img + self._control(controlnet_block_samples, idx, self.double)
        return self._give(img), self._give(txt)

    def forward_single_layer(self, idx, hidden_states, temb, rotary_emb_single):
        self.calls["forward_single_layer"] += 1
        return self._give(self._run_single(idx, hidden_states, temb, rotary_emb_single))

    def norm_one_forward(self, idx, hidden_states, temb):
        self.calls["norm_one_forward"] += 1
        return tuple(self._give(t) for t in self.double[idx].norm1(hidden_states, emb=temb))

    def _give(self, tensor):
        self.returned.append(tensor)
        return tensor


class NunchakuFluxTransformerBlocks(nn.Module):
    """The wrapper: the only entry of V1's `transformer_blocks`."""

    def __init__(self, m, device):
        super().__init__()
        self.m, self.device = m, device

    def forward(
        self,
        hidden_states,
        temb,
        encoder_hidden_states,
        image_rotary_emb,
        id_embeddings=None,
        id_weight=None,
        joint_attention_kwargs=None,
        controlnet_block_samples=None,
        controlnet_single_block_samples=None,
        skip_first_layer=False,
    ):
        text = encoder_hidden_states.shape[1]
        self.id_embeddings, self.id_weight, self.pulid_ca_idx = id_embeddings, id_weight, 0
        if id_embeddings is not None:
            self.set_pulid_residual_callback()
        joint = self.m.forward(
            hidden_states,
            encoder_hidden_states,
            temb,
            image_rotary_emb[:, text:],
            image_rotary_emb[:, :text],
            image_rotary_emb,
            torch.stack(controlnet_block_samples) if controlnet_block_samples else None,
            torch.stack(controlnet_single_block_samples) if controlnet_single_block_samples else None,
            skip_first_layer,
        )
        if id_embeddings is not None:
            self.reset_pulid_residual_callback()
        return joint[:, :text], joint[:, text:]

    def set_pulid_residual_callback(self):
        number = self.pulid_ca_idx

        def callback(hidden_states):
            nonlocal number
            number += 1
            return self.id_weight * self.pulid_ca[number - 1](self.id_embeddings, hidden_states)

        self.callback_holder = callback
        self.m.set_residual_callback(callback)

    def reset_pulid_residual_callback(self):
        self.callback_holder = None
        self.m.set_residual_callback(None)

    def __del__(self):
        self.m.reset()

    def norm1(self, hidden_states, emb, idx=0):
        return self.m.norm_one_forward(idx, hidden_states, emb)


class _Embeds(FluxTransformer2DModel):
    """What both versions do before and after the blocks."""

    def forward(
        self,
        hidden_states,
        encoder_hidden_states=None,
        pooled_projections=None,
        timestep=None,
        img_ids=None,
        txt_ids=None,
        guidance=None,
        joint_attention_kwargs=None,
        controlnet_block_samples=None,
        controlnet_single_block_samples=None,
        return_dict=True,
        controlnet_blocks_repeat=False,
        **pulid,
    ):
        temb = self.time_text_embed(timestep * 1000, guidance * 1000, pooled_projections)
        hidden_states = self.run_blocks(
            self.x_embedder(hidden_states),
            self.context_embedder(encoder_hidden_states),
            temb,
            torch.stack(self.pos_embed(torch.cat([txt_ids, img_ids]))),
            controlnet_block_samples=controlnet_block_samples,
            controlnet_single_block_samples=controlnet_single_block_samples,
            **pulid,
        )
        output = self.proj_out(self.norm_out(hidden_states, temb))
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)


class NunchakuFluxTransformer2dModel(_Embeds):
    """V1: everything behind the handle. PuLID's forward takes `id_embeddings` and `id_weight` as well."""

    def run_blocks(self, img, txt, temb, rotary, **kwargs):
        return self.transformer_blocks[0](
            hidden_states=img, temb=temb, encoder_hidden_states=txt, image_rotary_emb=rotary, **kwargs
        )[1]


class NunchakuFluxSingleTransformerBlock(nn.Module):
    """V2's single block: one tensor in, one out."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
        return self.block(hidden_states, hidden_states[:, :0], temb, tuple(image_rotary_emb))[1]


class NunchakuFluxTransformer2DModelV2(_Embeds):
    """V2: block lists; no ControlNet."""

    def run_blocks(self, img, txt, temb, rotary, **controls):
        if any(control is not None for control in controls.values()):
            raise NotImplementedError("ControlNet")
        for block in self.transformer_blocks:
            txt, img = block(
                hidden_states=img, encoder_hidden_states=txt, temb=temb, image_rotary_emb=tuple(rotary)
            )
        joint = torch.cat([txt, img], dim=1)
        for block in self.single_transformer_blocks:
            joint = block(hidden_states=joint, temb=temb, image_rotary_emb=rotary)
        return joint[:, txt.shape[1] :]


def make_v1(double: int = 3, single: int = 4, seed: int = 0) -> NunchakuFluxTransformer2dModel:
    """V1 of random weights, the same as `make_v2`'s; in training mode, as nunchaku's loader leaves it."""
    torch.manual_seed(seed)
    model = NunchakuFluxTransformer2dModel(num_layers=double, num_single_layers=single, **CONFIG)
    handle = QuantizedFluxModel(model.transformer_blocks.eval(), model.single_transformer_blocks.eval())
    model.transformer_blocks = nn.ModuleList([NunchakuFluxTransformerBlocks(handle, "cpu")])
    model.single_transformer_blocks = nn.ModuleList()
    return model


def make_v2(double: int = 3, single: int = 4, seed: int = 0) -> NunchakuFluxTransformer2DModelV2:
    """V2 of random weights, the same as `make_v1`'s; in training mode, as nunchaku's loader leaves it."""
    torch.manual_seed(seed)
    model = NunchakuFluxTransformer2DModelV2(num_layers=double, num_single_layers=single, **CONFIG)
    for index, block in enumerate(model.single_transformer_blocks):
        model.single_transformer_blocks[index] = NunchakuFluxSingleTransformerBlock(block)
    return model
