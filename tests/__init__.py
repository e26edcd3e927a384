import pytest

pytest.register_assert_rewrite("tests.support")  # what it asserts is explained like a test's own assertions
