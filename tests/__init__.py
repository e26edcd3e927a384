from contextlib import suppress

with suppress(ImportError):  # bench.gpu uses tests.support where there is no pytest
    import pytest

    pytest.register_assert_rewrite("tests.support")  # what it asserts is explained like a test's own assertions
