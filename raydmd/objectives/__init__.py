"""Losses and gradients: score matching, distribution matching, regression. No networks, no Ray."""
