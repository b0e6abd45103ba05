"""What a network has to beat: classifiers of scikit-learn on exactly the same split."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from omegaconf import DictConfig
from rich.progress import track
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from vision_lowrank.data.modules import SceneDataModule
from vision_lowrank.data.patches import PatchDataset
from vision_lowrank.instantiate import instantiate, resolve

CHUNK_PIXELS = 2048


class Baseline(Protocol):
    """A classifier of pixels.

    Attributes:
        chosen: what was chosen on the validation pixels, or given.
    """

    chosen: dict[str, Any]

    def features(self, data: SceneDataModule, pixels: np.ndarray) -> np.ndarray:
        """Returns what the classifier looks at, (pixels, values)."""

    def fit(self, train: np.ndarray, labels: np.ndarray, validation: np.ndarray, held: np.ndarray) -> None:
        """Fits to features `train` with classes `labels`; chooses on `validation` with classes `held`."""

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Returns a probability for each class met in training, (pixels, classes met)."""


def is_baseline(node: DictConfig) -> bool:
    """Tells whether a model's configuration means a baseline."""
    return hasattr(resolve(node._target_), "probabilities")


def fit_baseline(node: DictConfig, data: SceneDataModule) -> tuple[np.ndarray, dict[str, Any]]:
    """Fits a baseline to the training pixels of a split and applies it to the whole scene.

    Returns:
        Probabilities, float32 (height * width, classes), and what was chosen.
    """
    baseline: Baseline = instantiate(node)
    labels, split = data.scene.labels, data.split
    baseline.fit(
        baseline.features(data, split.train),
        labels.flat[split.train],
        baseline.features(data, split.validation),
        labels.flat[split.validation],
    )
    result = np.zeros((labels.size, data.num_classes), dtype=np.float32)
    known = np.unique(labels.flat[split.train])
    name = node._target_.rpartition(".")[2]
    for start in track(range(0, labels.size, CHUNK_PIXELS), f"{name} on the scene", transient=True):
        pixels = np.arange(start, min(start + CHUNK_PIXELS, labels.size))
        result[pixels[:, None], known] = baseline.probabilities(baseline.features(data, pixels))
    return result, {"chosen": baseline.chosen}


class SpectralSVM:
    """Support vector machine with a radial kernel on the standardised spectrum of the pixel itself.

    C and gamma are those that classify most validation pixels rightly.

    Args:
        costs: values of C to choose from.
        gammas: values of gamma to choose from.
    """

    def __init__(self, costs: Sequence[float], gammas: Sequence[float]) -> None:
        self.grid = {"svc__C": list(costs), "svc__gamma": list(gammas)}
        self.chosen: dict[str, Any] = {}

    def features(self, data: SceneDataModule, pixels: np.ndarray) -> np.ndarray:
        """Returns the spectra, (pixels, bands)."""
        rows, columns = np.divmod(pixels, data.split.shape[1])
        return data.scene.image[:, rows, columns].T

    def fit(self, train: np.ndarray, labels: np.ndarray, validation: np.ndarray, held: np.ndarray) -> None:
        """Chooses C and gamma, then fits; see `Baseline.fit`."""
        split = PredefinedSplit(np.repeat([-1, 0], [len(train), len(validation)]))
        search = GridSearchCV(make_pipeline(StandardScaler(), SVC()), self.grid, cv=split, refit=False)
        search.fit(np.concatenate([train, validation]), np.concatenate([labels, held]))
        self.chosen = {name.removeprefix("svc__"): value for name, value in search.best_params_.items()}
        self.classifier = make_pipeline(StandardScaler(), SVC(**self.chosen)).fit(train, labels)

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Returns 1 for the class decided on and 0 for the others."""
        decided = self.classifier.predict(features)
        return np.asarray(decided[:, None] == self.classifier.classes_, dtype=np.float32)


class PatchForest:
    """Random forest on all values of the patch around the pixel.

    Args:
        trees: number of trees.
        seed: of the draws.
    """

    def __init__(self, trees: int, seed: int) -> None:
        self.classifier = RandomForestClassifier(trees, random_state=seed, n_jobs=-1)
        self.chosen: dict[str, Any] = {"trees": trees}

    def features(self, data: SceneDataModule, pixels: np.ndarray) -> np.ndarray:
        """Returns the flattened patches, (pixels, channels * side * side)."""
        patches = PatchDataset(data.cube, data.patch_size, pixels).__getitems__(range(len(pixels)))
        return patches["image"].flatten(1).numpy()

    def fit(self, train: np.ndarray, labels: np.ndarray, validation: np.ndarray, held: np.ndarray) -> None:
        """Fits to the training pixels; there is nothing to choose."""
        self.classifier.fit(train, labels)

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Returns the share of trees that vote for each class."""
        return np.asarray(self.classifier.predict_proba(features), dtype=np.float32)


class Chance:
    """No classifier: all classes of the training pixels alike, everywhere, but for what lets chance decide.

    Spread by a random walk it is what the walk does alone, with which other methods that are spread so have to be
    compared.

    Args:
        seed: of the draws.
    """

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)
        self.classes = 0
        self.chosen: dict[str, Any] = {}

    def features(self, data: SceneDataModule, pixels: np.ndarray) -> np.ndarray:
        """Returns nothing of each pixel, (pixels, 0)."""
        return np.empty((len(pixels), 0), np.float32)

    def fit(self, train: np.ndarray, labels: np.ndarray, validation: np.ndarray, held: np.ndarray) -> None:
        """Counts the classes; there is nothing to choose."""
        self.classes = len(np.unique(labels))

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Returns the same for each class, to a thousandth."""
        draws = self.generator.random((len(features), self.classes))
        return np.asarray((1 + 1e-3 * draws) / self.classes, dtype=np.float32)
