"""Transformers of diffusers and nunchaku that load with a cache enabled."""
