"""Stage 1: masked image modeling (and distillation)."""
