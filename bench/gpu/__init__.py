"""All checks and benchmarks that need a GPU, in one unattended run: ``python -m bench.gpu``."""
