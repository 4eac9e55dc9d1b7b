"""What the server runs: honest training, a curious copy, and the attacks on it."""
