from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from ssm_fast.checks import check_count, check_flag, check_number

pytestmark = pytest.mark.isa_independent


class TestCheckNumber:
    @pytest.mark.parametrize(
        ("bounds", "inside", "outside", "text"),
        [
            ({}, (-1e300, 0, 1e300), (), "finite"),
            ({"above": 0.0}, (5e-324, 3), (0, -0.0, -1.0), "finite and positive"),
            ({"above": 0.5}, (0.6,), (0.5, 0.0), "finite and above 0.5"),
            ({"at_least": 0.0}, (0, 2.5), (-1, -5e-324), "finite and at least 0"),
            ({"at_least": 1e-3}, (1e-3,), (0.0,), "finite and at least 0.001"),
            ({"at_most": 3.0}, (3, -9.0), (3.5,), "finite and at most 3"),
            ({"at_least": 0, "at_most": 1}, (0, 0.5, 1), (-0.1, 1.1), "finite and in [0, 1]"),
            ({"above": 0, "at_most": 1}, (0.1, 1), (0, 1.1), "finite and positive and at most 1"),
        ],
    )
    def test_bounds(self, bounds: dict[str, Any], inside: Any, outside: Any, text: str) -> None:
        for value in inside:
            assert check_number("x", value, **bounds) == value
        for value in (*outside, math.nan, math.inf, -math.inf):
            with pytest.raises(ValueError) as raised:  # noqa: PT011
                check_number("x", value, **bounds)
            assert str(raised.value) == f"x must be {text}, got {value}"

    def test_returns_a_number_of_python(self) -> None:
        for value in (1, 1.0, np.float32(1.0), np.int64(1)):
            assert type(check_number("x", value)) is float


class TestCheckCount:
    @pytest.mark.parametrize("value", [1, 2**70, np.int64(3), np.uint8(4)])
    def test_returns_a_number_of_python(self, value: Any) -> None:
        count = check_count("n", value)
        assert count == value
        assert type(count) is int

    @pytest.mark.parametrize("value", [True, np.True_, 1.0, np.float64(1.0), "1", None])
    def test_what_is_no_integer(self, value: Any) -> None:
        with pytest.raises(TypeError) as raised:
            check_count("n", value)
        assert str(raised.value) == f"n must be an int, got {type(value).__name__}"

    @pytest.mark.parametrize(("value", "at_least"), [(0, 1), (-1, 0), (np.int64(1), 2)])
    def test_too_small(self, value: Any, at_least: int) -> None:
        check_count("n", at_least, at_least)
        with pytest.raises(ValueError, match=f"^n must be at least {at_least}, got {value}$"):
            check_count("n", value, at_least)


class TestCheckFlag:
    def test_returns_a_bool_of_python(self) -> None:
        for value in (True, False, np.bool_(True), np.bool_(False)):
            assert check_flag("x", value) is bool(value)

    @pytest.mark.parametrize("value", ["False", 0, None, np.array(True)])
    def test_others(self, value: Any) -> None:
        with pytest.raises(TypeError, match=f"x must be a bool, got {type(value).__name__}"):
            check_flag("x", value)
