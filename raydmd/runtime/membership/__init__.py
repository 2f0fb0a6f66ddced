"""The workers of a role: placed, started, watched in their start, and fewer or more of them."""
