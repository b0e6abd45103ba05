"""Lightning data modules: from a dataset card to batches."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Sampler

from vision_lowrank.argument_types import check_least, wrong_argument
from vision_lowrank.data.cards import DatasetCard, FileEntry, PublishedSplit, load_card
from vision_lowrank.data.download import fetch
from vision_lowrank.data.patches import EpochShuffle, PatchDataset, allocate_cube, collate_batch, reflect_border
from vision_lowrank.data.preprocessing import ScenePreprocessor
from vision_lowrank.data.scene import IGNORE, Scene, open_scene, read_labels
from vision_lowrank.data.splits import Split, block_split, file_split, random_split
from vision_lowrank.errors import ConfigError
from vision_lowrank.processes import SharedBatches

logger = logging.getLogger(__name__)

Loader = DataLoader[dict[str, Tensor]]


class SceneDataModule(L.LightningDataModule):
    """Patches of one scene, split, scaled and batched.

    Give the Trainer `use_distributed_sampler=False`: batches of training and validation are shared among processes
    already.

    After `setup`: `scene`, `split`, `preprocessor`, `num_classes`, `num_channels` and the padded `cube`.

    Args:
        card: name of a dataset card, or path of a card file.
        root: data folder; missing files are fetched into it where the card says from where.
        patch_size: side of the patches in pixels, odd.
        components: principal components, or None for all bands.
        whiten: unit variance for each component.
        split: `kind` (random, blocks or from_file) and the arguments of its function in `splits`, such as
            {"kind": "random", "train": 0.09, "validation": 0.01}. `guard` of blocks defaults to patch_size - 1, `seed`
            to the module's. from_file takes `published`, a name in the card's `splits`, or `train_file` and perhaps
            `test_file`, paths in the data folder.
        batch_size: of a training step, over all processes together.
        evaluation_batch_size: of validation, test and prediction.
        seed: of split and order of training samples.
        num_workers: loader processes; patches are cheap, 0 is fastest on most machines.
        brightness: false leaves the brightness of spectra out, see `spectral_shape`.
    """

    def __init__(
        self,
        card: str,
        root: str,
        patch_size: int,
        components: int | None,
        whiten: bool,
        split: Mapping[str, Any],
        batch_size: int,
        evaluation_batch_size: int,
        seed: int,
        num_workers: int = 0,
        brightness: bool = True,
    ) -> None:
        super().__init__()
        check_least(1, batch_size=batch_size, evaluation_batch_size=evaluation_batch_size)
        check_least(0, num_workers=num_workers, seed=seed)
        self.card = load_card(card)
        self.root = root
        self.patch_size = patch_size
        self.split_options = dict(split)
        self.batch_size = batch_size
        self.evaluation_batch_size = evaluation_batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.preprocessor = ScenePreprocessor(components, whiten, brightness)
        self.scene: Scene
        self.split: Split
        self.cube: Tensor
        self._shared: dict[str, Tensor] = {}
        self._ready = False

    @property
    def num_classes(self) -> int:
        """Number of classes on the card."""
        return len(self.card.classes)

    @property
    def num_channels(self) -> int:
        """Channels of a sample: components, or usable bands."""
        return self.preprocessor.num_channels

    def model_arguments(self) -> dict[str, Any]:
        """Returns what a model has to be told of the data."""
        return {"in_chans": self.num_channels, "num_classes": self.num_classes, "img_size": self.patch_size}

    def prepare_data(self) -> None:
        """Fetches missing files; Lightning calls it on one process only."""
        fetch(self.card, self.root)

    def setup(self, stage: str | None = None) -> None:
        """Opens the scene, splits it, fits scaling and components on the training pixels and pads the cube; once."""
        if self._ready:
            return
        fetch(self.card, self.root)
        self.scene = open_scene(self.card, self.root)
        self.split = make_split(
            self.splittable_labels(),
            self.scene.valid,
            self.card,
            self.root,
            self.patch_size,
            self.split_options,
            self.seed,
        )
        logger.info(
            "%s, %s split: %s; leakage %.1f %% of test pixels",
            self.scene.name,
            self.split.kind,
            ", ".join(f"{indices.size} {name}" for name, indices in self.split.subsets().items()),
            100 * self.split.leakage(self.patch_size),
        )
        if absent := self.split.parameters.get("absent_classes"):
            logger.info(
                "left out of test and validation, for want of training pixels: %s (%d pixels)",
                ", ".join(self.card.classes[index].name for index in absent),
                self.split.parameters["dropped_pixels"],
            )
        rows, columns = np.divmod(self.scaling_pixels(), self.split.shape[1])
        self.preprocessor.fit(self.scene.image[:, rows, columns].T)
        cube, inside = allocate_cube(self.num_channels, *self.split.shape, self.patch_size)
        self.preprocessor.transform(self.scene.image, out=inside)
        # pixels without values take the training mean: whatever zero stood for in the file is an outlier after scaling
        inside[:, ~self.scene.valid] = 0
        self.cube = reflect_border(cube, self.patch_size)
        self._shared = {"gsd": torch.tensor(self.scene.gsd)}
        if self.preprocessor.projection is None:
            self._shared["wavelengths"] = torch.from_numpy(self.scene.bands.wavelengths)
        self._ready = True

    def scaled_image(self) -> np.ndarray:
        """Returns the scaled scene, float32 (channels, height, width); a view of the cube."""
        radius = self.patch_size // 2
        height, width = self.split.shape
        return self.cube.numpy()[:, radius : radius + height, radius : radius + width]

    def splittable_labels(self) -> np.ndarray:
        """Returns the labels that are divided into training, validation and test, (height, width)."""
        return self.scene.labels

    def scaling_pixels(self) -> np.ndarray:
        """Returns the flat indices of the pixels that scaling and components are fitted on."""
        return self.split.train

    def pretraining_pixels(self) -> np.ndarray:
        """Returns the flat indices of the pixels for training without labels: all that have values.

        Test pixels are among them, so that what is trained is transductive.
        """
        return np.flatnonzero(self.scene.valid)

    def training_counts(self) -> np.ndarray:
        """Returns the number of training pixels of each class, int64 (num_classes,)."""
        return np.bincount(self.scene.labels.flat[self.split.train], minlength=self.num_classes)

    def train_dataloader(self) -> Loader:
        """Returns the training pixels in an order that seed and epoch tell."""
        return self._shuffled(self.split.train)

    def pretrain_dataloader(self) -> Loader:
        """Returns `pretraining_pixels` in an order that seed and epoch tell."""
        return self._shuffled(self.pretraining_pixels())

    def val_dataloader(self) -> Loader:
        """Returns the validation pixels, of which each process gets its share."""
        dataset = self._dataset(self.split.validation)
        return self._batched(dataset, SharedBatches(range(len(dataset)), self.evaluation_batch_size, evaluation=True))

    def test_dataloader(self) -> Loader:
        """Returns the test pixels."""
        return self._ordered(self.split.test)

    def predict_dataloader(self) -> Loader:
        """Returns every pixel of the scene, row by row; unlabelled ones with label 255."""
        return self._ordered(np.arange(self.scene.labels.size))

    def predict_dataloaders(self) -> dict[str, Loader]:
        """Returns what to predict on by name; the results of "" are the run's own, others are rows beside them."""
        return {"": self.predict_dataloader()}

    def assemble(self, predictions: np.ndarray) -> np.ndarray:
        """Makes predictions for the batches of a loader of `predict_dataloaders` into (height * width, classes)."""
        return predictions

    def _shuffled(self, indices: np.ndarray) -> Loader:
        dataset = self._dataset(indices)
        # a last batch of one sample has no batch statistics
        whole = len(dataset) > self.batch_size
        order = EpochShuffle(len(dataset), self.seed)
        return self._batched(dataset, SharedBatches(order, self.batch_size, drop_last=whole))

    def _ordered(self, indices: np.ndarray) -> Loader:
        """Returns samples in their order, all on each process."""
        dataset = self._dataset(indices)
        return self._batched(dataset, BatchSampler(range(len(dataset)), self.evaluation_batch_size, drop_last=False))

    def _dataset(self, indices: np.ndarray) -> PatchDataset:
        return PatchDataset(self.cube, self.patch_size, indices, self.scene.labels, self._shared)

    def _batched(self, dataset: Any, batches: Sampler[list[int]]) -> Loader:
        return DataLoader(dataset, batch_sampler=batches, collate_fn=collate_batch, num_workers=self.num_workers)


