"""The actors that do the work, their groups and pools, and what travels between them."""
