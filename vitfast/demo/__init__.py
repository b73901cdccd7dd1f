"""What `vitfast demo` runs: timm beside vitfast on one photograph, and an HTML report of it."""
