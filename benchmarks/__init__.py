"""Measurements behind the figures in the documents; each runs by itself."""
