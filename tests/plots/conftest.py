"""Reading pictures back, and looking at figures before they are written."""

from contextlib import contextmanager

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from vision_lowrank.plots import figures


@pytest.fixture(autouse=True)
def _as_users_see_them(full_resolution):
    """Pictures themselves are tested at their full resolution."""


@pytest.fixture
def pixels_of():
    """Function that returns the (pixels, 2) rows and columns where a picture file has a colour."""

    def find(path, colour):
        picture = imread(path)[..., :3]
        return np.argwhere(np.abs(picture - to_rgb(colour)).max(axis=-1) < 1.5 / 255)

    return find


@pytest.fixture
def drawn(monkeypatch):
    """Function that lets a module keep the figures that it writes, and returns their list."""

    def keep(module):
        kept = []

        @contextmanager
        def recording(*arguments):
            with figures.figure_file(*arguments) as figure:
                yield figure
                kept.append(figure)

        monkeypatch.setattr(module, "figure_file", recording)
        return kept

    return keep
