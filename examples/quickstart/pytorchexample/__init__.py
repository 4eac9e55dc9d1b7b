"""A federation in the shape of Flower's quickstart-pytorch."""
