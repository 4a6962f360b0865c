"""Evaluation tools and experiments around h2cache; run as modules from the repository root."""
