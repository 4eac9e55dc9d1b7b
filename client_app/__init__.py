"""What a client runs: local training on private images."""
