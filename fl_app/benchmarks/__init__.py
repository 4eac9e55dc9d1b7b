"""Benchmarks: the commands behind every figure of the project."""
