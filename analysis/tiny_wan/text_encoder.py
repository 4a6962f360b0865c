"""Tokenizer and the tiny UMT5 encoder, pre-trained by attribute read-out and then frozen.

    python -m analysis.tiny_wan.text_encoder --out work/wan        # 1500 steps, saves two folders

Wan's cross-attention gives text tokens no position, so the encoder itself must carry the index of every
letter
and say which colour belongs to which thing: linear read-outs of every token predict the attributes of the
whole prompt, and of letters their index. A frozen random encoder would not do.
"""

import argparse
import random
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from analysis.recipes import letter_labels, tokenizer_of
from analysis.tiny_flux.signs import COLOURS, LETTERS
from analysis.tiny_wan.clips import (
    ACTIONS,
    BAD,
    MAX_LETTERS,
    SHAPES,
    WORD_ACTIONS,
    ClipSpec,
    prompt,
    sample_spec,
)

MAX_TOKENS, WIDTH = 20, 128
SPECIAL = ["<pad>", "</s>", "<unk>"]
GLUE = "a an the and word over on background clip"
ALL_ACTIONS = tuple(dict.fromkeys((*ACTIONS, *WORD_ACTIONS)))
# Classes of every attribute, see attributes(); the last class of each means "none".
ATTRIBUTES = (len(COLOURS) + 1, MAX_LETTERS + 1) + 2 * (
    len(COLOURS) + 1,
    len(SHAPES) + 1,
    len(ALL_ACTIONS) + 1,
)
NO_INDEX, NO_LETTER = MAX_LETTERS, len(LETTERS)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The words of clips."""
    words = " ".join((GLUE, BAD, *COLOURS, *SHAPES, *ALL_ACTIONS)).split()
    return tokenizer_of(SPECIAL, words, MAX_TOKENS)


def build_encoder(vocabulary: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=WIDTH,
        d_kv=32,
        d_ff=256,
        num_layers=3,
        num_heads=4,
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return UMT5EncoderModel(config)


def tokenise(tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, (B, MAX_TOKENS) each, as WanPipeline asks for them."""
    padded = {"padding": "max_length", "max_length": MAX_TOKENS, "truncation": True, "return_tensors": "pt"}
    found = tokenizer(prompts, return_attention_mask=True, **padded)
    return found.input_ids, found.attention_mask


class FrozenEncoder:
    """The saved pair: prompts to what WanPipeline hands the transformer, zeros after the last token."""

    def __init__(self, folder: Path) -> None:
        self.model = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> torch.Tensor:
        ids, mask = tokenise(self.tokenizer, prompts)
        return self.model(ids, mask).last_hidden_state * mask[:, :, None]


def attributes(spec: ClipSpec | None) -> list[int]:
    """Class numbers; None is an empty or bad prompt."""
    colours = list(COLOURS)
    none = [count - 1 for count in ATTRIBUTES]
    if spec is None:
        return none
    found = [colours.index(spec.background), len(spec.word) - 1 if spec.word else none[1]]
    for thing in spec.things:
        found += [colours.index(thing.colour), SHAPES.index(thing.shape), ALL_ACTIONS.index(thing.action)]
    if spec.word:
        found += [none[2], none[3], ALL_ACTIONS.index(spec.action)]
    return found + none[len(found) :]


def train(out: Path, steps: int, batch: int, seed: int) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = build_tokenizer()
    encoder = build_encoder(len(tokenizer))
    readout = nn.Linear(WIDTH, sum(ATTRIBUTES) + NO_INDEX + 1 + NO_LETTER + 1)
    trained = nn.ModuleList([encoder, readout])
    optimizer = torch.optim.AdamW(trained.parameters(), 2e-3, weight_decay=0.01)
    word = tokenizer.convert_tokens_to_ids("word")
    start = time.time()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 100, (steps - step) / (steps / 2))
        specs = [sample_spec(rng) if rng.random() > 0.03 else None for _ in range(batch)]
        prompts = [prompt(spec, rng) if spec else rng.choice(("", BAD)) for spec in specs]
        ids, mask = tokenise(tokenizer, prompts)
        words = [spec and spec.word for spec in specs]
        index, letter = letter_labels(ids, words, word, LETTERS, NO_INDEX)
        wanted = torch.tensor([attributes(spec) for spec in specs])
        real = mask.bool()
        parts = readout(encoder(ids, mask).last_hidden_state).split(
            [*ATTRIBUTES, NO_INDEX + 1, NO_LETTER + 1], -1
        )
        loss = 3 * F.cross_entropy(parts[-2][real], index[real]) + 3 * F.cross_entropy(
            parts[-1][real], letter[real]
        )
        for k, part in enumerate(parts[:-2]):
            loss = loss + F.cross_entropy(part[real], wanted[:, k : k + 1].expand_as(ids)[real])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            placed = index < NO_INDEX
            right = (parts[-2].argmax(-1) == index)[placed].float().mean().item()
            hits = [(p.argmax(-1) == wanted[:, k : k + 1])[real] for k, p in enumerate(parts[:-2])]
            shares = [round(hit.float().mean().item(), 3) for hit in hits]
            spent = time.time() - start
            print(
                f"{step} loss {loss.item():.4f} index {right:.3f} attributes {shares} {spent:.0f} s",
                flush=True,
            )
    encoder.save_pretrained(out / "text_encoder")
    tokenizer.save_pretrained(out / "tokenizer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("work/wan"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train(args.out, args.steps, args.batch, args.seed)


if __name__ == "__main__":
    main()
