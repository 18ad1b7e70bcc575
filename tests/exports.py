"""Exports: each is the version, and opens elsewhere."""
