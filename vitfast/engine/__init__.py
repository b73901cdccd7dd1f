"""Inference on the CPU, the only room with state; it knows no timm. README.md tells of a call."""
