"""What an attack believes of images."""
