"""From a module of timm to its plan: which children a fused forward reads, what they hold."""
