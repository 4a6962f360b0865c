"""From a model's name to a picture with its costs."""
