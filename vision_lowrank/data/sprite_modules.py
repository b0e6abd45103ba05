"""Lightning data modules of sprites: captioned pictures, a few pictures of one concept, boxes to be told apart."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vision_lowrank.argument_types import check_least
from vision_lowrank.data.sprites import (
    BACKGROUNDS,
    BASE,
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
    prompt_words,
    sprite,
    vary_caption,
)


def to_tensor(image: np.ndarray) -> Tensor:
    """Returns uint8 (height, width, 3) as float32 (3, height, width) from -1 to 1."""
    return torch.tensor(image).permute(2, 0, 1).float() / 127.5 - 1


class DrawnDataset(Dataset[dict[str, Any]]):
    """Pictures that are drawn when asked for, each from seed, epoch and index alone.

    Args:
        length: pictures in an epoch.
        seed: of the data.
        epoch: pictures differ from epoch to epoch.
    """

    def __init__(self, length: int, seed: int, epoch: int = 0) -> None:
        self.length = length
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def generator(self, index: int) -> np.random.Generator:
        """Returns the source of all that is random in a picture."""
        return np.random.default_rng([self.seed, self.epoch, index])


class SpriteDataset(DrawnDataset):
    """Pictures of base sprites with captions."""

    def picture(self, index: int) -> Picture:
        """Returns a picture with its layout."""
        return make_picture(self.generator(index), BASE)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns `image` float32 (3, 64, 64) from -1 to 1 and `caption`."""
        picture = self.picture(index)
        return {"image": to_tensor(picture.image), "caption": picture.caption}


class SpriteDataModule(L.LightningDataModule):
    """Endless pictures of the base sprites, in epochs that are a unit of bookkeeping only.

    The Trainer has to ask for a loader in each epoch (`reload_dataloaders_every_n_epochs=1`), else they repeat.

    Args:
        batch_size: pictures a step.
        steps: length of an epoch.
        seed: of the data.
        num_workers: processes that draw.
    """

    def __init__(self, batch_size: int = 16, steps: int = 200, seed: int = 0, num_workers: int = 0) -> None:
        super().__init__()
        check_least(1, batch_size=batch_size, steps=steps)
        check_least(0, num_workers=num_workers, seed=seed)
        self.batch_size = batch_size
        self.steps = steps
        self.seed = seed
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Returns the pictures of the Trainer's epoch."""
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        dataset = SpriteDataset(self.batch_size * self.steps, self.seed, epoch)
        return DataLoader(dataset, self.batch_size, num_workers=self.num_workers)


class ConceptDataModule(L.LightningDataModule):
    """A few pictures of a held-out sprite, over and over, in crops and with captions that vary.

    Whole pictures always show the sprite in the same few places, and a LoRA learns it in no others.

    Args:
        concept: name of the sprite.
        images: number of pictures.
        batch_size: pictures a step.
        steps: length of an epoch.
        seed: of the pictures and of their order.
        largest: side of the largest sprites in the pictures, before they are cropped.
    """

    def __init__(
        self,
        concept: str,
        images: int = 24,
        batch_size: int = 8,
        steps: int = 100,
        seed: int = 0,
        largest: int = SIDE // 2,
    ) -> None:
        super().__init__()
        check_least(1, images=images, batch_size=batch_size, steps=steps)
        check_least(0, seed=seed)
        self.pictures = concept_pictures(concept, images, seed, largest)
        self.batch_size = batch_size
        self.steps = steps
        self.seed = seed

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Returns the pictures, each about as often as the others, in an order that differs from epoch to epoch."""
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        generator = np.random.default_rng([self.seed, epoch])
        rounds = -(-self.batch_size * self.steps // len(self.pictures))
        order = np.concatenate([generator.permutation(len(self.pictures)) for _ in range(rounds)])
        chosen = [crop(self.pictures[index], generator) for index in order[: self.batch_size * self.steps]]
        samples = [
            {
                "image": to_tensor(picture.image),
                "caption": vary_caption(picture.sprites, picture.background, generator, prompt_words),
            }
            for picture in chosen
        ]
        return DataLoader(samples, self.batch_size)  # type: ignore[arg-type]  # a list is a map-style dataset


# boxes that show no sprite are at most so much in one, as intersection over union
APART = 0.2
# epochs of the boxes that validation and test use
HELD_OUT_EPOCHS = 2


class BoxDataset(DrawnDataset):
    """Pictures with a box and the number of the sprite that it shows, or, one more than the last, of none.

    Six in ten boxes are about a sprite; two lie elsewhere, beside or on parts of sprites; two show halves of two
    different sprites. Pictures are a little blurred, noisy and of changed contrast, as samples of a model are.
    """

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Returns `image` float32 (3, 64, 64), `box` (4,) as top, left, bottom, right in pixels, and `label` ()."""
        generator = self.generator(index)
        kind = generator.random()
        if kind < 0.8:
            picture = make_picture(generator, SPRITES, (0.3, 0.3, 0.2, 0.2))
            image, placed = picture.image, picture.sprites
        else:
            image, placed = _halves(generator)
        chosen = placed[generator.integers(len(placed))]
        box = _beside(placed, generator) if 0.6 <= kind < 0.8 else _around(chosen, generator)
        label = len(SPRITES) if kind >= 0.6 else SPRITES.index(chosen.name)
        return {
            "image": _spoil(image, generator),
            "box": torch.tensor(box, dtype=torch.float32),
            "label": torch.tensor(label),
        }


