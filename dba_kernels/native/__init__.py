"""The native CPU backend: the C++ library built from ``csrc/``, one file per operation over it.

Arguments and semantics are those of :mod:`dba_kernels.reference`. The number of threads is ``torch.get_num_threads()``
and changes no bit of any result. ``DBA_KERNELS_ISA`` (``scalar``, ``avx2``, ``avx512``) forces an instruction set.
"""
