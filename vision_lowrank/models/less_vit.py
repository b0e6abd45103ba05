"""LESS ViT: a transformer over channels and positions for images of any sensor (arXiv 2503.12843 and its successor).

    image (B, C, H, W), wavelengths (B, C) -> patches (B, C, N, p p) -> tokens (B, C, N, D), each channel by itself
    -> class tokens (B, 1 + C, 1 + N, D) + where each lies -> blocks -> LayerNorm -> logits (B, K) of the corner token

`B` batch, `C` channels (optical, then radar), `H W` height and width in pixels, `p` patch side, `N` patches, `D` width,
`K` classes. Row 0 of the tokens has a token a position that belongs to no channel, column 0 a token a channel that
belongs to no position, and the corner is the image's token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import PyTorchModelHubMixin
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import FeatureGetterNet, feature_take_indices
from timm.models._manipulate import MATCH_PREV_GROUP
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vision_lowrank.argument_types import check_least, check_share
from vision_lowrank.data.bands import SHORTEST_NANOMETRES, check_wavelengths
from vision_lowrank.errors import ConfigError, DataError
from vision_lowrank.models.layers.embeddings import (
    Coordinates,
    grid_coordinates,
    position_wavelength_embedding,
)
from vision_lowrank.models.layers.grid_block import Block, initialise, make_attention, make_context, turned_widths
from vision_lowrank.models.layers.kronecker_attention import Context
from vision_lowrank.models.saved import note_settings

Wavelengths = Tensor | Sequence[float]


@dataclass(frozen=True)
class Patches:
    """An image cut up for the model.

    Attributes:
        pixels: (B, C, N, p p), row by row.
        coordinates: of the patches.
        optical: number of optical channels; the others, after them, are radar.
        rows: patches along the height.
        columns: patches along the width.
    """

    pixels: Tensor
    coordinates: Coordinates
    optical: int
    rows: int
    columns: int


# settings that an encoder's weights do not depend on
FREE_SETTINGS = frozenset(
    {"num_classes", "global_pool", "init_values", "drop_rate", "attn_drop_rate", "drop_path_rate"}
)


def assemble(pixels: Tensor, rows: int) -> Tensor:
    """Puts patches (B, C, N, p p) together to images (B, C, H, W)."""
    size = round(pixels.shape[-1] ** 0.5)
    return rearrange(pixels, "b c (i j) (p q) -> b c (i p) (j q)", i=rows, p=size)


class LessViT(
    nn.Module, PyTorchModelHubMixin, library_name="vision-lowrank", license="apache-2.0", tags=["remote-sensing"]
):
    """LESS ViT for images with any channels, height, width and pixel size.

    Args:
        num_classes: number of logits; 0 for features.
        patch_size: side of a patch in pixels.
        embed_dim: width D.
        depth: number of blocks.
        num_heads: attention heads.
        channel_dim_per_head: the channels' share of a head's width.
        rank: Kronecker products in each attention.
        shared_values: True: one value projection for all ranks, whose products are summed (the paper's definition);
            False: one each, averaged (the successor's).
        attention: less, or full or additive for ablations.
        embedding: sincos adds the continuous positional-channel embedding; rope turns queries and keys instead.
        position_unit: metres: places in metres. patches: in patches times pixel size, as in the authors' code.
        wavelength_range: nanometres that the rotation spans.
        field_radius: in metres, how far positions see each other; None for everywhere.
        global_pool: token: the image's token; avg: mean of the patches' tokens.
        radar: whether the model has a patch embedding for radar channels.
        mlp_ratio: hidden width of the feed-forward relative to the width.
        qkv_bias: biases in the projections of queries, keys and values.
        drop_rate: dropout after attention and feed-forward.
        attn_drop_rate: dropout of attention weights.
        drop_path_rate: probability of dropping a residual branch.
        init_values: start of the residual branches' scales.

    Raises:
        ConfigError: settings contradict each other.
    """

    def __init__(
        self,
        num_classes: int = 0,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        channel_dim_per_head: int = 4,
        rank: int = 1,
        shared_values: bool = False,
        attention: Literal["less", "full", "additive"] = "less",
        embedding: Literal["sincos", "rope"] = "sincos",
        position_unit: Literal["metres", "patches"] = "metres",
        wavelength_range: Sequence[float] = (400.0, 2500.0),
        field_radius: float | None = None,
        global_pool: Literal["token", "avg"] = "token",
        radar: bool = True,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        init_values: float = 1.0,
    ) -> None:
        super().__init__()
        for name, given, known in (
            ("attention", attention, ("less", "full", "additive")),
            ("embedding", embedding, ("sincos", "rope")),
            ("position_unit", position_unit, ("metres", "patches")),
        ):
            if given not in known:
                raise ConfigError(f"{name} is {given!r}; it can be {' or '.join(known)}")
        check_least(1, patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads)
        check_least(1, channel_dim_per_head=channel_dim_per_head, rank=rank)
        check_least(0, num_classes=num_classes, field_radius=field_radius or 0)
        check_share(drop_rate=drop_rate, attn_drop_rate=attn_drop_rate, drop_path_rate=drop_path_rate)
        if int(embed_dim * mlp_ratio) < 1:
            raise ConfigError(f"mlp_ratio is {mlp_ratio}; of a width of {embed_dim} that leaves nothing, give more")
        self.patch_size = patch_size
        self.num_features = self.head_hidden_size = embed_dim
        self.feature_info = [
            {"module": f"blocks.{index}", "num_chs": embed_dim, "reduction": patch_size} for index in range(depth)
        ]
        self.rank = rank
        self.shared_values = shared_values
        self.mlp_ratio = mlp_ratio
        self.qkv_bias = qkv_bias
        self.attention = attention
        self.embedding = embedding
        self.position_unit = position_unit
        if len(wavelength_range) != 2 or not wavelength_range[0] < wavelength_range[1]:
            raise ConfigError(f"wavelength_range is {list(wavelength_range)}; give two nanometres, the lesser first")
        self.wavelength_range = (float(wavelength_range[0]), float(wavelength_range[1]))
        self.field_radius = field_radius
        self.global_pool: str
        self.grad_checkpointing = False
        self.turned = turned_widths(
            *(attention, embedding, embed_dim, num_heads, channel_dim_per_head),
            ("embed_dim", "num_heads", "channel_dim_per_head"),
        )
        modalities = ("optical", "radar") if radar else ("optical",)
        self.patch_embed = nn.ModuleDict({name: _patch_embedding(patch_size, embed_dim) for name in modalities})
        self.cls_token, self.channel_cls_token, self.spatial_cls_token = (
            nn.Parameter(torch.empty(embed_dim).normal_(std=0.02)) for _ in range(3)
        )
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                make_attention(
                    *(attention, embed_dim, num_heads, channel_dim_per_head, rank, shared_values, qkv_bias),
                    attn_drop_rate,
                ),
                *(mlp_ratio, drop_rate, drop_path_rate * index / max(1, depth - 1), init_values),
            )
            for index in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head: nn.Module
        self.apply(initialise)
        self.reset_classifier(num_classes, global_pool)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that build this model anew, without weights, as JSON keeps them."""
        given: Any = self._hub_mixin_config
        lists = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
        return {**lists, "num_classes": self.num_classes}

    def patches(
        self,
        image: Tensor | None,
        wavelengths: Wavelengths | None,
        gsd: Tensor | float,
        radar: Tensor | None = None,
        radar_wavelengths: Wavelengths | None = None,
        present: Tensor | None = None,
    ) -> Patches:
        """Checks a batch and cuts it up; sides that `patch_size` does not divide are continued by their last pixels.

        Args:
            image: optical channels (B, C, H, W), floating; another precision than the model's is converted.
            wavelengths: their centres in nanometres, (C,) or (B, C).
            gsd: pixel size in metres, one for all or (B,).
            radar: radar channels (B, C', H, W).
            radar_wavelengths: what tells radar channels apart, (C',) or (B, C'); LESS ViT has 5500 for VV, 5700 for VH.
            present: bool (B, C + C'), False for channels that only pad the batch.

        Raises:
            DataError: wavelengths or pixel size are missing, of another length, or cannot be nanometres or metres;
                image and radar are empty or of different sizes; `present` is no bool for each channel, or an image has
                none.
            ConfigError: there is no image, or the model does not read radar.
        """
        parts = [
            (name, part, self._wavelengths(name, part, values))
            for name, part, values in (("image", image, wavelengths), ("radar", radar, radar_wavelengths))
            if part is not None
        ]
        if not parts:
            raise ConfigError("neither image nor radar is given; give one of them")
        first, last = parts[0][1].shape, parts[-1][1].shape
        if (first[0], first[2:]) != (last[0], last[2:]):
            shapes = ", ".join(f"{name} {tuple(part.shape)}" for name, part, _ in parts)
            raise DataError(f"{shapes}: give both of one batch, height and width")
        pixels = torch.cat([part.to(self.cls_token.dtype) for _, part, _ in parts], dim=1)
        nanometres = torch.cat([values for *_, values in parts], dim=1)
        if present is not None and present.shape != nanometres.shape:
            raise DataError(f"present is {tuple(present.shape)}, the image has {tuple(nanometres.shape)} channels")
        if present is not None and present.dtype != torch.bool:
            raise DataError(f"present is {present.dtype}; give bool, False for channels that only pad the batch")
        if present is not None:
            # whatever stands there, NaN too, may not reach the others through weights of 0
            pixels = pixels.masked_fill(~present[:, :, None, None], 0.0)
            nanometres = nanometres.masked_fill(~present, SHORTEST_NANOMETRES)
        try:
            # not compared with len(), which would tie an exported graph to the size of one batch
            metres = torch.as_tensor(gsd, dtype=torch.float32, device=pixels.device).expand(pixels.shape[0])
        except (TypeError, ValueError, RuntimeError) as error:
            found = f"of shape {tuple(np.shape(gsd))}" if np.ndim(gsd) else repr(gsd)
            raise DataError(
                f"gsd is {found}; give the size of a pixel in metres, one for all {pixels.shape[0]} images or (batch,)"
            ) from error
        # an exported graph has no values to look at
        if not torch.compiler.is_exporting():
            if not pixels.numel():
                raise DataError(
                    f"the channels of the batch are {tuple(pixels.shape)}; give at least one image, channel and pixel"
                )
            if present is not None and not bool(present.any(1).all()):
                empty = torch.nonzero(~present.any(1)).flatten().tolist()
                raise DataError(f"present leaves images {empty} of the batch without a channel; leave them out")
            values = nanometres if present is None else nanometres[present]
            if not bool((values.isfinite() & (values > 0)).all()) or values.amin() < SHORTEST_NANOMETRES:
                check_wavelengths(values.flatten().tolist(), "wavelengths of the batch")
            if not bool((metres.isfinite() & (metres > 0)).all()):
                raise DataError(f"gsd is {metres.tolist()}; give the size of a pixel in metres, above 0")
        return self.cut(pixels, nanometres, metres, 0 if image is None else image.shape[1], present)

    def cut(
        self, pixels: Tensor, wavelengths: Tensor, gsd: Tensor, optical: int, present: Tensor | None = None
    ) -> Patches:
        """Cuts up channels (B, C, H, W) with wavelengths (B, C) and pixel sizes (B,) that were checked before."""
        size = self.patch_size
        height, width = pixels.shape[-2:]
        if height % size or width % size:
            pixels = F.pad(pixels, (0, -width % size, 0, -height % size), mode="replicate")
        rows, columns = pixels.shape[-2] // size, pixels.shape[-1] // size
        pixels = rearrange(pixels, "b c (i p) (j q) -> b c (i j) (p q)", p=size, q=size)
        coordinates = grid_coordinates(wavelengths, gsd, rows, columns, size, present)
        return Patches(pixels, coordinates, optical, rows, columns)

    def _wavelengths(self, name: str, part: Tensor, values: Wavelengths | None) -> Tensor:
        """Returns the wavelengths of one modality, (B, channels), as far as their number can be checked."""
        if part.ndim != 4 or not part.is_floating_point():
            raise DataError(
                f"{name} is {part.dtype} {tuple(part.shape)}; give scaled floats (batch, channels, height, width)"
            )
        if name == "radar" and "radar" not in self.patch_embed:
            raise ConfigError("radar is given, but the model has no embedding for it; build it with radar=True")
        label = "wavelengths" if name == "image" else "radar_wavelengths"
        if values is None:
            raise DataError(f"{name} has {part.shape[1]} channels but no {label}; give one each, in nanometres")
        nanometres = torch.as_tensor(values, dtype=torch.float32, device=part.device)
        if nanometres.shape not in (part.shape[1:2], part.shape[:2], (1, part.shape[1])):
            raise DataError(
                f"{label} are {tuple(nanometres.shape)} for {name} of {tuple(part.shape)}; give (channels,) or "
                "(batch, channels)"
            )
        return nanometres.expand(part.shape[:2])

    def context(self, coordinates: Coordinates) -> Context:
        """Returns what the coordinates mean to attention."""
        return make_context(coordinates, self.field_radius, self.embedding, self.turned, self.wavelength_range)

    def embed(self, patches: Patches, channels: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Returns the tokens before the first block, (B, 1 + kept channels, 1 + kept positions, D).

        Args:
            patches: see `Patches`.
            channels: indices of the channels to keep (B, kept); None for all. Positions likewise.
            positions: indices of the positions to keep (B, kept).
        """
        pixels, coordinates = patches.pixels, patches.coordinates
        if channels is not None and positions is not None:
            pixels = pixels.gather(1, channels[:, :, None, None].expand(-1, -1, *pixels.shape[2:]))
            pixels = pixels.gather(2, positions[:, None, :, None].expand(-1, pixels.shape[1], -1, pixels.shape[3]))
            coordinates = coordinates.keep(channels, positions)
        tokens = self._embed_pixels(pixels, channels, patches.optical)
        batch = tokens.shape[0]
        row = self.channel_cls_token.expand(batch, 1, tokens.shape[2], -1)
        column = torch.cat(
            [self.cls_token.expand(batch, 1, 1, -1), self.spatial_cls_token.expand(batch, tokens.shape[1], 1, -1)], 1
        )
        x = torch.cat([column, torch.cat([row.to(tokens.dtype), tokens], 1)], 2)
        return x if self.embedding == "rope" else self.add_coordinates(x, coordinates)

    def add_coordinates(self, x: Tensor, coordinates: Coordinates) -> Tensor:
        """Adds to tokens (B, 1 + C, 1 + N, any width) where they lie."""
        unit = self.patch_size if self.position_unit == "patches" else 1.0
        spectral, spatial = position_wavelength_embedding(coordinates, x.shape[-1], unit)
        return x + spectral.to(x.dtype) + spatial.to(x.dtype)

    def _embed_pixels(self, pixels: Tensor, channels: Tensor | None, optical: int) -> Tensor:
        """Applies to each channel the embedding of its modality."""
        count = pixels.shape[1]
        if channels is None:
            parts = {"optical": pixels[:, :optical], "radar": pixels[:, optical:]}
            return torch.cat([self.patch_embed[name](part) for name, part in parts.items() if part.shape[1]], 1)
        is_radar = channels >= optical
        if not bool(is_radar.any()):
            return self.patch_embed["optical"](pixels)
        flat, chosen = pixels.flatten(0, 1), is_radar.flatten()
        radar = self.patch_embed["radar"](flat[chosen])
        tokens = radar.new_empty(*flat.shape[:2], radar.shape[-1])
        tokens[chosen] = radar
        tokens[~chosen] = self.patch_embed["optical"](flat[~chosen])
        return tokens.unflatten(0, (-1, count))

    def encode(self, patches: Patches, channels: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Returns the normalised tokens of all, or of the kept, channels and positions; arguments as for `embed`."""
        x = self.embed(patches, channels, positions)
        kept = patches.coordinates
        if channels is not None and positions is not None:
            kept = kept.keep(channels, positions)
        context = self.context(kept)
        for block in self.blocks:
            x = self._run(block, x, context)
        return self.norm(x)

    def _run(self, block: nn.Module, x: Tensor, context: Context) -> Tensor:
        if self.grad_checkpointing and self.training:
            y: Tensor = checkpoint(block, x, context, use_reentrant=False)
            return y
        y = block(x, context)
        return y

    def forward_features(
        self,
        image: Tensor | None,
        wavelengths: Wavelengths | None,
        gsd: Tensor | float,
        radar: Tensor | None = None,
        radar_wavelengths: Wavelengths | None = None,
        present: Tensor | None = None,
    ) -> Tensor:
        """Maps a batch to its normalised tokens (B, 1 + C, 1 + N, D); arguments and errors as for `patches`."""
        return self.encode(self.patches(image, wavelengths, gsd, radar, radar_wavelengths, present))

    def forward_head(self, x: Tensor, present: Tensor | None = None, pre_logits: bool = False) -> Tensor:
        """Maps tokens (B, 1 + C, 1 + N, D) to logits (B, num_classes), or to features (B, D).

        Args:
            x: from `forward_features`.
            present: as there; padding takes no part in a mean.
            pre_logits: return features.
        """
        if self.global_pool == "token":
            pooled = x[:, 0, 0]
        elif present is None:
            pooled = x[:, 1:, 1:].mean((1, 2))
        else:
            means = x[:, 1:, 1:].mean(2)
            pooled = (means * present[..., None]).sum(1) / present.sum(1, keepdim=True)
        return pooled if pre_logits else self.head(pooled)

    def forward(
        self,
        image: Tensor | None,
        wavelengths: Wavelengths | None,
        gsd: Tensor | float,
        radar: Tensor | None = None,
        radar_wavelengths: Wavelengths | None = None,
        present: Tensor | None = None,
    ) -> Tensor:
        """Maps a batch to logits (B, num_classes); arguments and errors as for `patches`."""
        tokens = self.forward_features(image, wavelengths, gsd, radar, radar_wavelengths, present)
        return self.forward_head(tokens, present)

    def forward_intermediates(
        self,
        image: Tensor | None,
        wavelengths: Wavelengths | None,
        gsd: Tensor | float,
        radar: Tensor | None = None,
        radar_wavelengths: Wavelengths | None = None,
        present: Tensor | None = None,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "BCND"] = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Returns the tokens after chosen blocks, and before them the final ones.

        Args:
            image: this and the next five as for `patches`.
            wavelengths: see there.
            gsd: see there.
            radar: see there.
            radar_wavelengths: see there.
            present: see there.
            indices: blocks, or the number of last ones; None for all.
            norm: apply the last LayerNorm to intermediates too.
            stop_early: leave out the blocks after the last chosen one; the final tokens are then its.
            output_fmt: NCHW: the positions' tokens that belong to no channel, as maps (B, D, rows, columns). BCND: all
                tokens (B, 1 + C, 1 + N, D).
            intermediates_only: leave out the final tokens.

        Raises:
            ConfigError: another `output_fmt`; and as `patches`.
            DataError: as `patches`.
        """
        if output_fmt not in ("NCHW", "BCND"):
            raise ConfigError(f"output_fmt is {output_fmt!r}; it can be NCHW or BCND")
        taken, last = feature_take_indices(len(self.blocks), indices)
        patches = self.patches(image, wavelengths, gsd, radar, radar_wavelengths, present)
        x = self.embed(patches)
        context = self.context(patches.coordinates)
        found = []
        for index, block in enumerate(self.blocks[: last + 1] if stop_early or intermediates_only else self.blocks):
            x = self._run(block, x, context)
            if index in taken:
                tokens = self.norm(x) if norm else x
                if output_fmt == "NCHW":
                    tokens = rearrange(tokens[:, 0, 1:], "b (i j) d -> b d i j", i=patches.rows)
                found.append(tokens)
        return found if intermediates_only else (self.norm(x), found)

    def get_classifier(self) -> nn.Module:
        """Returns the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Puts a new head in place of the present one.

        Args:
            num_classes: number of logits; 0 leaves the features as they are.
            global_pool: what the head reads, see the class; None for what it has read.

        Raises:
            ConfigError: there is no such `global_pool`.
        """
        if global_pool is not None:
            if global_pool not in ("token", "avg"):
                raise ConfigError(f"global_pool is {global_pool!r}; it can be token or avg")
            self.global_pool = global_pool
        self.num_classes = num_classes
        note_settings(self, num_classes=num_classes, global_pool=self.global_pool)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades time for memory: while training, blocks compute their activations again for the gradient."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns which parameters belong to one layer, as timm's layer-wise learning rates read it.

        Args:
            coarse: not used, as by timm's ViT: a block is the coarsest group.
        """
        return {
            "stem": r"^cls_token|^channel_cls_token|^spatial_cls_token|^patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", MATCH_PREV_GROUP)],
        }

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Returns the names of parameters that weight decay must leave alone."""
        return {"cls_token", "channel_cls_token", "spatial_cls_token"}


def _patch_embedding(patch_size: int, dim: int) -> nn.Sequential:
    """Maps the pixels of a patch of one channel (..., p p) to (..., dim)."""
    return nn.Sequential(nn.Linear(patch_size**2, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))


default_cfgs = generate_default_cfgs(
    {name: {"classifier": "head", "num_classes": 0} for name in ("less_vit_tiny", "less_vit_small", "less_vit_base")}
)


class LessFeatures(FeatureGetterNet):
    """A LESS ViT of whose blocks some are read, by default the last three: what timm's `features_only` makes of it."""

    model: Any

    def forward(  # type: ignore[override]
        self,
        image: Tensor | None,
        wavelengths: Wavelengths | None,
        gsd: Tensor | float,
        radar: Tensor | None = None,
        radar_wavelengths: Wavelengths | None = None,
        present: Tensor | None = None,
    ) -> list[Tensor]:
        """Maps a batch to maps of features (B, D, rows, columns); arguments and errors as for `LessViT.patches`."""
        features: list[Tensor] = self.model.forward_intermediates(
            *(image, wavelengths, gsd, radar, radar_wavelengths, present, self.out_indices, self.norm),
            output_fmt=self.output_fmt,
            intermediates_only=True,
        )
        return features


def _create(name: str, pretrained: bool, sizes: dict[str, Any], given: dict[str, Any]) -> LessViT:
    # what other models have to be told of images
    passed_over: Any = ("in_chans", "img_size")
    model: LessViT = build_model_with_cfg(
        *(LessViT, name, pretrained),
        feature_cfg={"out_indices": 3, "feature_cls": LessFeatures},
        kwargs_filter=passed_over,
        **(sizes | given),
    )
    return model


@register_model
def less_vit_tiny(pretrained: bool = False, **kwargs: Any) -> LessViT:
    """Width 192, 12 blocks, 3 heads; about 5 million parameters."""
    return _create("less_vit_tiny", pretrained, {"embed_dim": 192, "num_heads": 3}, kwargs)


@register_model
def less_vit_small(pretrained: bool = False, **kwargs: Any) -> LessViT:
    """Width 384, 12 blocks, 6 heads; 18.4 million parameters, radar included."""
    return _create("less_vit_small", pretrained, {"embed_dim": 384, "num_heads": 6}, kwargs)


@register_model
def less_vit_base(pretrained: bool = False, **kwargs: Any) -> LessViT:
    """Width 768, 12 blocks, 12 heads; 72.5 million parameters, radar included."""
    return _create("less_vit_base", pretrained, {"embed_dim": 768, "num_heads": 12}, kwargs)
