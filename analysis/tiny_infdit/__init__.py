"""The small Inf-DiT of `assets/tiny_infdit` that enlarges signs four times: model, training, checks."""
