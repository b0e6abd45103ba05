"""Scenes that cannot be shipped: files made up after their cards go through their experiments; `-m slow`."""

import json

import numpy as np
import pytest
import rasterio
import scipy.io
from hydra import compose, initialize_config_dir

from vision_lowrank.data.cards import load_card
from vision_lowrank.training import train


def write(path, values, key):
    """Writes (height, width, channels) as a published file of that name holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".mat":
        scipy.io.savemat(path, {key: values.squeeze()})
        return
    height, width, channels = values.shape
    options = {"driver": "ENVI", "height": height, "width": width, "count": channels, "dtype": values.dtype}
    with rasterio.open(path, "w", **options) as file:
        file.write(values.transpose(2, 0, 1))


def sizes(card):
    """Pixels of each class; a card may not tell them."""
    return [entry.pixels or 1500 for entry in card.classes]


def make_up(card, folder):
    """Writes fields of each class, as many pixels as the card says, whose spectra differ."""
    shape = card.shape
    generator = np.random.default_rng(0)
    spectra = generator.uniform(500, 4000, (len(card.classes) + 1, shape.channels))
    counts = sizes(card)
    rest = shape.height * shape.width - sum(counts)
    assert rest >= 0
    labels = np.repeat([0, *card.class_values()], [rest, *counts]).astype(np.uint8).reshape(shape.height, shape.width)
    places = np.repeat(np.arange(len(counts) + 1), [rest, *counts]).reshape(labels.shape)
    image = np.empty((*labels.shape, shape.channels), np.uint16)
    for row, classes in enumerate(places):
        image[row] = spectra[classes] + generator.normal(0, 200, (shape.width, shape.channels))
    for entry, values in ((card.files.image[0], image), (card.files.labels[0], labels[..., None])):
        write(folder / card.name / entry.path, values, entry.key)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize("name", ["whu_longkou", "whu_honghu", "whu_hanchuan", "salinas", "pavia_university"])
def test_experiments_run_on_files_as_their_cards_say(name, repository, tmp_path):
    card = load_card(name)
    make_up(card, tmp_path)
    with initialize_config_dir(str(repository / "configs"), version_base="1.3"):
        config = compose(
            "train", [f"experiment={name}", "debug=fast", f"data.root={tmp_path}", f"runs_root={tmp_path / 'runs'}"]
        )
    (result,) = train(config)
    (folder,) = (tmp_path / "runs" / name).iterdir()
    assert np.load(folder / "prediction.npy").shape == (card.shape.height, card.shape.width)
    assert (folder / "overview.png").stat().st_size > 10_000
    scores = json.loads((folder / "metrics.json").read_text())["scores"]
    assert sum(part["pixels"] for part in scores.values()) == sum(sizes(card))
    share = sum(scores[part]["pixels"] for part in ("train", "validation")) / sum(sizes(card))
    assert share == pytest.approx({"pavia_university": 0.05}.get(name, 0.02), abs=0.001)
    # eight steps on fields that a look at the spectrum tells apart
    assert result.scores["test"].oa > 0.3
