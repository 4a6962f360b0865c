"""Tiny text encoders, tokenizers and pictures that the families share."""

from __future__ import annotations

from functools import cache

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen3Config,
    T5Config,
    T5EncoderModel,
)

SPECIAL = ["<pad>", "<s>", "</s>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
VOCABULARY = 256 + len(SPECIAL)
TEMPLATE = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}{% endfor %}"
)


@cache
def tokenizer(length: int = 1024, side: str = "right") -> PreTrainedTokenizerFast:
    """One token a byte, and one that ends a text: no file is needed, and no two prompts are the same."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: n for n, piece in enumerate([*SPECIAL, *alphabet])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[3:],
        model_max_length=length,
        padding_side=side,
    )
    fast.chat_template = TEMPLATE
    return fast


def clip(width: int = 32, projected: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A CLIP text encoder, `width` wide."""
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        projection_dim=width,
        vocab_size=VOCABULARY,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5(vocabulary: int = VOCABULARY) -> T5EncoderModel:
    """A T5 encoder, 32 wide."""
    config = T5Config(
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        vocab_size=vocabulary,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config)


def qwen3_config(layers: int = 2) -> Qwen3Config:
    """A Qwen3 language model, 16 wide."""
    return Qwen3Config(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
    )


def qwen_vl() -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL model, 32 wide, that sees pictures."""
    ids = tokenizer().convert_tokens_to_ids
    text = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [2, 2, 4], "rope_type": "default", "type": "default"},
        "rope_theta": 1e6,
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config)


class PictureProcessor(Qwen2VLProcessor):
    """Qwen's processor without the part for videos, which needs torchvision; pictures become four tokens."""

    def __init__(self) -> None:
        self.image_processor = Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=56 * 56)
        self.tokenizer = tokenizer()
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = self.tokenizer.convert_tokens_to_ids(self.video_token)


def picture(size: int = 64) -> Image.Image:
    """A smooth square picture."""
    ramp = torch.linspace(0, 255, size)
    across, down = torch.meshgrid(ramp, ramp, indexing="ij")
    pixels = torch.stack([across, down, 255 - across])
    return Image.fromarray(pixels.permute(1, 2, 0).byte().numpy())


def random_weights(seed: int = 0) -> None:
    """Make what is built next the same in every run."""
    torch.manual_seed(seed)
