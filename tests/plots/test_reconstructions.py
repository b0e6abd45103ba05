import numpy as np

from vision_lowrank.plots import reconstructions
from vision_lowrank.plots.reconstructions import HIDDEN_COLOUR, save_reconstructions, save_spectra


def test_rows_share_the_stretch_of_their_target_and_hide_what_was_hidden(tmp_path, drawn):
    figures = drawn(reconstructions)
    generator = np.random.default_rng(0)
    images = generator.normal(5, 2, (2, 4, 6, 8))
    hidden = generator.random((2, 6, 8)) < 0.5
    filling = generator.normal(5, 2, images.shape)
    save_reconstructions(tmp_path / "a.png", images, hidden, {"made": filling}, (3, 1, 0))
    axes = np.array(figures[0].axes).reshape(2, 3)
    assert [panel.get_title() for panel in axes[0]] == ["target", "shown", "made"]
    for row in range(2):
        low, high = (np.percentile(images[row, [3, 1, 0]], share, axis=(1, 2)) for share in (2, 98))
        for panel, source in ((axes[row, 0], images[row]), (axes[row, 2], filling[row])):
            expected = np.stack([(source[c] - a) / (b - a) for c, a, b in zip((3, 1, 0), low, high, strict=True)], -1)
            np.testing.assert_allclose(panel.images[0].get_array(), expected.clip(0, 1))
        shown = np.asarray(axes[row, 1].images[0].get_array())
        assert (shown[hidden[row]] == HIDDEN_COLOUR).all()
        np.testing.assert_array_equal(shown[~hidden[row]], np.asarray(axes[row, 0].images[0].get_array())[~hidden[row]])


def test_spectra_are_in_order_of_wavelength_with_marks_where_shown(tmp_path, drawn):
    figures = drawn(reconstructions)
    wavelengths = np.array([700.0, 500.0, 600.0])
    lines = {"target": np.array([3.0, 1.0, 2.0]), "reconstruction": np.array([30.0, 10.0, 20.0])}
    save_spectra(tmp_path / "a.png", wavelengths, np.array([[True, False, True]]), [lines], ["pixel"])
    (axes,) = figures[0].axes
    found = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert found == {
        "target": [[500, 1], [600, 2], [700, 3]],
        "reconstruction": [[500, 10], [600, 20], [700, 30]],
        "shown": [[500, 1]],
    }
