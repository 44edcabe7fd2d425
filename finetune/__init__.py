"""Stage 2: classification fine-tuning and evaluation."""
