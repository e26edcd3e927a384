"""``python -m dba_kernels`` is ``dba-kernels``."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="dba-kernels")
