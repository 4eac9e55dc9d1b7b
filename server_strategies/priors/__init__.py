"""Image priors: what an attack assumes of images before it has seen an update."""
