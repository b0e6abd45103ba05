import numpy as np
import pytest

from vision_lowrank.data.bands import Bands, check_wavelengths
from vision_lowrank.errors import DataError


def test_good_wavelengths_pass_even_where_detectors_overlap():
    values = check_wavelengths([450, 700, 690, 690, 2500], "card")
    assert values.dtype == np.float32
    assert values.tolist() == [450, 700, 690, 690, 2500]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([443, 560, 0.665], r"band index 2 is 0\.665, beside 560; it looks like micrometres"),
        ([0.45, 0.55, 2.4], r"0\.45 to 2\.4 look like micrometres; multiply them by 1000"),
        ([450, float("nan")], "band index 1 is nan"),
        ([450, 0, 500], r"band index 1 is 0\.0"),
        ([-450, 500], r"band index 0 is -450"),
        ([450, float("inf")], "band index 1 is inf"),
        ([], "no wavelengths"),
        (["red", "green"], "must be numbers"),
    ],
)
def test_bad_wavelengths_name_source_and_value(values, message):
    with pytest.raises(DataError, match=message) as caught:
        check_wavelengths(values, "my.hdr")
    assert str(caught.value).startswith("my.hdr: ")
    assert "\n" not in str(caught.value)


def test_rgb_takes_the_nearest_channels_of_unsorted_bands():
    assert Bands(np.array([900, 552, 440, 655, 640], np.float32)).rgb() == (3, 1, 2)


def test_select_keeps_widths_beside_their_wavelengths():
    bands = Bands(np.array([400, 500, 600], np.float32), np.array([4, 5, 6], np.float32)).select(np.array([2, 0]))
    assert bands.wavelengths.tolist() == [600, 400]
    assert bands.widths is not None
    assert bands.widths.tolist() == [6, 4]


def test_widths_must_match():
    with pytest.raises(DataError, match="1 band widths for 2"):
        Bands(np.array([400, 500], np.float32), np.array([4], np.float32))
