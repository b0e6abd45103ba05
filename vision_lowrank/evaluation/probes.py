"""Probes of frozen features: nearest neighbours and logistic regression.

Features are rows (n, d), one a sample, or one a labelled patch or pixel for segmentation, which is then a
classification of rows. Labels are classes (n,), or 0 and 1 (n, K) for multilabel tasks.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from vision_lowrank.errors import ConfigError, DataError
from vision_lowrank.evaluation.metrics import IGNORE
from vision_lowrank.evaluation.task_metrics import METRICS, Kind, check_classes, image_confusion, score_task

logger = logging.getLogger(__name__)

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
# similarities, or votes, in memory at once (128 MB of float32)
BLOCK = 1 << 25
# scikit-learn warns where these do not suffice
ITERATIONS = 2000


def knn(train: Tensor, labels: Tensor, query: Tensor, k: int) -> Tensor:
    """Predicts from the k training rows of the highest cosine similarity.

    Args:
        train: features (n, d).
        labels: classes (n,) or labels (n, K) of 0 and 1, on the same device.
        query: features (m, d), on the same device; what is in memory beside them does not grow with m.
        k: neighbours.

    Returns:
        For classes the one of most neighbours (m,), of several such the one with the nearest neighbour; for labels
        the share of the neighbours that have each, float32 (m, K).

    Raises:
        ConfigError: there are fewer than k training rows.
        DataError: shapes do not fit, or a feature is not finite.
    """
    found = []
    for nearest in _nearest(train, labels, query, k):
        votes = labels[nearest]
        if labels.ndim == 2:
            found.append(votes.float().mean(1))
            continue
        # argmax takes the first of several maxima, and topk puts the nearest first
        winner = (votes[:, :, None] == votes[:, None, :]).sum(2).argmax(1)
        found.append(votes.gather(1, winner[:, None])[:, 0])
    return torch.cat(found)


def knn_masks(train: Tensor, masks: Tensor, query: Tensor, k: int, num_classes: int) -> Tensor:
    """Predicts the pixels of patches: the k training patches of the highest cosine similarity vote at each place.

    Of equals, and where no neighbour has a label, the class that is more frequent in training wins.

    Args:
        train: features of patches (n, d).
        masks: class of each pixel of the patches, integers (n, pixels); `IGNORE` has no vote. Patches without a label
            are passed over.
        query: features (m, d); what is in memory beside them and the result does not grow with m.
        k: neighbours.
        num_classes: K.

    Returns:
        Classes int64 (m, pixels).

    Raises:
        ConfigError: there are fewer than k training patches with a label.
        DataError: shapes do not fit, or a feature is not finite.
    """
    labelled = (masks != IGNORE).any(1)
    train, masks = train[labelled], masks[labelled]
    counts = torch.bincount(masks[masks != IGNORE].long(), minlength=num_classes)
    # less than a vote
    frequency = counts / (counts.sum() + 1) / 2
    found = []
    # no vote counts for one class more
    voted = torch.where(masks == IGNORE, num_classes, masks.long())
    pixels, one = voted.shape[1], frequency.new_ones(())
    for block in _nearest(train, masks, query, k):
        for nearest in block.split(max(1, BLOCK // ((k + num_classes + 1) * pixels))):
            near = voted[nearest]
            votes = frequency.new_zeros(len(near), num_classes + 1, pixels).scatter_add_(1, near, one.expand_as(near))
            found.append((votes[:, :num_classes] + frequency[:, None]).argmax(1))
    return torch.cat(found)


def _nearest(train: Tensor, labels: Tensor, query: Tensor, k: int) -> Iterator[Tensor]:
    """Yields indices of the nearest training rows, the nearest first, (block, k) for one block of queries at a time."""
    _check_rows("training", train, labels)
    _check_rows("query", query)
    if train.shape[1] != query.shape[1]:
        raise DataError(f"query features have {query.shape[1]} values, training features {train.shape[1]}")
    if not 1 <= k <= len(train):
        raise ConfigError(f"{k} neighbours of {len(train)} training rows: choose k from 1 to {len(train)}")
    known = F.normalize(train.float(), dim=1)
    for block in query.split(max(1, BLOCK // len(train))):
        yield (F.normalize(block.float(), dim=1) @ known.T).topk(k, dim=1).indices


@dataclass(frozen=True, eq=False)
class LogisticProbe:
    """A logistic regression whose strength was chosen without the data it will be judged on.

    Attributes:
        strength: scikit-learn's C, the inverse of the regularisation.
        validation: score on the validation rows at each strength tried.
        model: standardisation and regression, fitted on the training rows alone.
        kind: of the task.
    """

    strength: float
    validation: Mapping[float, float]
    model: Pipeline
    kind: Kind

    @property
    def chosen(self) -> str:
        """What was chosen, from what, for a table of results."""
        return f"C={self.strength:g} of {', '.join(f'{strength:g}' for strength in self.validation)}"

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Returns classes (n,), or probabilities float64 (n, K) of the labels.

        Raises:
            DataError: the features have another number of values than those of the training, or are not finite.
        """
        _check_rows("query", features)
        if features.shape[1] != self.model.n_features_in_:
            raise DataError(
                f"features of {features.shape[1]} values, the probe was fitted to {self.model.n_features_in_}"
            )
        found = self.model.predict_proba(features) if self.kind == "multilabel" else self.model.predict(features)
        return np.asarray(found)


