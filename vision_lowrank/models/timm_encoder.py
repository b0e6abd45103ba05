"""timm models as encoders of images with any channels, by a stated policy for the channels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.models import load_state_dict
from torch import Tensor, nn

from vision_lowrank.argument_types import check_least
from vision_lowrank.errors import CheckpointError, ConfigError, DataError
from vision_lowrank.models.encoders import pad_to_patches
from vision_lowrank.models.heads import quarters
from vision_lowrank.models.less_vit import LessViT

# nanometres that a band may lie off the colour that it stands for
FARTHEST_BAND = 50.0


class TimmEncoder(nn.Module):
    """Any timm model of few input channels, with a stated policy for the many of a sensor.

    Features of patches are the model's last map. Those of an image are what its classifier would read where that is of
    the same width, and the mean of patches otherwise.

    Args:
        model_name: name of a registered timm model, perhaps with a tag.
        channels: how C channels become those that the model takes.
            select: the band nearest to each of the wavelengths `select`.
            average: bands in order of wavelength, longest first as in red, green, blue, are cut into groups of one
                size (or sizes one apart), and averaged.
            project: a learned 1 x 1 convolution without bias, which starts as `average`.
        pretrained: fetch the weights that timm names.
        weights: file of a state dict of the model; its classifier is left out. None: see `pretrained`.
        select: nanometres that each input channel of the model stands for.
        patch_size: pixels that one feature stands for; images are resized bicubically to that end. None: the model's
            own, and images as they are.

    Raises:
        ConfigError: settings contradict each other, or the model has no map of features.
        CheckpointError: weights are missing, damaged, or of another model.
    """

    def __init__(
        self,
        model_name: str,
        channels: Literal["select", "average", "project"],
        pretrained: bool = False,
        weights: str | None = None,
        select: Sequence[float] = (665.0, 560.0, 492.0),
        patch_size: int | None = None,
    ) -> None:
        super().__init__()
        if channels not in ("select", "average", "project"):
            raise ConfigError(f"channels is {channels!r}; it can be select, average or project")
        if pretrained and weights is not None:
            raise ConfigError(f"pretrained=true and weights {weights} are both given; give one of them")
        if patch_size is not None:
            check_least(1, patch_size=patch_size)
        self.model = _create_timm(model_name, pretrained)
        if weights is not None:
            _load_timm(self.model, weights)
        features, settings = self.model.feature_info[-1], self.model.pretrained_cfg
        self.in_chans, *size = settings["input_size"]
        if channels == "select" and len(select) != self.in_chans:
            raise ConfigError(f"select has {len(select)} wavelengths; {model_name} takes {self.in_chans} channels")
        self.channels = channels
        self.select = tuple(float(value) for value in select)
        self.projection: nn.Conv2d | None = None
        self.dim: int = features["num_chs"]
        self.reduction: int = features["reduction"]
        self.patch_size = self.reduction if patch_size is None else patch_size
        any_size = getattr(self.model, "dynamic_img_size", not settings.get("fixed_input_size", False))
        self.fixed_size = None if any_size else tuple(size)
        origin = "random" if weights is None else Path(weights).name
        self.name = f"{model_name} ({channels}, {'pretrained' if pretrained else origin})"

    def prepare(self, wavelengths: Sequence[float]) -> None:
        """Checks that the policy suits these channels, in nanometres, and builds the projection if it has one.

        Raises:
            ConfigError: no band is near enough to a wanted one, or there are too few to group.
        """
        values = torch.tensor([list(wavelengths)], dtype=torch.float32)
        if self.channels == "select":
            select_matrix(values, self.select)
            return
        matrix = average_matrix(values, self.in_chans)
        if self.channels == "project":
            parameter = next(self.model.parameters())
            self.projection = nn.Conv2d(matrix.shape[2], self.in_chans, 1, bias=False).to(parameter)
            with torch.no_grad():
                self.projection.weight.copy_(matrix[0, :, :, None, None])

    def forward_patch_features(self, image: Tensor, wavelengths: Tensor, gsd: Tensor | float) -> Tensor:
        """Returns (B, dim, h, w); see `Encoder`. Raises as `prepare`, and ConfigError for sizes the model refuses."""
        (features,) = self.model.forward_intermediates(
            self._input(image, wavelengths), indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        return features

    def forward_patch_maps(self, image: Tensor, wavelengths: Tensor, gsd: Tensor | float) -> list[Tensor]:
        """Returns four (B, dim, h, w); see `Encoder`.

        Raises:
            ConfigError: as `forward_patch_features`; or the blocks have maps of several sizes, as those of pyramids do.
        """
        info = self.model.feature_info
        taken = quarters(len(info))
        if any((info[index]["num_chs"], info[index]["reduction"]) != (self.dim, self.reduction) for index in taken):
            raise ConfigError(f"{self.name} has no four maps of one size for UPerNet; use head=linear, or a vit_*")
        maps: list[Tensor] = self.model.forward_intermediates(
            self._input(image, wavelengths), indices=taken, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        return maps

    def forward_image_features(self, image: Tensor, wavelengths: Tensor, gsd: Tensor | float) -> Tensor:
        """Returns (B, dim); see `forward_patch_features`."""
        if getattr(self.model, "head_hidden_size", None) != self.dim:
            return self.forward_patch_features(image, wavelengths, gsd).mean((2, 3))
        tokens = self.model.forward_features(self._input(image, wavelengths))
        pooled: Tensor = self.model.forward_head(tokens, pre_logits=True)
        return pooled

    def _input(self, image: Tensor, wavelengths: Tensor) -> Tensor:
        """Returns what the model takes, (B, in_chans, height, width), by the policy and in its size."""
        image = pad_to_patches(image, self.patch_size)
        height, width = (side // self.patch_size * self.reduction for side in image.shape[-2:])
        if self.fixed_size is not None and (height, width) != self.fixed_size:
            raise ConfigError(
                f"{self.name} takes images of {self.fixed_size} only, not {(height, width)}; give the patch_size that "
                f"makes {self.fixed_size[0] // self.reduction} rows of patches, or take a model of any size (vit_*)"
            )
        image = self._mix(image, wavelengths)
        if image.shape[-2:] == (height, width):
            return image
        # the antialiased filter exists in float32 only on some devices
        return F.interpolate(image.float(), (height, width), mode="bicubic", antialias=True)

    def _mix(self, image: Tensor, wavelengths: Tensor) -> Tensor:
        """Returns the channels of the model, (B, in_chans, H, W)."""
        if self.channels == "project":
            if self.projection is None or self.projection.in_channels != image.shape[1]:
                built = "none" if self.projection is None else self.projection.in_channels
                raise ConfigError(f"{self.name} projects {built} channels, not {image.shape[1]}; call prepare for them")
            mixed: Tensor = self.projection(image)
            return mixed
        values = torch.as_tensor(wavelengths, dtype=torch.float32, device=image.device)
        if values.shape not in (image.shape[1:2], image.shape[:2]):
            raise DataError(f"wavelengths {tuple(values.shape)} for images {tuple(image.shape)}: give one a channel")
        rows = values.reshape(-1, image.shape[1])
        matrix = select_matrix(rows, self.select) if self.channels == "select" else average_matrix(rows, self.in_chans)
        return torch.einsum("boc,bchw->bohw", matrix.to(image.dtype).expand(len(image), -1, -1), image)


def select_matrix(wavelengths: Tensor, wanted: Sequence[float]) -> Tensor:
    """Returns (B, number wanted, C), 1 for the band nearest to each wanted one and 0 elsewhere.

    Args:
        wavelengths: (B, C) in nanometres.
        wanted: nanometres.

    Raises:
        ConfigError: the nearest is farther off than `FARTHEST_BAND`.
    """
    distance, nearest = (wavelengths[:, None] - wavelengths.new_tensor(wanted)[:, None]).abs().min(2)
    near = (distance <= FARTHEST_BAND).all(0).tolist()
    if missing := [f"{value:g}" for value, found in zip(wanted, near, strict=True) if not found]:
        raise ConfigError(
            f"channels=select: no band within {FARTHEST_BAND:g} nm of {', '.join(missing)} nm; name other wavelengths "
            "in select, or take channels=average or project"
        )
    return F.one_hot(nearest, wavelengths.shape[1]).to(wavelengths.dtype)


def average_matrix(wavelengths: Tensor, groups: int) -> Tensor:
    """Returns (B, groups, C), rows that average neighbouring bands (B, C), the longest wavelengths first.

    Raises:
        ConfigError: there are fewer bands than groups.
    """
    bands = wavelengths.shape[1]
    if bands < groups:
        raise ConfigError(f"{bands} bands cannot be averaged in {groups} groups; take channels=select")
    rank = wavelengths.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    members = F.one_hot(rank * groups // bands, groups).to(wavelengths.dtype)
    return (members / members.sum(1, keepdim=True)).mT


def _create_timm(model_name: str, pretrained: bool) -> Any:
    """Returns a timm model without classifier, for images of any size where it offers that."""
    if not timm.is_model(model_name):
        raise ConfigError(f"model_name is {model_name!r}, which timm does not have; see timm.list_models()")
    try:
        try:
            model: Any = timm.create_model(model_name, pretrained=pretrained, num_classes=0, dynamic_img_size=True)
        except TypeError as error:
            if "dynamic_img_size" not in str(error):
                raise
            model = timm.create_model(model_name, pretrained=pretrained, num_classes=0)
    except Exception as error:
        kind = CheckpointError if pretrained else ConfigError
        raise kind(f"{model_name}: cannot be built ({error}); correct its name, or give a file as weights") from error
    # LESS ViT's maps take wavelengths beside an image
    by_contract = hasattr(model, "forward_intermediates") and not isinstance(model, LessViT)
    if not by_contract or not getattr(model, "feature_info", None):
        raise ConfigError(f"{model_name} has no map of features by timm's contract; take another model")
    return model


def _load_timm(model: Any, weights: str) -> None:
    """Loads a file into a model without classifier; every other tensor must be there."""
    classifier = model.pretrained_cfg["classifier"]
    heads = tuple(f"{name}." for name in ((classifier,) if isinstance(classifier, str) else classifier))
    try:
        state = load_state_dict(weights, weights_only=True)
        model.load_state_dict({name: value for name, value in state.items() if not name.startswith(heads)})
    except Exception as error:
        raise CheckpointError(
            f"weights {weights}: not a state dict of this model ({error}); give a file saved from it in timm's names"
        ) from error
