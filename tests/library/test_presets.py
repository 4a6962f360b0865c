"""Presets are found by model, and carry their source."""

import json
from pathlib import Path

import pytest

from analysis.records.planes import markdown, read, table
from analysis.records.store import settings_of
from h2cache import H2Config
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


@pytest.mark.parametrize(
    ("model", "steps", "size", "here"),
    [
        ("./assets/tiny_flux/", 50, "128x128", None),
        ("assets/tiny_flux", 50, None, None),
        ("assets/tiny_flux", 8, "128x128", "here: 8 steps."),
        ("black-forest-labs/FLUX.1-dev", 50, "1024x1024", "here: FLUX.1-dev, 1024x1024."),
    ],
)
def test_a_preset_knows_where_it_was_not_measured(model, steps, size, here):
    told = PRESETS["tiny_flux-5x"].mismatch(model, steps, size)
    assert told is None if here is None else here in told
    assert here is None or "measured on tiny_flux at 50 steps and 128x128" in told


def test_what_others_published_is_not_called_measured():
    preset = PRESETS["flux1-dev"]
    assert not preset.ours
    assert "not measured by us" in preset.mismatch("FLUX.1-dev", 50, None)
    assert all(p.ours for name, p in PRESETS.items() if name != "flux1-dev")


def test_presets_of_the_embedded_model_agree_with_the_shipped_records():
    """Every figure in a preset's text stands in the records of its run."""
    rows = read(Path("assets/results/tiny_flux_presets"))
    usual = settings_of(H2Config())  # the records are older than some settings
    lines = {json.dumps(usual | line["config"]): line for line in table(rows)}
    for preset in (p for p in PRESETS.values() if p.source.endswith("tiny_flux_presets")):
        line = lines[json.dumps(settings_of(preset.config))]
        assert preset.source.startswith(f"{line['blocks']:.2f}x fewer blocks, {line['psnr']:.1f} dB.")
        assert line["prompts"] == 32


@pytest.mark.parametrize("folder", ["tiny_flux_baselines"])
def test_presets_of_an_experiment_agree_with_its_shipped_table(folder):
    measured = json.loads(Path("assets/results", folder, "table.json").read_text())["rows"]
    presets = [preset for preset in PRESETS.values() if preset.source.endswith(folder)]
    assert len(presets) == 3
    for preset in presets:
        config = json.loads(json.dumps(settings_of(preset.config.for_checkpoint("tiny_flux"))))
        same = [x for x in measured if x["method"] == preset.method and x["config"].items() <= config.items()]
        (line,) = same  # fields that came later have their defaults
        assert preset.source.startswith(f"{line['blocks_ratio']:.2f}x fewer blocks, {line['psnr']:.1f} dB.")


def test_the_readmes_table_is_that_of_the_shipped_records():
    """Nobody typed it: `python -m analysis.calibrate --table --out assets/results/tiny_flux_presets`."""
    assert (
        markdown(table(read(Path("assets/results/tiny_flux_presets"))))
        in Path("h2cache/README.md").read_text()
    )
