import numpy as np
import pytest

from rl.files.token_values import STEPS, decode, encode


def test_values_come_back_within_a_step_of_the_code_and_unknown_ones_as_nan():
    values = np.concatenate([[0.0, np.nan, np.inf], -np.geomspace(1e-4, 12.0, 200), [0.25]])
    back = decode(encode(values))
    assert np.isnan(back[1:3]).all()
    known = np.isfinite(values)
    # The step of the code at x is 2 sqrt(|x| largest) / 127, and rounding is by half of it; the last term is for 0.
    allowed = np.sqrt(np.abs(values[known]) * 12.0) / STEPS + 12.0 / STEPS**2
    assert np.all(np.abs(back[known] - values[known]) <= allowed)
    assert back[0] == 0.0


def test_largest_values_and_flags_are_exact():
    assert decode(encode([1.0, 0.0, 1.0])).tolist() == [1.0, 0.0, 1.0]
    assert decode(encode([-7.5, 7.5])).tolist() == [-7.5, 7.5]
    assert decode(encode([])).tolist() == []
    assert decode(encode([0.0])).tolist() == [0.0]


@pytest.mark.parametrize("entry", [{}, {"largest": 1.0, "codes": "?"}, {"largest": float("inf"), "codes": ""}, "abc"])
def test_what_is_no_code_is_refused(entry):
    with pytest.raises(ValueError, match="of tokens must be"):
        decode(entry)
