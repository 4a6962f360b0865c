"""A tiny FLUX trained from scratch to draw signs: data, encoders, VAE, training, assembly, evaluation."""
