"""What two ops or more share: norms, products, recomputation and reference gradients."""
