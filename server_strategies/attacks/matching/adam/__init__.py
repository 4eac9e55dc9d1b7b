"""Matching that is specific to updates by Adam: its epsilon reveals gradients of single steps."""
