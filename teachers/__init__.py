"""Architectures that can teach: one file each."""
