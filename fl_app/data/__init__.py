"""Datasets and how clients share them."""
