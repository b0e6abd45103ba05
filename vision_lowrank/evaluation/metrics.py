"""Overall accuracy, average accuracy, Cohen's kappa and accuracy per class, all through torchmetrics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_cohen_kappa,
    multiclass_confusion_matrix,
)

from vision_lowrank.errors import DataError

IGNORE = 255


@dataclass(frozen=True, eq=False)
class Scores:
    """How well predictions meet labels; all accuracies are fractions between 0 and 1.

    Attributes:
        oa: overall accuracy, the share of pixels that are right.
        aa: average accuracy, the mean of `per_class` over the classes that occur in the labels.
        kappa: Cohen's kappa; None where it is undefined, because labels and predictions hold one class only.
        per_class: the share of each class's pixels that are right (recall); None for a class without labels.
        confusion: (classes, classes) int64 counts, rows are labels, columns predictions.
    """

    oa: float
    aa: float
    kappa: float | None
    per_class: tuple[float | None, ...]
    confusion: np.ndarray

    @property
    def pixels(self) -> tuple[int, ...]:
        """Labelled pixels of each class."""
        return tuple(int(count) for count in self.confusion.sum(axis=1))

    @property
    def absent(self) -> tuple[int, ...]:
        """Indices of the classes without labels, which `aa` leaves out."""
        return tuple(index for index, count in enumerate(self.pixels) if count == 0)

    def to_dict(self, class_names: Sequence[str]) -> dict[str, Any]:
        """Returns the scores as JSON can hold them, classes by name.

        Raises:
            DataError: the number of names is not the number of classes.
        """
        if len(class_names) != len(self.per_class):
            raise DataError(
                f"{len(class_names)} class names for scores of {len(self.per_class)} classes: give one each"
            )
        classes = [
            {"name": name, "pixels": pixels, "accuracy": accuracy}
            for name, pixels, accuracy in zip(class_names, self.pixels, self.per_class, strict=True)
        ]
        return {
            "oa": self.oa,
            "aa": self.aa,
            "kappa": self.kappa,
            "pixels": sum(self.pixels),
            "classes": classes,
            "absent_classes": [class_names[index] for index in self.absent],
            "confusion": self.confusion.tolist(),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Scores":
        """Returns the scores that `to_dict` described."""
        per_class = tuple(entry["accuracy"] for entry in content["classes"])
        confusion = np.array(content["confusion"], dtype=np.int64)
        return cls(content["oa"], content["aa"], content["kappa"], per_class, confusion)


def score(predictions: Tensor | np.ndarray, labels: Tensor | np.ndarray, num_classes: int) -> Scores:
    """Compares predicted with true classes.

    Args:
        predictions: class indices 0 to `num_classes - 1`, any shape.
        labels: class indices of the same shape; pixels labelled 255 do not count, whatever is predicted there.
        num_classes: number of classes, absent ones included.

    Raises:
        DataError: the shapes differ, an index is out of range, or no pixel is labelled.
    """
    predicted, true = torch.as_tensor(predictions), torch.as_tensor(labels)
    if predicted.shape != true.shape:
        raise DataError(f"predictions of shape {tuple(predicted.shape)} for labels of shape {tuple(true.shape)}")
    labelled = true != IGNORE
    predicted, true = predicted[labelled].long(), true[labelled].long()
    if true.numel() == 0:
        raise DataError(f"no labelled pixel to score: all labels are {IGNORE}")
    for name, values in (("prediction", predicted), ("label", true)):
        outside = values[(values < 0) | (values >= num_classes)]
        if outside.numel():
            raise DataError(f"{name} {int(outside[0])} is outside 0 to {num_classes - 1}: give class indices")
    confusion = multiclass_confusion_matrix(predicted, true, num_classes)
    present = confusion.sum(dim=1) > 0
    # torchmetrics' macro average counts an absent class as 0 as soon as one pixel is predicted to be of it
    recall = multiclass_accuracy(predicted, true, num_classes, average="none")
    kappa = float(multiclass_cohen_kappa(predicted, true, num_classes))
    return Scores(
        oa=float(multiclass_accuracy(predicted, true, num_classes, average="micro")),
        aa=float(recall[present].mean()),
        kappa=kappa if np.isfinite(kappa) else None,
        per_class=tuple(float(value) if there else None for value, there in zip(recall, present, strict=True)),
        confusion=confusion.cpu().numpy(),
    )
