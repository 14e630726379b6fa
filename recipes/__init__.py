"""Recipes that ship with distill: one YAML file each."""
