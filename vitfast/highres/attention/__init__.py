"""Rows of attention matrices, which nobody holds whole."""
