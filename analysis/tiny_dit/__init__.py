"""The small class-to-picture DiT of `assets/tiny_dit`: data, training, judge, checks."""
