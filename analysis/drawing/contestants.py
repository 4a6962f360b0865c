"""Contestants of an experiment: methods with their settings."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from analysis.records import store
from analysis.settings import parse_settings
from h2cache import H2Config, MethodConfig, find_method
from h2cache.presets import PRESETS, Preset, find_preset


@dataclass(frozen=True)
class Contestant:
    """A method with its settings, and its name in tables."""

    label: str
    config: MethodConfig
    preset: Preset | None = field(default=None, compare=False)  # that it is, unchanged

    @property
    def settings(self) -> dict[str, Any]:
        return store.settings_of(self.config)


def contestants(texts: Sequence[str], model: str, checkpoint: str | None) -> list[Contestant]:
    """The contestants in `texts`, the uncached baseline first; ValueError for what cannot be."""
    found = [Contestant("none", find_method("none")())]
    for text in texts:
        if text in PRESETS:
            preset = PRESETS[text]
            config = preset.config.for_checkpoint(checkpoint)
            found.append(Contestant(f"{preset.method} ({text})", config, preset))
            continue
        name, *parts = text.split(":")
        kind = find_method(name)
        preset = find_preset(model, name)
        base = partial(replace, preset.config) if preset and not parts else kind
        choices = []
        for part in parts:
            key, _, values = part.partition("=")
            choices.append([f"{key}={value}" for value in values.split(",")])
        for given in itertools.product(*choices):
            config = base(**parse_settings(kind, list(given))).for_checkpoint(checkpoint)
            found.append(Contestant(" ".join([name, *given]), config, None if parts else preset))
    return list(dict.fromkeys(found))


GRID = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6)


def configurations(args: argparse.Namespace) -> list[H2Config]:
    """The settings that --pairs, or --tau1 and --tau2, and --set name."""
    others = parse_settings(H2Config, args.set)
    if args.pairs and (args.tau1 or args.tau2):
        raise ValueError("--pairs and --tau1 or --tau2 name the same thresholds: give one of them")
    grid = itertools.product(args.tau1 or GRID, args.tau2 or GRID)
    pairs = args.pairs or ["/".join(map(str, pair)) for pair in grid]
    configs = []
    for pair in pairs:
        parts = pair.split("/")
        if len(parts) not in (2, 3):
            raise ValueError(f"--pairs {pair}: the form is TAU1/TAU2 or TAU1/TAU2/HITS, such as 0.3/0.1")
        names = ("tau1", "tau2", "max_consecutive_hits")
        given = [f"{name}={part}" for name, part in zip(names, parts, strict=False)]
        if twice := [name for name in names[: len(parts)] if name in others]:
            raise ValueError(
                f"--set {twice[0]}={others[twice[0]]}: --pairs, or --tau1 and --tau2, say it already"
            )
        configs.append(H2Config(**others | parse_settings(H2Config, given)))
    return configs