def choose_logistic(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    kind: Kind,
    num_classes: int,
    strengths: Sequence[float] = STRENGTHS,
) -> LogisticProbe:
    """Fits logistic regressions to standardised training rows and keeps the one that is best on validation rows.

    Best is by the first metric of the kind of task (see `task_metrics`), over rows for segmentation; of equals the most
    regularised. Test rows have no way in. No random number is drawn, so equal rows give an equal probe.

    Args:
        train: features (n, d) and labels.
        validation: features and labels.
        kind: of the task; labels (n, K) are fitted one against the rest.
        num_classes: K.
        strengths: values of scikit-learn's C to try.

    Raises:
        ConfigError: no strength, or one that is not positive.
        DataError: shapes do not fit, a feature is not finite, a label is no class (leave unlabelled rows out), or all
            training rows are of one class.
    """
    if not strengths or min(strengths) <= 0:
        raise ConfigError(f"strengths {list(strengths)}: give at least one, all above 0")
    for name, (features, labels) in (("training", train), ("validation", validation)):
        _check_rows(name, features, labels)
    if kind != "multilabel":
        check_classes("training label", train[1], num_classes)
        if len(np.unique(train[1])) < 2:
            raise DataError(f"all training rows are of class {train[1][0]}: a probe needs two classes, take more rows")
    probes: dict[float, LogisticProbe] = {}
    scores: dict[float, float] = {}
    for strength in sorted(strengths):
        regression = LogisticRegression(C=strength, max_iter=ITERATIONS)
        model = make_pipeline(StandardScaler(), OneVsRestClassifier(regression) if kind == "multilabel" else regression)
        # float32 stops the solver early where classes are separable
        model.fit(train[0].astype(np.float64), train[1])
        probes[strength] = LogisticProbe(strength, scores, model, kind)
        scores[strength] = _validate(probes[strength].predict(validation[0]), validation[1], kind, num_classes)
        logger.info("C=%g: %s %.4f on validation", strength, METRICS[kind][0], scores[strength])
    # max takes the first of equals
    return probes[max(scores, key=lambda strength: scores[strength])]


def _validate(predictions: np.ndarray, labels: np.ndarray, kind: Kind, num_classes: int) -> float:
    if kind == "segmentation":
        predictions = image_confusion(predictions, labels, num_classes)[None]
    return score_task(kind, predictions, labels, num_classes)[METRICS[kind][0]]


def _check_rows(name: str, features: np.ndarray | Tensor, labels: np.ndarray | Tensor | None = None) -> None:
    if features.ndim != 2 or not len(features):
        raise DataError(f"{name} features of shape {tuple(features.shape)}: give at least one row (n, d)")
    if labels is not None and len(labels) != len(features):
        raise DataError(f"{len(features)} {name} features for {len(labels)} labels: give one each")
    if not torch.isfinite(torch.as_tensor(features)).all():
        raise DataError(f"a {name} feature is not finite: look at the encoder's output, and at pixels without data")