def _around(placed: Placed, generator: np.random.Generator) -> tuple[float, ...]:
    """Returns the box of a sprite, moved and scaled a little."""
    half = placed.size * generator.uniform(0.85, 1.25) / 2
    row, column = np.array((placed.top, placed.left)) + placed.size * (0.5 + generator.uniform(-0.12, 0.12, 2))
    return row - half, column - half, row + half, column + half


def _beside(placed: Sequence[Placed], generator: np.random.Generator) -> tuple[float, ...]:
    """Returns a box of any size that agrees with no sprite's."""
    while True:
        size = generator.uniform(SMALLEST, SIDE)
        top, left = generator.uniform(0, SIDE - size, 2)
        shared = (
            max(0.0, min(top + size, item.top + item.size) - max(top, item.top))
            * max(0.0, min(left + size, item.left + item.size) - max(left, item.left))
            for item in placed
        )
        if all(area <= APART * (size**2 + item.size**2 - area) for area, item in zip(shared, placed, strict=True)):
            return top, left, top + size, left + size
        # a picture full of one sprite leaves no room but for its parts
        if generator.random() < 0.05:
            return top, left, top + SMALLEST / 2, left + SMALLEST / 2


def _halves(generator: np.random.Generator) -> tuple[np.ndarray, tuple[Placed, ...]]:
    """Returns a picture of one thing put together from halves of two sprites, and where it is."""
    first, second = (SPRITES[index] for index in generator.choice(len(SPRITES), 2, replace=False))
    placed = lay_out([first], generator)[0]
    other = draw(str(generator.choice(list(BACKGROUNDS))), [], generator)
    size, middle = placed.size, placed.size // 2
    shape = sprite(first, size).copy()
    if generator.random() < 0.5:
        shape[middle:] = sprite(second, size)[middle:]
    else:
        shape[:, middle:] = sprite(second, size)[:, middle:]
    window = other[placed.top : placed.top + size, placed.left : placed.left + size]
    window[:] = np.rint(window * (1 - shape[..., 3:]) + 255 * shape[..., :3])
    return other, (placed,)


def _spoil(image: np.ndarray, generator: np.random.Generator) -> Tensor:
    """Returns a picture as float32 (3, height, width), perhaps blurred, of other contrast and with noise."""
    blurred = Image.fromarray(image).filter(ImageFilter.GaussianBlur(generator.uniform(0, 1)))
    tensor = to_tensor(np.asarray(blurred).copy()) * generator.uniform(0.85, 1.1) + generator.uniform(-0.1, 0.1)
    noise = generator.standard_normal(tensor.shape, np.float32) * np.float32(generator.uniform(0, 0.08))
    return (tensor + torch.from_numpy(noise)).clamp(-1, 1).float()


class BoxDataModule(L.LightningDataModule):
    """Boxes of all sprites for the classifier; those for validation and test have seeds that training never meets.

    Args:
        batch_size: boxes a step.
        steps: length of an epoch.
        held_out: boxes for validation, and as many for the test.
        seed: of the data.
        num_workers: processes that draw.
    """

    def __init__(
        self, batch_size: int = 64, steps: int = 100, held_out: int = 2000, seed: int = 0, num_workers: int = 0
    ) -> None:
        super().__init__()
        check_least(1, batch_size=batch_size, steps=steps, held_out=held_out)
        check_least(0, num_workers=num_workers, seed=seed)
        self.batch_size = batch_size
        self.steps = steps
        self.held_out = held_out
        self.seed = seed
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Returns the boxes of the Trainer's epoch."""
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        return self._loader(BoxDataset(self.batch_size * self.steps, self.seed, HELD_OUT_EPOCHS + epoch))

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Returns held-out boxes, the same each time."""
        return self._loader(BoxDataset(self.held_out, self.seed, 0))

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Returns further held-out boxes."""
        return self._loader(BoxDataset(self.held_out, self.seed, 1))

    def _loader(self, dataset: BoxDataset) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(dataset, self.batch_size, num_workers=self.num_workers)
