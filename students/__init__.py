"""Architectures that can be students: one file each."""
