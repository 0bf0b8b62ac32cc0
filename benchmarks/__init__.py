"""Benchmarks. They are not tests."""
