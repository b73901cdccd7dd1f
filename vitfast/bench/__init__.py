"""Measuring: interleaved medians, this machine's ceilings, peers, tables and JSON records."""
