"""Encoders of images of any sensor behind one interface, for benchmarks.

    image (B, C, H, W), wavelengths (C,) or (B, C), gsd -> features of patches (B, dim, h, w), of images (B, dim)

`B` batch, `C` channels, `H W` height and width in pixels, `h` = ceil(H / patch_size), `w` = ceil(W / patch_size). Sides
that patch_size does not divide are continued by their last pixels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vision_lowrank.argument_types import check_least
from vision_lowrank.errors import CheckpointError, ConfigError
from vision_lowrank.models.heads import quarters
from vision_lowrank.models.less_vit import FREE_SETTINGS, LessViT
from vision_lowrank.models.saved import load_saved

# (width, depth, heads) of the LESS ViTs that have names
_SIZES = {(192, 12, 3): "less_vit_tiny", (384, 12, 6): "less_vit_small", (768, 12, 12): "less_vit_base"}


class Encoder(Protocol):
    """What a benchmark needs of an encoder, which is an `nn.Module` besides; a user's own is one such class.

    UPerNet needs another method, `forward_patch_maps`, with the arguments of `forward_patch_features`, that returns
    four such results: of layers at each quarter of the depth, or whatever the encoder has, early ones first. Radar
    images need `prepare_radar`, which is told before `prepare` how many channels, the last ones, are radar; these have
    codes of their polarisation in place of wavelengths.

    Attributes:
        name: tells the model, how it reads channels, and whether its weights are random.
        dim: width of the features; right at the latest after `prepare`.
        patch_size: pixels along a side of what one feature stands for.
    """

    name: str
    dim: int
    patch_size: int

    def prepare(self, wavelengths: Sequence[float]) -> None:
        """Builds what depends on the task's channels, given in nanometres; called once, before anything else."""

    def forward_patch_features(self, image: Tensor, wavelengths: Tensor, gsd: Tensor | float) -> Tensor:
        """Returns (B, dim, ceil(H / patch_size), ceil(W / patch_size)).

        Args:
            image: (B, C, H, W), normalised.
            wavelengths: nanometres, (C,) or (B, C).
            gsd: metres a pixel, one for all or (B,).
        """

    def forward_image_features(self, image: Tensor, wavelengths: Tensor, gsd: Tensor | float) -> Tensor:
        """Returns (B, dim); arguments as for `forward_patch_features`."""


