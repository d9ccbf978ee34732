"""The checks that ship with the package fail like tests: with the values that were compared."""

import pytest

pytest.register_assert_rewrite("vllm_disagg.testing.check_transport")
