"""The sprite world, against Pillow's own compositing and counting by hand."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vision_lowrank.data import sprites
from vision_lowrank.data.sprite_modules import (
    BoxDataModule,
    BoxDataset,
    ConceptDataModule,
    SpriteDataModule,
    SpriteDataset,
)
from vision_lowrank.data.sprites import (
    BACKGROUNDS,
    BASE,
    HELD_OUT,
    SIDE,
    SMALLEST,
    SPRITES,
    Picture,
    Placed,
    concept_pictures,
    crop,
    draw,
    lay_out,
    make_picture,
    paint_background,
    with_article,
    write_caption,
)
from vision_lowrank.errors import ConfigError


@pytest.mark.parametrize("size", [64, 31])
def test_a_drawn_sprite_is_what_pillow_composites(size):
    placed = Placed("owl", 0, 64 - size, size)
    picture = draw("grass", [placed], np.random.default_rng(3))
    background = paint_background("grass", np.random.default_rng(3))
    # the third sprite of the first row
    sheet = Image.open(sprites.SHEET).convert("RGBA").crop((128, 0, 192, 64)).resize((size, size), Image.LANCZOS)
    expected = Image.fromarray(np.rint(255 * background).astype(np.uint8)).convert("RGBA")
    expected.alpha_composite(sheet, (64 - size, 0))
    difference = np.abs(np.asarray(expected)[..., :3].astype(int) - picture)
    assert difference.max() <= 2
    assert np.abs(picture - 255 * background).max() > 100


def test_sprites_differ_in_shape_or_colour():
    pictures = np.stack([sprites.sprite(name, 32).reshape(-1) for name in SPRITES])
    distances = np.abs(pictures[:, None] - pictures).mean(-1) + np.eye(len(SPRITES))
    assert len(SPRITES) == 24
    assert set(HELD_OUT) == set(SPRITES) - set(BASE)
    assert set(HELD_OUT.values()) <= set(BASE)
    assert distances.min() > 0.05


@pytest.mark.parametrize(
    ("top", "left", "size", "place"),
    [
        (0, 0, 20, "at the top left"), (0, 22, 20, "at the top"), (22, 44, 20, "on the right"),
        (0, 0, 64, "in the middle"), (44, 44, 20, "at the bottom right"), (12, 12, 20, "in the middle"),
        (12, 11, 20, "on the left"), (11, 12, 20, "at the top"), (34, 2, 30, "at the bottom left"),
    ],
)  # fmt: skip
def test_places_are_thirds_of_the_picture(top, left, size, place):
    assert Placed("dog", top, left, size).place == place


def test_captions():
    dog, owl, cat = Placed("dog", 0, 0, 20), Placed("owl", 22, 44, 20), Placed("cat", 44, 22, 20)
    assert write_caption([dog], None, places=False) == "a dog"
    assert write_caption([owl, dog], "grass", places=False) == "an owl and a dog on grass"
    everything = write_caption([dog, owl, cat], "sky", places=True)
    assert everything == "a dog at the top left, an owl on the right and a cat at the bottom in the night sky"


def test_layouts_stay_inside_and_apart():
    generator = np.random.default_rng(0)
    sizes = []
    for index in range(200):
        count = 1 + index % 4
        placed = lay_out(BASE[:count], generator)
        assert [item.name for item in placed] == list(BASE[:count])
        masks = np.zeros((count, SIDE, SIDE), bool)
        for mask, item in zip(masks, placed, strict=True):
            mask[item.top : item.top + item.size, item.left : item.left + item.size] = True
            assert mask.sum() == item.size**2
        for one in range(count):
            for other in range(one):
                shared = (masks[one] & masks[other]).sum()
                assert shared <= 0.1 * min(masks[one].sum(), masks[other].sum())
        sizes += [item.size for item in placed] if count == 1 else []
    assert min(sizes) < 24
    assert max(sizes) > 60
    with pytest.raises(ConfigError, match="5 sprites do not fit"):
        lay_out(BASE[:5], generator)
    with pytest.raises(ConfigError, match="sprites of 32 to 40 pixels, 2 apart: a picture has 64, so give sizes up to"):
        lay_out(BASE[:2], generator, (32, 40), overlap=0, gap=2)


def test_layouts_without_room_end(monkeypatch):
    monkeypatch.setattr(sprites, "LAYOUTS", 30)
    # only in the four corners, 2 apart: nobody draws that
    with pytest.raises(ConfigError, match="4 sprites of 31 to 31 pixels, 2 apart: none of 30 layouts had room for all"):
        lay_out(BASE[:4], np.random.default_rng(0), (31, 31), overlap=0, gap=2)


def test_pictures_follow_from_seed_epoch_and_index():
    one, again = SpriteDataset(50, seed=1).picture(7), SpriteDataset(50, seed=1).picture(7)
    np.testing.assert_array_equal(one.image, again.image)
    assert (one.caption, one.sprites) == (again.caption, again.sprites)
    others = [SpriteDataset(50, 1).picture(8), SpriteDataset(50, 2).picture(7), SpriteDataset(50, 1, 1).picture(7)]
    assert all((other.image != one.image).any() for other in others)


def test_pictures_are_as_varied_as_stated_and_their_words_are_known():
    pictures = [SpriteDataset(1, 5).picture(index) for index in range(400)]
    words = set(sprites.vocabulary())
    assert all(set(picture.caption.replace(",", " ,").split()) <= words for picture in pictures)
    assert {item.name for picture in pictures for item in picture.sprites} == set(BASE)
    assert {picture.background for picture in pictures} == set(BACKGROUNDS)
    counts = np.bincount([len(picture.sprites) for picture in pictures]) / 400
    np.testing.assert_allclose(counts, [0, 0.4, 0.4, 0.2], atol=0.08)
    named = np.mean([BACKGROUNDS[picture.background] in picture.caption for picture in pictures])
    assert 0.84 < named < 0.96
    assert words >= set(HELD_OUT)


def test_a_sample_is_the_picture_from_minus_one_to_one():
    dataset = SpriteDataset(10, 0)
    sample, picture = dataset[3], dataset.picture(3)
    assert sample["caption"] == picture.caption
    assert sample["image"].shape == (3, SIDE, SIDE)
    assert sample["image"].dtype == torch.float32
    assert float(sample["image"][2, 5, 9]) == pytest.approx(picture.image[5, 9, 2] / 255 * 2 - 1, abs=1e-6)


def test_epochs_of_the_module_differ_and_repeat():
    data = SpriteDataModule(batch_size=4, steps=2, seed=3)
    first = [batch["caption"] for batch in data.train_dataloader()]
    data.trainer = SimpleNamespace(current_epoch=1)
    second = [batch["caption"] for batch in data.train_dataloader()]
    assert [len(batch) for batch in first] == [4, 4]
    assert first[0] == [SpriteDataset(8, 3, 0)[index]["caption"] for index in range(4)]
    assert second[1] == [SpriteDataset(8, 3, 1)[index]["caption"] for index in range(4, 8)]


def test_concept_pictures_show_the_concept_alone_in_many_sizes_and_beside_others():
    pictures = concept_pictures("fox", 24, seed=0)
    alone = [picture for picture in pictures if len(picture.sprites) == 1]
    beside = [picture for picture in pictures if len(picture.sprites) == 2]
    assert sorted(picture.sprites[0].size for picture in alone) == [20, 21, 22, 23, 24, 25, 27, 28, 29, 30, 31, 32]
    # each of the nine places in turn
    places = [picture.sprites[0].place for picture in pictures]
    assert len(set(places[:9])) == 9
    assert places[9:18] == places[:9]
    # each background once with and once without a neighbour
    assert sorted(picture.background for picture in alone) == sorted(BACKGROUNDS)
    assert sorted(picture.background for picture in beside) == sorted(BACKGROUNDS)
    for picture in alone:
        assert [item.name for item in picture.sprites] == ["fox"]
        assert picture.caption == f"<fox1> <fox2> {BACKGROUNDS[picture.background]}"
    for picture in beside:
        fox, other = (item.name for item in picture.sprites)
        assert (fox, other in BASE) == ("fox", True)
        assert picture.caption == f"<fox1> <fox2> and {with_article(other)} {BACKGROUNDS[picture.background]}"
    with pytest.raises(ConfigError, match="concept=dog: there are fox"):
        concept_pictures("dog", 3, 0)
    with pytest.raises(ConfigError, match="largest=41: sprites of 20 to 40 pixels"):
        concept_pictures("fox", 3, 0, largest=41)


def test_crops_hold_all_sprites_where_they_say():
    generator = np.random.default_rng(3)
    picture = Picture(
        np.zeros((SIDE, SIDE, 3), np.uint8), "", "red", (Placed("dog", 20, 8, 24), Placed("cat", 4, 40, 20))
    )
    for item in picture.sprites:
        picture.image[item.top : item.top + item.size, item.left : item.left + item.size, SPRITES.index(item.name)] = (
            255
        )
    found = [crop(picture, generator, smallest=40) for _ in range(50)]
    for cropped in found:
        for item in cropped.sprites:
            rows, columns = np.nonzero(cropped.image[..., SPRITES.index(item.name)] > 127)
            edges = (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1)
            asked = (item.top, item.left, item.top + item.size, item.left + item.size)
            assert np.abs(np.subtract(edges, asked)).max() <= 1
    sizes = {cropped.sprites[0].size for cropped in found}
    # squares from 52 pixels, which both sprites take, to all 64
    assert (min(sizes), max(sizes)) == (24, round(24 * 64 / 52))


def test_concept_batches_use_each_picture_alike():
    data = ConceptDataModule("bus", images=4, batch_size=6, steps=4, seed=1)
    batches = list(data.train_dataloader())
    assert [len(batch["caption"]) for batch in batches] == [6] * 4
    captions = [caption for batch in batches for caption in batch["caption"]]
    # now and then two crops are the same
    assert len({image.numpy().tobytes() for batch in batches for image in batch["image"]}) > 16
    assert all(caption.startswith("<bus1> <bus2>") for caption in captions)
    # with and without the place, now and then without the background
    assert len(set(captions)) > 4
    data.trainer = SimpleNamespace(current_epoch=1)
    assert captions != [caption for batch in data.train_dataloader() for caption in batch["caption"]]
    # pictures of one gray each, whatever the crop
    data.pictures = [replace(picture, image=picture.image * 0 + index) for index, picture in enumerate(data.pictures)]
    grays = [round((float(image.mean()) + 1) * 127.5) for batch in data.train_dataloader() for image in batch["image"]]
    assert sorted(grays) == [0] * 6 + [1] * 6 + [2] * 6 + [3] * 6


def test_boxes_hold_what_their_label_says():
    samples = [BoxDataset(1, 2)[index] for index in range(300)]
    labels = np.array([int(sample["label"]) for sample in samples])
    assert np.mean(labels == len(SPRITES)) == pytest.approx(0.4, abs=0.08)
    assert set(labels) == set(range(len(SPRITES) + 1))
    right = []
    for sample, label in zip(samples, labels, strict=True):
        top, left, bottom, right_edge = (round(float(edge)) for edge in sample["box"])
        assert SMALLEST / 2 <= bottom - top <= 1.25 * SIDE + 1
        if label == len(SPRITES) or min(top, left) < 0 or max(bottom, right_edge) > SIDE:
            continue
        found = sample["image"][:, top:bottom, left:right_edge].numpy().transpose(1, 2, 0) / 2 + 0.5
        found = np.asarray(Image.fromarray(np.uint8(255 * found)).resize((32, 32), Image.BILINEAR)) / 255
        errors = []
        for name in SPRITES:
            shape = sprites.sprite(name, 32)
            cover = shape[..., 3:]
            errors.append((np.abs(found * cover - shape[..., :3]).sum() / cover.sum(), name))
        right.append(min(errors)[1] == SPRITES[label])
    # the nearest sprite, pixel by pixel, since boxes are moved and scaled
    assert len(right) > 50
    assert np.mean(right) > 0.6


def test_held_out_boxes_are_not_those_of_training():
    data = BoxDataModule(batch_size=5, steps=1, held_out=5, seed=0)
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    images = [next(iter(loader))["image"] for loader in loaders]
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[1], images[2])
    assert torch.equal(images[1], next(iter(data.val_dataloader()))["image"])


def test_unknown_names_are_refused():
    generator = np.random.default_rng(0)
    with pytest.raises(ConfigError, match="background 'mud' is unknown; there are red"):
        paint_background("mud", generator)
    with pytest.raises(ConfigError, match="sprite 'wolf' is unknown"):
        draw("red", [Placed("wolf", 0, 0, 20)], generator)
    assert len(make_picture(generator, ("fox", "bus", "owl"), (0, 0, 1)).sprites) == 3
