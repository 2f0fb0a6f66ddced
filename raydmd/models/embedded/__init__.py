"""Families whose teachers are trained here in minutes: digits and points in the plane."""
