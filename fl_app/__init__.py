"""What the two sides of a federation agree on, and the auditor's tools."""
