"""Images by overlapping tiles, one stripe of them at a time."""
