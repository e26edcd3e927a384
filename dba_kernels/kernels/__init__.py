"""Triton kernels, one file per operation; they share no code with :mod:`dba_kernels.reference`."""
