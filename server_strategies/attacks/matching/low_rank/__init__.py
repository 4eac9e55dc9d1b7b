"""Matching by exact features: a linear layer's update is a sum of one rank-one term an image."""
