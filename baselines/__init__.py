"""Methods to compare H2-Cache with: one file each, found by its name."""
