"""One folder of pictures and rows: draws what is missing, scores what is not scored."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from PIL import Image

from analysis.cli import is_embedded, progress, shipped, size_of, warn
from analysis.drawing.contestants import Contestant, contestants
from analysis.drawing.draw import default_device
from analysis.drawing.prompts import Prompt, read_prompts
from analysis.measures import words
from analysis.measures.fidelity import ClipIqa, fidelity, lpips_model, more_fidelity
from analysis.measures.flops import count_step
from analysis.measuring import Trial, turns
from analysis.records import store
from analysis.records.provenance import machine, now
from analysis.sharing import shared
from h2cache.api import checkpoint_name

CUTE80 = Path(shipped("assets/prompts/cute80.jsonl"))
CUTE80_TINY = Path(shipped("assets/prompts/cute80_tiny.jsonl"))  # in words that the embedded model knows


class Experiment:
    """One folder of pictures and rows: draw what is missing, score what is not scored."""

    def __init__(self, args: argparse.Namespace, state: PartialState) -> None:
        self.args, self.state = args, state
        path = args.prompts or (CUTE80_TINY if is_embedded(args.model) else CUTE80)
        self.prompts = read_prompts(path)[: args.limit]
        self.unread = None if args.no_words else words.problem()
        if args.clip:
            ClipIqa(args.clip)  # before the hours of drawing: OSError with what to do
        args.out.mkdir(parents=True, exist_ok=True)
        device = args.device
        if device is None:
            device = str(state.device) if state.num_processes > 1 else default_device()
        shown = self.prompts if state.is_main_process else ()
        self.trial = Trial.of(args, shown, device)
        self.contestants = contestants(args.methods, args.model, checkpoint_name(self.trial.pipeline))
        self.machine = machine(device)
        earlier = [store.read_json(path) for path in (args.out / "runs").glob("*/settings.json")]
        settings = self.trial.settings | {"processes": state.num_processes}
        self.settings = store.as_before(settings, earlier)
        self.folder = args.out / "runs" / store.run_key(**self.settings)[:8]

    def warn(self) -> None:
        """Say what will be missing from the table, and which presets are far from home."""
        if self.unread:
            warn(f"words are not read back: {self.unread}")
        presets = [c.preset for c in self.contestants if c.preset]
        told = [p.mismatch(self.args.model, self.args.steps, size_of(self.trial.call)) for p in presets]
        for text in dict.fromkeys(filter(None, told)):
            warn(text)

    def prepare(self) -> None:
        """Make the folders; check the disk; count operations."""
        for name in ("images", "rows", "scores", "taken"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        store.sweep(self.folder)
        store.write_atomically(self.folder / "settings.json", json.dumps(self.settings, indent=1).encode())
        call, pictures = self.trial.call, len(self.prompts) * len(self.contestants)
        pixels = (call.get("height") or 1024) * (call.get("width") or 1024) * (self.args.frames or 1)
        store.require_space(self.folder, 16 + pictures * pixels * 4 // 2**20)
        self.cost = count_step(self.trial.pipeline, call | {"prompt": self.prompts[0].text})

    def key(self, prompt: Prompt, contestant: Contestant) -> str:
        """Names a picture: everything that decides how it looks and what it costs."""
        return store.run_key(
            **self.settings, prompt=prompt.text, id=prompt.id, own_seed=prompt.seed,
            method=contestant.config.name, config=contestant.settings,
        )  # fmt: skip

    def row_path(self, key: str) -> Path:
        return self.folder / "rows" / f"{key}.json"

    def image_path(self, key: str) -> Path:
        return self.folder / "images" / f"{key}.png"

    def score_path(self, key: str) -> Path:
        return self.folder / "scores" / f"{key}.json"

    def drawn(self, key: str, read: bool = False) -> bool:
        """Whether the row and the picture are there, and whole. read: decode the picture to see that."""
        path = self.image_path(key)
        whole = store.whole_picture(path) is not None if read else store.has_end(path)
        return whole and store.read_json(self.row_path(key)) is not None

    def draw(self) -> int:
        """Draw the missing pictures, with all processes; returns how many could not be drawn."""
        tasks = [
            (self.key(prompt, contestant), prompt, contestant)
            for number, prompt in enumerate(self.prompts)
            for contestant in turns(self.contestants, number)
        ]
        tasks = [task for task in tasks if not self.drawn(task[0], read=True)]
        if tasks:
            self.trial.warm_up(tasks[0][1], [c.config for c in self.contestants])
        for key, prompt, contestant in self.share(tasks, "drawing", self.drawn):
            try:
                self._draw(key, prompt, contestant)
            except Exception:  # the others can still be drawn; this one is tried again at the next run
                print(f"{prompt.id} by {contestant.label} failed:\n{traceback.format_exc()}", file=sys.stderr)
        return sum(not self.drawn(key) for key, *_ in tasks)

    def share(self, tasks: list[tuple], what: str, done: Callable[[str], bool]) -> Iterator[tuple]:
        """Those of `tasks`, by key, that this process takes on, until all are `done`."""
        taken = shared(tasks, self.folder / "taken", lambda task: task[0], lambda task: done(task[0]))
        yield from progress(taken, "picture", what, self.state.is_main_process, total=len(tasks))

    def _draw(self, key: str, prompt: Prompt, contestant: Contestant) -> None:
        drawn = self.trial.draw(prompt, contestant.config)
        path = self.image_path(key)
        store.save_png(path, drawn.image)
        row = {
            "key": key,
            "id": prompt.id,
            "label": contestant.label,
            "method": contestant.config.name,
            "config": contestant.settings,
            "prompt": prompt.text,
            "words": prompt.words,
            **self.settings,
            "seed": self.trial.seed_of(prompt),
            **drawn.costs(),
            "tflops": round(self.cost.tflops(drawn.trace), 6),
            "png_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "machine": self.machine,
            "date": now(),
            "trace": store.compact(drawn.trace),
        }
        store.write_json(self.row_path(key), row)

    def score(self) -> None:
        """Compare the pictures that have not been compared in this way, with all processes."""
        clip, reason = None, None
        try:
            clip = ClipIqa(self.args.clip)
        except OSError as error:
            if self.args.clip:
                raise
            reason = str(error)
        read = not self.args.no_words and self.unread is None
        how = {"clip": [clip.name, self.args.clip] if clip else None, "lpips": lpips_model() is not None}
        tasks, ways = [], {}
        for prompt in self.prompts:
            base = self.key(prompt, self.contestants[0])
            mine = how | {"words": list(prompt.words or ()) if read else None}
            for contestant in self.contestants:
                key = self.key(prompt, contestant)
                if not (self.row_path(key).is_file() and self.row_path(base).is_file()):
                    continue  # could not be drawn
                ways[key] = mine
                if not self.scored(key, mine):
                    tasks.append((key, base, mine))
        for key, base, mine in self.share(tasks, "scoring", lambda key: self.scored(key, ways[key])):
            image, uncached = Image.open(self.image_path(key)), Image.open(self.image_path(base))
            score = {
                "how": mine,
                **fidelity(image, uncached),
                **more_fidelity(image, uncached),
                "words_read": words.word_recall(mine["words"], image) if read else None,
                "words_reason": self.unread,
                "clip_iqa": clip(image) if clip else None,
                "clip_iqa_reason": reason,
            }
            store.write_json(self.score_path(key), score)

    def scored(self, key: str, how: dict[str, Any]) -> bool:
        """Whether a picture has been compared in this way."""
        return (store.read_json(self.score_path(key)) or {}).get("how") == how

    def rows(self) -> list[dict]:
        """All finished rows of the asked contestants and prompts, with their scores, in their order."""
        rows = []
        for contestant, prompt in itertools.product(self.contestants, self.prompts):
            key = self.key(prompt, contestant)
            row, score = store.read_json(self.row_path(key)), store.read_json(self.score_path(key))
            if row and score:
                rows.append(row | score | {"label": contestant.label})
        return rows
