"""The server: Flower strategies that observe the training, and the attacks on what they see."""
