"""Named settings, each with what it was measured on."""

PRESETS = {}
