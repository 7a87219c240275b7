"""Tests of Darkroom; failing asserts of the shared helpers show their values."""

import pytest

pytest.register_assert_rewrite("tests.helpers", "tests.tasks")
