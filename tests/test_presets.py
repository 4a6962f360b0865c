"""Presets are found by model, and carry their source."""

import json
from pathlib import Path

from analysis.calibrate import markdown, read, table
from analysis.keep import settings_of
from h2cache.presets import PRESETS, find_preset


def test_presets_are_found_by_folder_or_hub_id():
    assert find_preset("black-forest-labs/FLUX.1-dev", "h2cache") is PRESETS["flux1-dev"]
    assert find_preset("/models/FLUX.1-dev/", "h2cache") is PRESETS["flux1-dev"]
    assert find_preset("somebody/else", "h2cache") is None
    assert find_preset("FLUX.1-dev", "none") is None


def test_every_preset_says_where_it_was_measured():
    for name, preset in PRESETS.items():
        assert preset.source, name
        assert preset.steps > 0
        preset.config.build()


def test_presets_of_the_embedded_model_agree_with_the_shipped_records():
    """Every figure in a preset's text stands in the records of its run."""
    rows = read(Path("assets/results/tiny_flux_presets"))
    lines = {json.dumps(line["config"]): line for line in table(rows)}
    for preset in (p for p in PRESETS.values() if (p.model, p.method) == ("tiny_flux", "h2cache")):
        line = lines[json.dumps(settings_of(preset.config))]
        assert preset.source.startswith(f"{line['blocks']:.2f}x fewer blocks, {line['psnr']:.1f} dB.")
        assert line["prompts"] == 32


def test_presets_of_the_baselines_agree_with_the_shipped_table():
    measured = json.loads(Path("assets/results/tiny_flux_baselines/table.json").read_text())["rows"]
    for preset in PRESETS.values():
        if preset.model == "tiny_flux" and preset.method != "h2cache":
            config = json.loads(json.dumps(settings_of(preset.config.for_checkpoint("tiny_flux"))))
            line = next(x for x in measured if x["config"] == config and x["method"] == preset.method)
            told = f"{line['blocks_ratio']:.2f}x fewer blocks, {line['psnr']:.1f} dB."
            assert preset.source.startswith(told)


def test_the_readmes_table_is_that_of_the_shipped_records():
    """Nobody typed it: `python -m analysis.calibrate --table --out assets/results/tiny_flux_presets`."""
    assert markdown(table(read(Path("assets/results/tiny_flux_presets")))) in Path("README.md").read_text()
