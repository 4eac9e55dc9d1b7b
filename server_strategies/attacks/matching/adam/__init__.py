"""What only an update by Adam gives away."""
