"""Prompt files: one prompt a line, or one JSON object a line."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from analysis.records.saved import row_of

SEEDS = range(-(2**63), 2**64)  # what torch.Generator takes
LONGEST = 120  # bytes of an id: a file's name has room for 255, with method, key and machine


@dataclass(frozen=True)
class Prompt:
    """One thing to draw. `id` names its files; `words` is what a reader should find in the picture."""

    id: str
    text: str
    words: tuple[str, ...] | None = None
    seed: int | None = None


def read_prompts(path: Path) -> list[Prompt]:
    """Read `.txt` (one prompt a line, id = line number) or `.jsonl`.

    A JSON line is {"prompt", "id"?, "words"?, "seed"?}, or the paper's {"file_path", "image_caption": [...]}
    (id = stem of the file, first caption). Empty lines are skipped. A line ends at a line feed only.
    Raises ValueError naming the line for an empty or broken one and a duplicate id, OSError if unreadable.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(
            f"{path}: a prompt file is .txt (one prompt a line) or .jsonl, not {path.suffix or 'this'!r}"
        )
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")  # Windows begins a file with a mark
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{path} line {line}: not UTF-8 text: save it as UTF-8") from None
    prompts, seen = [], {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = (
                Prompt(f"{number:04d}", line.strip()) if path.suffix == ".txt" else _from_json(line, number)
            )
            check_text(prompt.text)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} line {number}: {error}") from None
        if prompt.id in seen:
            raise ValueError(
                f"{path} line {number}: id {prompt.id!r} stands already in line {seen[prompt.id]}"
            )
        seen[prompt.id] = number
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


def _from_json(line: str, number: int) -> Prompt:
    row = row_of(line.encode(), {})
    if "image_caption" in row:  # the paper's file
        captions = row["image_caption"]
        text = captions[0] if isinstance(captions, list) and captions else captions
        identity = Path(str(row.get("file_path", f"{number:04d}"))).stem
    elif "prompt" in row:
        text, identity = row["prompt"], row.get("id", f"{number:04d}")
    else:
        raise ValueError('found neither "prompt" nor "image_caption"')
    if not isinstance(text, str) or not text.strip():
        raise ValueError("the prompt is empty")
    if not isinstance(identity, (str, int)) or not str(identity).strip():
        raise ValueError(f"the id {identity!r} is not a name")
    words, seed = row.get("words"), row.get("seed")
    if words is not None and not (isinstance(words, list) and all(isinstance(w, str) for w in words)):
        raise ValueError(f'"words" is not a list of words: {words!r}')
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ValueError(f'"seed" is not a whole number: {seed!r}')
    if seed is not None and seed not in SEEDS:
        raise ValueError(f'"seed" is {seed}: it goes from {SEEDS[0]} to {SEEDS[-1]}')
    if len(os.fsencode(_file_name(str(identity)))) > LONGEST:
        raise ValueError(f"the id {str(identity)!r:.40}... is too long for the name of a file: shorten it")
    return Prompt(_file_name(str(identity)), text.strip(), None if words is None else tuple(words), seed)


def check_text(text: str) -> None:
    """ValueError for a prompt that is no text, from a terminal or a file of another encoding."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the prompt holds {text[error.start]!r}, half a character: write it in UTF-8"
        ) from None


def _file_name(identity: str) -> str:
    """The id as the stem of a file: no folder, no surprising character."""
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in identity).lstrip(".") or "_"
    return (
        name.encode(sys.getfilesystemencoding(), "replace")
        .decode(sys.getfilesystemencoding())
        .replace("?", "_")
    )
