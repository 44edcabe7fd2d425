"""Recipes: YAML files, found by name."""
