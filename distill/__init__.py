"""Distil long-document classifiers into small ones, with results that can be believed."""
