"""Nodes for ComfyUI: link or copy this folder into `custom_nodes`, see README.md here."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("h2cache") is None:  # linked into custom_nodes, and not installed
    sys.path.append(str(Path(__file__).resolve().parents[2]))

from h2cache.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
