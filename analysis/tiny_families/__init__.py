"""Real diffusers pipelines of every model family, made of tiny random weights, for tests and tables.

    from analysis.tiny_families import FAMILIES
    pipeline, call = FAMILIES["wan"]()
    frames = pipeline(**call).frames

What comes out is noise; what runs is the pipeline class, the scheduler, the text encoders and the VAE of the
family, in under a second on one CPU core.
"""

from analysis.tiny_families.pictures import PICTURES
from analysis.tiny_families.videos import VIDEOS

FAMILIES = PICTURES | VIDEOS

__all__ = ["FAMILIES"]
