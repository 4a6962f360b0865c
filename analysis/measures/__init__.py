"""What is measured on a picture or a call."""
