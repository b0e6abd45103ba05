import numpy as np
import pytest

from vision_lowrank.plots import adapter_accuracy
from vision_lowrank.plots.adapter_accuracy import save_accuracy

NAMES = ["full", "lora", "hydra", "lora"]
PARAMETERS = [90_000, 7_000, 7_000, 2_000]
VALUES, LOWS, HIGHS = [0.9, 0.8, 0.7, 0.6], [0.8, 0.75, 0.6, 0.6], [0.95, 0.85, 1.0, 0.6]


@pytest.fixture
def axes(tmp_path, drawn):
    figures = drawn(adapter_accuracy)
    save_accuracy(tmp_path / "accuracy.png", NAMES, PARAMETERS, VALUES, LOWS, HIGHS, "lora")
    assert (tmp_path / "accuracy.png").stat().st_size > 1000
    return figures[0].axes[0]


def test_columns_are_in_the_order_of_size_with_value_and_interval(axes):
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["lora  2,000", "hydra  7,000", "lora  7,000", "full  90,000"]
    found = [container.lines for container in axes.containers]
    assert [line.get_ydata()[0] for line, _, _ in found] == pytest.approx([60, 70, 80, 90])
    ends = [bars[0].get_segments()[0][:, 1] for _, _, bars in found]
    np.testing.assert_allclose(ends, [[60, 60], [60, 100], [75, 85], [80, 95]])


def test_the_reference_is_a_line_at_each_of_its_sizes(axes):
    lines = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"]
    assert lines == pytest.approx([60, 80])
