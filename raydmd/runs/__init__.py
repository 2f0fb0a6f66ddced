"""A run's folder: what it holds, where, and how it is read."""
