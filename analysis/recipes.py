"""What the recipes of the small models share: tokenizer, labels, fixed basis, the finished folder."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import string
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WHITENING = 0.3  # 0 keeps the components' own strengths (detail drowns in noise), 1 makes them equal
CHARACTERS = [*"\"'.,!?-:;&", *string.ascii_uppercase, *string.digits, *string.ascii_lowercase]

# The tokenizer.


def tokenizer_of(
    special: Sequence[str], words: Sequence[str], length: int, begin: bool = False
) -> PreTrainedTokenizerFast:
    """Whole words of the domain; every capital, digit and sign a piece; other words fall to letters.

    begin: texts begin with <s>. All of them end with </s>.
    """
    pieces = dict.fromkeys([*special, *CHARACTERS, *words])
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    kind = {"unk_token": "<unk>", "continuing_subword_prefix": "", "max_input_chars_per_word": 40}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, **kind))
    split = pre_tokenizers.Split(Regex("[a-z]+|[A-Z0-9]|[^A-Za-z0-9]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), split])
    used = ["<s>", "</s>"] if begin else ["</s>"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if begin else "$A </s>",
        special_tokens=[(piece, vocabulary[piece]) for piece in used],
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    names |= {"bos_token": "<s>"} if begin else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **names)


def letter_labels(
    ids: torch.Tensor, words: Sequence[str | None], mark: int, letters: str, longest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Index in the word and letter of every token, (B, tokens) each; the last class of each is "none".

    words: what stands behind the token `mark` in each text; empty or None: nothing does.
    """
    index, letter = torch.full_like(ids, longest), torch.full_like(ids, len(letters))
    for row, word in enumerate(words):
        start = ids[row].tolist().index(mark) + 1 if word else 0
        for i, character in enumerate(word or ""):
            index[row, start + i] = i
            letter[row, start + i] = letters.index(character)
    return index, letter


# The fixed latent space.


def basis_of(file: Path, channels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean patch (N,), components (N, channels) and their scales, chosen for a latent rms of 1."""
    stored = np.load(file)
    variance = stored["variance"][:channels].astype(np.float64)
    scale = variance**WHITENING
    scale *= math.sqrt(np.mean(variance / scale**2))
    tensors = (stored["mean"], stored["components"][:, :channels], scale)
    mean, components, scales = (torch.from_numpy(np.ascontiguousarray(t, dtype=np.float32)) for t in tensors)
    return mean, components, scales


def fit_command(doc: str, file: Path, count: int, fit: Callable[[int, int], dict[str, np.ndarray]]) -> None:
    """The command line that fits a basis on `count` samples and writes it."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--out", default=str(file))
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    unfinished = args.out + ".tmp.npz"
    np.savez(unfinished, **{k: v.astype(np.float32) for k, v in fit(args.count, args.seed).items()})
    os.replace(unfinished, args.out)


# The finished folder.


@contextmanager
def finished(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` at the end; other files there stay."""
    with tempfile.TemporaryDirectory() as scratch:  # a half-written folder must never be taken for a model
        folder = Path(scratch) / "model"
        yield folder
        for config in folder.glob("vae/config.json"):  # Inf-DiT has none
            forget_origin(config)
        shutil.copytree(folder, out, dirs_exist_ok=True)


def write_json(path: Path, contents: dict) -> None:
    path.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")


def change_json(path: Path, **changes: object) -> None:
    """Put `changes` into a file of JSON."""
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | changes)


def forget_origin(config: Path) -> None:
    """diffusers stores the folder a part came from, which means nothing elsewhere."""
    found = json.loads(config.read_text(encoding="utf-8"))
    write_json(config, {key: value for key, value in found.items() if key != "_name_or_path"})


def portable_tokenizers(folder: Path, length: int, names: Sequence[str]) -> None:
    """transformers 5 writes the class as TokenizersBackend, unknown to 4.x; both know the Fast class.

    Pipelines read the text length from model_max_length, and other lengths than the trained one change
    pictures.
    """
    index, kind = folder / "model_index.json", "PreTrainedTokenizerFast"
    index.write_text(index.read_text().replace("TokenizersBackend", kind))
    for name in names:
        change_json(folder / name / "tokenizer_config.json", tokenizer_class=kind, model_max_length=length)


def known_words(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The words of its vocabulary."""
    words = (word for word in tokenizer.get_vocab() if len(word) > 1 and word.isalpha() and word.islower())
    return ["a", *sorted(words)]


def assemble_command(doc: str, assemble: Callable[[Path, Path], None], work: str) -> None:
    """The command line of an `assemble`; `doc`: what it does, `work`: its folder of trained parts."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path(work))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    assemble(args.work, args.out)
    total = sum(file.stat().st_size for file in args.out.rglob("*") if file.is_file())
    print(f"{args.out}: {total:,} bytes")