def checked_patch_features(encoder: Encoder, image: Tensor, wavelengths: Tensor, gsd: Tensor | float) -> Tensor:
    """Returns the features of patches of an encoder that may be anybody's; arguments as for `Encoder`.

    Raises:
        ConfigError: what it returns is not of the shape that it promises.
    """
    features = encoder.forward_patch_features(image, wavelengths, gsd)
    height, width = image.shape[-2:]
    size = encoder.patch_size
    return _checked(encoder, features, image, (len(image), encoder.dim, -(-height // size), -(-width // size)))


def checked_image_features(encoder: Encoder, image: Tensor, wavelengths: Tensor, gsd: Tensor | float) -> Tensor:
    """Returns the features of images; arguments and errors as for `checked_patch_features`."""
    return _checked(encoder, encoder.forward_image_features(image, wavelengths, gsd), image, (len(image), encoder.dim))


def checked_patch_maps(encoder: Any, image: Tensor, wavelengths: Tensor, gsd: Tensor | float) -> list[Tensor]:
    """Returns the four maps for UPerNet; arguments and errors as for `checked_patch_features`.

    Raises:
        ConfigError: the encoder has none, besides.
    """
    if not hasattr(encoder, "forward_patch_maps"):
        raise ConfigError(
            f"encoder {type(encoder).__name__} has no forward_patch_maps, which UPerNet needs; add it, or use "
            "head=linear"
        )
    maps = encoder.forward_patch_maps(image, wavelengths, gsd)
    if len(maps) != 4:
        raise ConfigError(f"encoder {type(encoder).__name__}: forward_patch_maps returns {len(maps)} maps, not four")
    height, width = (-(-side // encoder.patch_size) for side in image.shape[-2:])
    return [_checked(encoder, features, image, (len(image), encoder.dim, height, width)) for features in maps]


def _checked(encoder: Encoder, features: Tensor, image: Tensor, expected: tuple[int, ...]) -> Tensor:
    if tuple(features.shape) != expected:
        raise ConfigError(
            f"encoder {type(encoder).__name__}: features of images {tuple(image.shape)} are {tuple(features.shape)}, "
            f"not {expected}; mend dim={encoder.dim}, patch_size={encoder.patch_size} or what it returns"
        )
    return features


def pad_to_patches(image: Tensor, patch_size: int) -> Tensor:
    """Continues the sides of images (B, C, H, W) by their last pixels up to a multiple of `patch_size`."""
    height, width = image.shape[-2:]
    return F.pad(image, (0, -width % patch_size, 0, -height % patch_size), mode="replicate")


class LessEncoder(nn.Module):
    """LESS ViT: a patch's features are the mean over channels of its tokens, an image's the mean of its patches'.

    The tokens of patches that belong to no channel, which the authors' segmentation reads, are not used: Hyper-MAE
    predicts pixels from the channels' tokens, so that no prediction is ever read off the others.

    Args:
        model: architecture; its head is removed. None: that of the weights.
        weights: folder written by `LessViT.save_pretrained`, such as `encoder` in the run of a pretraining. None: the
            model stays as it is, random, and the name says so.

    Raises:
        CheckpointError: the weights are missing, damaged, or of another architecture.
        ConfigError: neither model nor weights are given.
    """

    def __init__(self, model: LessViT | None = None, weights: str | None = None) -> None:
        super().__init__()
        if weights is not None:
            model = _read_less(weights, model)
        if model is None:
            raise ConfigError("neither model nor weights are given; give one of them")
        model.reset_classifier(0)
        self.model = model
        self.dim = model.num_features
        self.patch_size = model.patch_size
        self.radar = 0
        depth = len(model.blocks)
        architecture = _SIZES.get((self.dim, depth, model.settings["num_heads"]), f"less_vit {self.dim} x {depth}")
        self.name = f"{architecture} ({'random' if weights is None else 'pretrained'})"

    def prepare(self, wavelengths: Sequence[float]) -> None:
        """Does nothing: any channels will do."""

    def prepare_radar(self, channels: int) -> None:
        """Takes so many last channels for radar; see `Encoder`. ConfigError: the model has no embedding for it."""
        if not self.model.settings["radar"]:
            raise ConfigError(f"{self.name} reads no radar; build it with model.model.radar=true, or sensors=[optical]")
        self.radar = channels

    def _split(self, image: Tensor, wavelengths: Tensor, gsd: Tensor | float) -> dict[str, Any]:
        """Returns what the model takes of optical channels and of radar; None where there are none."""
        optical = image.shape[1] - self.radar
        parts: dict[str, Any] = {"image": None, "wavelengths": None, "gsd": gsd}
        if optical:
            parts |= {"image": image[:, :optical], "wavelengths": wavelengths[..., :optical]}
        if self.radar:
            parts |= {"radar": image[:, optical:], "radar_wavelengths": wavelengths[..., optical:]}
        return parts

    def forward_patch_features(self, image: Tensor, wavelengths: Tensor, gsd: Tensor | float) -> Tensor:
        """Returns (B, dim, h, w); see `Encoder`."""
        return self._map(self.model.forward_features(**self._split(image, wavelengths, gsd)), image)

    def forward_patch_maps(self, image: Tensor, wavelengths: Tensor, gsd: Tensor | float) -> list[Tensor]:
        """Returns four (B, dim, h, w); see `Encoder`. ConfigError: there are fewer blocks."""
        found = self.model.forward_intermediates(
            **self._split(image, wavelengths, gsd),
            indices=quarters(len(self.model.blocks)), norm=True, output_fmt="BCND", intermediates_only=True,
        )  # fmt: skip
        return [self._map(tokens, image) for tokens in cast(list[Tensor], found)]

    def forward_image_features(self, image: Tensor, wavelengths: Tensor, gsd: Tensor | float) -> Tensor:
        """Returns (B, dim); see `Encoder`."""
        return self.forward_patch_features(image, wavelengths, gsd).mean((2, 3))

    def _map(self, tokens: Tensor, image: Tensor) -> Tensor:
        """Averages tokens (B, 1 + C, 1 + h w, dim) of images over their channels."""
        rows = -(-image.shape[-2] // self.patch_size)
        return rearrange(tokens[:, 1:, 1:].mean(1), "b (i j) d -> b d i j", i=rows)


def _read_less(weights: str, model: LessViT | None) -> LessViT:
    """Returns `model` with the weights in a folder, or what lies there; either without a head."""
    if missing := [name for name in ("config.json", "model.safetensors") if not (Path(weights) / name).is_file()]:
        raise CheckpointError(
            f"weights {weights}: no {missing[0]} there; give a folder written by LessViT.save_pretrained, such as "
            "`encoder` in the run of a pretraining"
        )
    try:
        loaded: LessViT = load_saved(LessViT, weights)
    except Exception as error:
        raise CheckpointError(
            f"weights {weights}: cannot be loaded as LessViT ({error}); give a folder of LessViT.save_pretrained"
        ) from error
    loaded.reset_classifier(0)
    if model is None:
        return loaded
    model.reset_classifier(0)
    found, needed = loaded.settings, model.settings
    if wrong := [key for key in needed if key not in FREE_SETTINGS and found[key] != needed[key]]:
        raise CheckpointError(
            f"weights {weights}: of another architecture: {', '.join(f'{key}={found[key]}' for key in wrong)}, not "
            f"{', '.join(str(needed[key]) for key in wrong)}; set these, or model to null"
        )
    model.load_state_dict(loaded.state_dict())
    return model


class BandStatistics(nn.Module):
    """The baseline that every foundation model must beat: mean, deviation, minimum and maximum of each band.

    It has no parameters and ignores wavelengths. An image's statistics are those of all its pixels.

    Args:
        patch_size: side of a patch in pixels.

    Raises:
        ConfigError: it is below 1.
    """

    name = "band_statistics"

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        check_least(1, patch_size=patch_size)
        self.patch_size = patch_size
        self.dim = 0

    def prepare(self, wavelengths: Sequence[float]) -> None:
        """Sets `dim` to four for each channel."""
        self.dim = 4 * len(wavelengths)

    def prepare_radar(self, channels: int) -> None:
        """Does nothing: statistics are of any channels."""

    def forward_patch_features(self, image: Tensor, wavelengths: Tensor, gsd: Tensor | float) -> Tensor:
        """Returns (B, 4 C, h, w), all means first, then deviations (of the population), minima and maxima."""
        p = self.patch_size
        return _statistics(rearrange(pad_to_patches(image, p), "b c (i p) (j q) -> b c i j (p q)", p=p, q=p))

    def forward_image_features(self, image: Tensor, wavelengths: Tensor, gsd: Tensor | float) -> Tensor:
        """Returns (B, 4 C) in the order of `forward_patch_features`."""
        return _statistics(image.flatten(2))


def _statistics(values: Tensor) -> Tensor:
    """Maps (B, C, ..., values) to (B, 4 C, ...)."""
    deviation, mean = torch.std_mean(values, -1, correction=0)
    return torch.cat([mean, deviation, values.amin(-1), values.amax(-1)], 1)
