"""Measures a server as its users would load it."""
