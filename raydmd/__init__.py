"""raydmd: distils diffusion models into few-step experts on a Ray cluster, and serves them."""

__version__ = "0.1.0"
