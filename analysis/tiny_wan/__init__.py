"""A tiny Wan trained from scratch to draw moving shapes and words: data, encoder, VAE, training, checks."""
