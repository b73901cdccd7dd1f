"""Plumbing that knows no formula: devices, the native extension, op registration, dispatch."""
