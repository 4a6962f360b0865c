"""Evaluation tools and experiments around h2cache; run as modules from the repository root."""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no advice on torchvision, which nothing here needs
