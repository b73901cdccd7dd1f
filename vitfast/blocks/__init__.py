"""Blocks by their plans: each call by the engine, by the public ops, or as timm computes it."""
