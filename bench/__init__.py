"""Benchmarks and studies; each prints the tables it stands behind."""
