"""Distillation: a student learns from a frozen teacher, by scores, attention relations and hidden states."""
