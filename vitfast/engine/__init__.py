"""Inference on the CPU: it keeps what calls have prepared, and knows no timm. See README.md."""
