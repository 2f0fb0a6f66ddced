"""The recipe: one typed tree, read from YAML."""
