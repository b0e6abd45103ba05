import numpy as np
import pytest
from matplotlib.colors import to_hex

from vision_lowrank.plots import adapter_diagnostics
from vision_lowrank.plots.adapter_diagnostics import INTRUDER_COLOUR, save_intruders

NAMES = ["blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.attn.qkv"]
COUNTS = {"LoRA": [3, 0, 1], "full fine-tuning": [0, 0, 2]}
SIMILARITY = np.array([[0.9, 0.1, 0.0, 0.2], [0.1, 0.2, 0.3, 0.1], [0.0, 0.8, 0.1, 0.5]])


@pytest.fixture
def figure(tmp_path, drawn):
    figures = drawn(adapter_diagnostics)
    save_intruders(tmp_path / "intruders.png", SIMILARITY, NAMES[0], NAMES, COUNTS, threshold=0.5)
    return figures[0]


def test_matrix_and_its_intruders(figure):
    axes = figure.axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), SIMILARITY)
    assert axes.images[0].get_clim() == (0, 1)
    assert axes.get_title(loc="left") == NAMES[0]
    rows = axes.get_yticklabels()
    assert [row.get_text() for row in rows] == ["1", "2", "3"]
    assert [row.get_color() == INTRUDER_COLOUR for row in rows] == [False, True, False]
    columns = dict(zip(axes.get_xticks(), (label.get_text() for label in axes.get_xticklabels()), strict=True))
    assert columns == {0: "1", 1: "2", 2: "3", 3: "4"}
    # the strongest vector is at the top
    assert axes.get_ylim()[0] > axes.get_ylim()[1]


def test_bars_are_the_counts_of_each_layer(figure):
    axes = figure.axes[1]
    for bars, (name, counts) in zip(axes.containers, COUNTS.items(), strict=True):
        assert bars.get_label() == name
        assert [bar.get_width() for bar in bars] == counts
        # each bar is nearest to the tick of its own layer
        centres = [bar.get_y() + bar.get_height() / 2 for bar in bars]
        assert [round(centre) for centre in centres] == [0, 1, 2]
    assert [label.get_text() for label in axes.get_yticklabels()] == NAMES
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(COUNTS)


def test_the_picture_shows_them(figure, tmp_path, pixels_of):
    first = pixels_of(tmp_path / "intruders.png", to_hex("C0"))
    second = pixels_of(tmp_path / "intruders.png", to_hex("C1"))
    # areas are as the sums of counts, and legends add little
    assert len(first) / len(second) == pytest.approx(4 / 2, rel=0.3)
    assert len(pixels_of(tmp_path / "intruders.png", INTRUDER_COLOUR)) > 3


def test_no_intruders_at_all(tmp_path, drawn):
    figures = drawn(adapter_diagnostics)
    save_intruders(tmp_path / "none.png", np.eye(2, 40), "head", ["head"], {"LoRA": [0]}, threshold=0.5)
    axes = figures[0].axes
    assert axes[1].get_xlim()[1] >= 1
    ticks = [label.get_text() for label in axes[0].get_xticklabels()]
    assert ticks[0] == "1"
    assert all(1 <= int(tick) <= 40 for tick in ticks)
