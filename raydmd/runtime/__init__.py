"""The Ray side: roles as actors, a controller that passes references, manifests, placement."""