def make_split(
    labels: np.ndarray,
    valid: np.ndarray,
    card: DatasetCard,
    root: str,
    patch_size: int,
    options: Mapping[str, Any],
    seed: int,
) -> Split:
    """Makes the split that a configuration asks for; see `SceneDataModule` for its options.

    Raises:
        ConfigError: an option is unknown or missing, or the guard bands are narrower than the patches need.
        SplitError: the scene has too few pixels for it.
    """
    arguments = {"seed": seed, **options}
    kind = arguments.pop("kind", None)
    functions: dict[Any, Callable[..., Split]] = {
        "random": random_split,
        "blocks": block_split,
        "from_file": _published_split,
    }
    if kind not in functions:
        raise ConfigError(f"split.kind is {kind!r}; it can be random, blocks or from_file")
    if kind == "blocks" and arguments.get("guard") is None:
        arguments["guard"] = patch_size - 1
    if problem := wrong_argument(functions[kind], arguments):
        raise ConfigError(f"split of kind {kind}: {problem}; correct it")
    check_least(0, **{"split.seed": arguments["seed"]})
    try:
        if kind == "random":
            return random_split(labels, len(card.classes), **arguments, names=[entry.name for entry in card.classes])
        if kind == "blocks":
            if arguments["guard"] < patch_size - 1:
                raise ConfigError(
                    f"split.guard is {arguments['guard']}; patches of {patch_size} need {patch_size - 1} or more"
                )
            return block_split(labels, len(card.classes), **arguments)
        return _published_split(labels, valid, card, root, **arguments)
    except TypeError as error:
        problem = str(error).partition("() ")[2] or str(error)
        raise ConfigError(f"split of kind {kind}: {problem}; correct its options") from error


def _published_split(
    labels: np.ndarray,
    valid: np.ndarray,
    card: DatasetCard,
    root: str,
    validation: float,
    seed: int,
    published: str | None = None,
    train_file: str | None = None,
    test_file: str | None = None,
) -> Split:
    if published is not None:
        if published not in card.splits:
            raise ConfigError(f"split.published is {published!r}; the card has {', '.join(card.splits) or 'none'}")
        files = card.splits[published]
    elif train_file is not None:
        files = PublishedSplit(FileEntry(train_file), None if test_file is None else FileEntry(test_file))
    else:
        raise ConfigError("split of kind from_file: give `published` or `train_file`")
    train_map = read_labels(card, (files.train,), root)
    test_map = None if files.test is None else read_labels(card, (files.test,), root)
    for name, pixels in (("train", train_map), ("test", test_map)):
        # the scene's own labels of these pixels are gone already
        if pixels is not None and pixels.shape == valid.shape and (lost := (pixels != IGNORE) & ~valid).any():
            logger.warning("split from %s: %d %s pixels lack values; left out", files.train.path, lost.sum(), name)
            pixels[lost] = IGNORE
    return file_split(labels, train_map, test_map, validation, seed, files.train.path)
