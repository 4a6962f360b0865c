"""Tokenizers and the two tiny text encoders, pre-trained by attribute read-out and then frozen.

    python -m analysis.tiny_flux.text_encoders --out work/tiny          # 1200 steps, then saves four folders

FLUX gives text tokens no position, so the T5 itself must carry the index of every letter: linear read-outs of
each T5 token predict (index in the word, letter, length, shape, layout, colours, texture), those of the
pooled CLIP vector the attributes of the whole prompt. A frozen random encoder would not do.
"""

import argparse
import random
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from analysis.recipes import letter_labels, tokenizer_of
from analysis.tiny_flux.signs import COLOURS, LETTERS, SHAPES, TEXTURES, SignSpec, prompt, sample_spec

MAX_TOKENS = 24
T5_WIDTH, CLIP_WIDTH = 128, 96
GLUE = """
a an the sign badge logo shirt that says in letters with word text on background curved straight
""".split()  # noqa: SIM905  reads better than a list of quotes
SPECIAL = ["<pad>", "</s>", "<unk>", "<s>"]
ATTRIBUTES = (
    len(SHAPES),
    2,
    5,
    len(COLOURS),
    len(COLOURS),
    len(TEXTURES),
)  # classes of each; see attributes()
NO_INDEX, NO_LETTER = 5, len(LETTERS)


def build_tokenizer(clip: bool) -> PreTrainedTokenizerFast:
    """The words of signs; CLIP's texts begin with <s>."""
    return tokenizer_of(SPECIAL, [*GLUE, *COLOURS, *SHAPES, *TEXTURES], MAX_TOKENS, begin=clip)


def build_encoders(vocabulary: int) -> tuple[T5EncoderModel, CLIPTextModel]:
    t5 = T5Config(
        vocab_size=vocabulary,
        d_model=T5_WIDTH,
        d_kv=32,
        d_ff=256,
        num_layers=3,
        num_heads=4,
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        is_encoder_decoder=False,
        use_cache=False,
        tie_word_embeddings=False,
    )
    clip = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=CLIP_WIDTH,
        intermediate_size=2 * CLIP_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=CLIP_WIDTH,
        hidden_act="quick_gelu",
        bos_token_id=3,
        eos_token_id=1,
        pad_token_id=0,
    )
    return T5EncoderModel(t5), CLIPTextModel(clip)


def tokenise(tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> torch.Tensor:
    """(B, MAX_TOKENS), padded as the pipeline pads."""
    padded = {"padding": "max_length", "max_length": MAX_TOKENS, "truncation": True, "return_tensors": "pt"}
    return tokenizer(prompts, **padded).input_ids


class FrozenEncoders(nn.Module):
    """The saved pair: prompts to (T5 states, pooled CLIP)."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.t5 = T5EncoderModel.from_pretrained(folder / "text_encoder_2").float()
        self.clip = CLIPTextModel.from_pretrained(folder / "text_encoder").float()
        self.t5_tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer_2")
        self.clip_tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
        self.eval().requires_grad_(False)

    def forward(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.t5.device
        states = self.t5(tokenise(self.t5_tokenizer, prompts).to(device))[0]
        return states, self.clip(tokenise(self.clip_tokenizer, prompts).to(device)).pooler_output


def attributes(spec: SignSpec) -> list[int]:
    names = list(COLOURS)
    colours = [names.index(spec.colour), names.index(spec.background)]
    layout = [SHAPES.index(spec.shape), int(spec.curved), len(spec.word) - 1]
    return [*layout, *colours, TEXTURES.index(spec.texture)]


def train(out: Path, steps: int, batch: int, seed: int, device: str) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    t5_tokenizer, clip_tokenizer = build_tokenizer(clip=False), build_tokenizer(clip=True)
    t5, clip = build_encoders(len(t5_tokenizer))
    token_readout = nn.Linear(T5_WIDTH, sum(ATTRIBUTES) + NO_INDEX + 1 + NO_LETTER + 1)
    pooled_readout = nn.Linear(CLIP_WIDTH, sum(ATTRIBUTES))
    trained = nn.ModuleList([t5, clip, token_readout, pooled_readout]).to(device)
    optimizer = torch.optim.AdamW(trained.parameters(), 2e-3, weight_decay=0.01)
    quote = t5_tokenizer.convert_tokens_to_ids('"')
    start = time.time()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 100, (steps - step) / (steps / 2))
        specs = [sample_spec(rng, real_words=0.2) for _ in range(batch)]
        prompts = [prompt(spec, rng) for spec in specs]
        for i, spec in enumerate(specs):
            if rng.random() < 0.1:  # lower-case letters are not drawn, but should not be noise either
                prompts[i] = prompts[i].replace(f'"{spec.word}"', f'"{spec.word.lower()}"')
        # A lower-case word of the vocabulary ("on", "red") is one token: such rows would shift the labels.
        broken = {i for i, spec in enumerate(specs) if spec.word.lower() in t5_tokenizer.get_vocab()}
        for i in broken:
            prompts[i] = prompts[i].replace(f'"{specs[i].word.lower()}"', f'"{specs[i].word}"')
        ids = tokenise(t5_tokenizer, prompts)
        labels = letter_labels(ids, [spec.word for spec in specs], quote, LETTERS, NO_INDEX)
        index, letter = (t.to(device) for t in labels)
        wanted = torch.tensor([attributes(spec) for spec in specs]).to(device)
        ids = ids.to(device)
        real = ids != 0
        parts = token_readout(t5(ids)[0]).split([*ATTRIBUTES, NO_INDEX + 1, NO_LETTER + 1], -1)
        pooled = clip(tokenise(clip_tokenizer, prompts).to(device)).pooler_output
        pooled_parts = pooled_readout(pooled).split(ATTRIBUTES, -1)
        loss = 3 * (
            F.cross_entropy(parts[-2][real], index[real]) + F.cross_entropy(parts[-1][real], letter[real])
        )
        for k, (token_part, pooled_part) in enumerate(zip(parts, pooled_parts, strict=False)):
            per_token = wanted[:, k : k + 1].expand(-1, MAX_TOKENS)
            loss = loss + F.cross_entropy(token_part[real], per_token[real])
            loss = loss + F.cross_entropy(pooled_part, wanted[:, k])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            placed = index < NO_INDEX
            right = (parts[-2].argmax(-1) == index)[placed].float().mean().item()
            hits = (p.argmax(-1) == wanted[:, k] for k, p in enumerate(pooled_parts))
            pooled_right = [round(hit.float().mean().item(), 3) for hit in hits]
            spent = time.time() - start
            print(f"{step} loss {loss.item():.4f} index {right:.3f} clip {pooled_right} {spent:.0f} s")
    t5.half().save_pretrained(out / "text_encoder_2")
    clip.half().save_pretrained(out / "text_encoder")
    t5_tokenizer.save_pretrained(out / "tokenizer_2")
    clip_tokenizer.save_pretrained(out / "tokenizer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("work/tiny"))
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    train(args.out, args.steps, args.batch, args.seed, args.device)


if __name__ == "__main__":
    main()
