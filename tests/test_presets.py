"""Presets are found by model, and carry their source."""

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
