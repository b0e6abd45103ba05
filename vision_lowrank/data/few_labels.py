"""Few labels: a division of a scene of which training keeps so many labelled pixels of each class.

The test stays as it is, and what is kept grows by adding pixels, so that a curve over the number of labels differs in
nothing else from point to point. Validation pixels are labels too: of these no more are kept than training keeps.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from vision_lowrank.data.modules import Loader, SceneDataModule
from vision_lowrank.data.scene import class_counts
from vision_lowrank.data.splits import Split
from vision_lowrank.errors import SplitError


def check_kept(kept: float | int) -> None:
    """Checks a number of labels.

    Raises:
        SplitError: it is neither a whole number from 1 on nor a share below 1.
    """
    if isinstance(kept, bool) or not (kept >= 1 if isinstance(kept, int) else 0 < kept < 1):
        raise SplitError(f"labels has {kept!r}; give whole numbers (pixels a class) or shares below 1 (0.05: 5 %)")


def keep_labels(split: Split, labels: np.ndarray, num_classes: int, kept: float | int) -> Split:
    """Keeps so many pixels of each class for training, and for validation.

    They are drawn by the seed of the split. A class of which there are fewer keeps those it has. `parameters` then
    tells `kept`, the numbers of training pixels in `kept_pixels` (num_classes,), and in `short_classes` the indices of
    the classes whose training pixels are fewer.

    Args:
        split: its training and validation pixels are those to draw from.
        labels: class indices (height, width).
        num_classes: number of classes.
        kept: pixels a class, or a share of all labelled pixels of the class in the scene, at least one.

    Raises:
        SplitError: see `check_kept`.
    """
    check_kept(kept)
    sizes = class_counts(labels, num_classes)
    wanted = [kept if isinstance(kept, int) else max(1, math.floor(size * kept + 0.5)) for size in sizes]
    drawn = {}
    for part, pixels in (("train", split.train), ("validation", split.validation)):
        classes = labels.flat[pixels]
        # a generator a class: the draw of one does not depend on how many pixels another has
        orders = [np.random.default_rng((split.seed, i)).permutation(pixels[classes == i]) for i in range(num_classes)]
        drawn[part] = np.concatenate([order[:count] for order, count in zip(orders, wanted, strict=True)])
    counts = np.bincount(labels.flat[drawn["train"]], minlength=num_classes)
    told = {
        "kept": kept,
        "kept_pixels": counts.tolist(),
        "short_classes": [index for index in range(num_classes) if 0 < counts[index] < wanted[index]],
    }
    parts = {name: np.sort(pixels) for name, pixels in drawn.items()}
    thinned = replace(
        split, train=parts["train"], validation=parts["validation"], parameters={**split.parameters, **told}
    )
    thinned.check(labels)
    return thinned


class FewLabelPatches(SceneDataModule):
    """Patches of one scene whose epochs have so many steps at least, however few the training pixels are.

    Args:
        steps: least batches of an epoch; training pixels are repeated, all equally often but for one, to fill them.
        options: as for `SceneDataModule`.
    """

    def __init__(self, steps: int, **options: Any) -> None:
        super().__init__(**options)
        self.steps = steps

    def train_dataloader(self) -> Loader:
        """Returns the training pixels, repeated, in an order that seed and epoch tell."""
        pixels = self.split.train
        return self._shuffled(np.resize(pixels, max(len(pixels), self.steps * self.batch_size)))
