"""Records of runs: kept, read back, compared."""
