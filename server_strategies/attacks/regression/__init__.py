"""Learning, at a client's own weights, what its update tells of images: regression, no search."""
