"""Hyper-MAE: pretraining of LESS ViT by reconstruction of hidden channels and hidden positions (arXiv 2503.12843).

    patches (B, C, N, p p) -> keep C' channels and N' positions of each sample -> encoder (B, 1 + C', 1 + N', D)
    -> decoder width, hidden tokens put in (B, 1 + C, 1 + N, E) -> blocks -> predicted pixels (B, C, N, p p)

`B` batch, `C` channels, `N` positions, `p` patch side, `D` width of the encoder, `E` of the decoder.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vision_lowrank.argument_types import check_least, check_share
from vision_lowrank.errors import ConfigError
from vision_lowrank.models.layers.grid_block import Block, initialise, make_attention, make_context, turned_widths
from vision_lowrank.models.layers.low_rank_interpolation import LowRankInterpolation
from vision_lowrank.models.less_vit import LessViT, Patches
from vision_lowrank.processes import ALONE, Place, mean_over_processes, share_of

Seen = Literal["optical", "radar", "multi"]


@dataclass(frozen=True)
class Noise:
    """What decides which tokens are kept: those of the smallest values.

    Attributes:
        channels: (B, channels that may be seen).
        positions: (B or 1, N).
    """

    channels: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Reconstruction:
    """What a masked autoencoder made of a batch.

    Attributes:
        loss: the sum of its parts.
        position_loss: mean squared error at hidden positions, all channels (0 where none is hidden).
        channel_loss: mean squared error in hidden channels, all positions (likewise).
        prediction: (B, C, N, p p), in the units of `target`.
        target: (B, C, N, p p).
        hidden_channels: bool (B, C).
        hidden_positions: bool (B, N).
    """

    loss: Tensor
    position_loss: Tensor
    channel_loss: Tensor
    prediction: Tensor
    target: Tensor
    hidden_channels: Tensor
    hidden_positions: Tensor


class HyperMAE(nn.Module):
    """A LESS ViT and a decoder that reconstructs what it was not shown.

    Args:
        encoder: the model to pretrain.
        decoder_dim: width of the decoder.
        decoder_depth: its blocks.
        decoder_heads: its attention heads.
        decoder_channel_dim_per_head: see `LessViT`.
        mask_ratio: share of the positions that are hidden; of n, int(n * (1 - share)) are kept, as in the original,
            which in floating numbers is 3 of 20 at 0.8.
        channel_mask_ratio: share of the channels that are hidden, likewise.
        normalise_targets: standardise each target patch, so that its contrast counts and not its level.
        variance_floor: added to a patch's variance when it is standardised, in squared units of the input; keeps noise
            in flat patches from counting like a pattern.
        decoder_rotation: rotate in the decoder where the encoder rotates. Without, as in the original, a decoder does
            not know which position or channel it is to predict.
        interpolation_rank: of the `LowRankInterpolation` of the encoder's tokens that hidden tokens start from; None to
            start from mask tokens alone, as the paper.

    Raises:
        ConfigError: a share is not between 0 and 1, a width, a number of heads or a rank below 1, a depth or the floor
            below 0, or the encoder's embedding cannot have the decoder's widths.
    """

    def __init__(
        self,
        encoder: LessViT,
        decoder_dim: int = 512,
        decoder_depth: int = 4,
        decoder_heads: int = 16,
        decoder_channel_dim_per_head: int = 4,
        mask_ratio: float = 0.75,
        channel_mask_ratio: float = 0.5,
        normalise_targets: bool = True,
        variance_floor: float = 1e-2,
        decoder_rotation: bool = True,
        interpolation_rank: int | None = None,
    ) -> None:
        super().__init__()
        check_share(mask_ratio=mask_ratio, channel_mask_ratio=channel_mask_ratio)
        check_least(0, decoder_depth=decoder_depth, variance_floor=variance_floor)
        check_least(1, decoder_dim=decoder_dim, decoder_heads=decoder_heads)
        check_least(1, decoder_channel_dim_per_head=decoder_channel_dim_per_head)
        if interpolation_rank is not None and interpolation_rank < 1:
            raise ConfigError(f"interpolation_rank is {interpolation_rank}; give at least 1, or null for none")
        self.encoder = encoder
        self.mask_ratio = mask_ratio
        self.channel_mask_ratio = channel_mask_ratio
        self.normalise_targets = normalise_targets
        self.variance_floor = variance_floor
        kind = encoder.attention
        self.decoder_embedding = encoder.embedding if decoder_rotation or encoder.embedding == "sincos" else None
        self.decoder_turned = turned_widths(
            *(kind, self.decoder_embedding, decoder_dim, decoder_heads, decoder_channel_dim_per_head),
            ("decoder_dim", "decoder_heads", "decoder_channel_dim_per_head"),
        )
        self.decoder_embed = nn.Linear(encoder.num_features, decoder_dim)
        self.decoder_mask_token, self.decoder_channel_mask_token, self.decoder_spatial_mask_token = (
            nn.Parameter(torch.empty(decoder_dim).normal_(std=0.02)) for _ in range(3)
        )
        self.decoder_blocks = nn.ModuleList(
            Block(
                decoder_dim,
                make_attention(
                    *(kind, decoder_dim, decoder_heads, decoder_channel_dim_per_head),
                    *(encoder.rank, encoder.shared_values, encoder.qkv_bias, 0.0),
                ),
                encoder.mlp_ratio,
            )
            for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        size = encoder.patch_size**2
        self.decoder_pred = nn.ModuleDict({name: nn.Linear(decoder_dim, size) for name in encoder.patch_embed})
        self.interpolation = None if interpolation_rank is None else LowRankInterpolation(interpolation_rank)
        for name, part in self.named_children():
            if name != "encoder":
                part.apply(initialise)

    def draw_noise(
        self, patches: Patches, seen: Seen, generator: torch.Generator | None = None, place: Place = ALONE
    ) -> Noise:
        """Draws noise for one pass, on the processor, so that a seed gives the same masks on every device.

        Args:
            patches: what is to be reconstructed.
            seen: see `reconstruct`.
            generator: None for torch's own.
            place: of the process whose share of a batch the patches are; it takes its share of the batch's noise.
        """
        batch, _, positions = patches.pixels.shape[:3]
        start, stop = _seen_channels(patches, seen)
        drawn = torch.rand(batch * place[1], stop - start + positions, generator=generator)
        values = share_of(drawn, place).to(patches.pixels.device)
        return Noise(*values.split([stop - start, positions], dim=1))

    def reconstruct(self, patches: Patches, seen: Seen, noise: Noise, valid: Tensor | None = None) -> Reconstruction:
        """Hides, encodes, decodes and compares.

        Channels that a batch only has as padding are never kept and never count.

        Args:
            patches: from `LessViT.patches`.
            seen: the modality that channels are kept from; the channels of the other one are all hidden.
            noise: decides what is kept.
            valid: bool (B, N, p p), pixels whose error counts; None for all.

        Raises:
            ConfigError: the masks leave nothing visible.
        """
        channels, positions = self._keep(patches, seen, noise)
        batch, total, count = patches.pixels.shape[:3]
        hidden_channels = torch.ones(batch, total, dtype=torch.bool, device=channels.device)
        hidden_channels.scatter_(1, channels, False)
        hidden_positions = torch.ones(batch, count, dtype=torch.bool, device=channels.device)
        hidden_positions.scatter_(1, positions, False)
        tokens = self.encoder.encode(patches, channels, positions)
        prediction = self._decode(tokens, patches, channels, positions)
        pixels = patches.pixels.float()
        shift, gain = self.target_scale(pixels, valid)
        target = (pixels - shift) * gain
        error = (prediction.float() - target).square()
        weight = torch.ones_like(error[:, :1]) if valid is None else valid.unsqueeze(1).float()
        present = patches.coordinates.present
        counted = weight.expand_as(error) if present is None else weight * present[:, :, None, None]
        position_loss, channel_loss = (
            self._mean_by_modality(error, counted * mask, patches.optical)
            for mask in (hidden_positions[:, None, :, None], hidden_channels[:, :, None, None])
        )
        return Reconstruction(
            position_loss + channel_loss,
            position_loss,
            channel_loss,
            prediction,
            target,
            hidden_channels,
            hidden_positions,
        )

    def visible_channels(self, count: int) -> int:
        """Returns how many of `count` channels are not hidden."""
        return int(count * (1 - self.channel_mask_ratio))

    def _keep(self, patches: Patches, seen: Seen, noise: Noise) -> tuple[Tensor, Tensor]:
        """Returns the indices of kept channels (B, kept) and positions (B, kept), in rising order."""
        start, stop = _seen_channels(patches, seen)
        values = noise.channels
        if (present := patches.coordinates.present) is not None:
            values = values.masked_fill(~present[:, start:stop], torch.inf)
        # radar has so few channels that the authors hide none of them when nothing else is seen
        kept = stop - start if seen == "radar" else self.visible_channels(stop - start)
        # those of a sample with padding may not be more than it has
        if present is not None:
            kept = min(kept, int(present[:, start:stop].sum(1).min()))
        count = patches.pixels.shape[2]
        places = int(count * (1 - self.mask_ratio))
        if kept < 1 or places < 1:
            raise ConfigError(
                f"mask_ratio {self.mask_ratio} and channel_mask_ratio {self.channel_mask_ratio} leave {places} of "
                f"{count} positions and {kept} of {stop - start} channels visible; lower them, or take larger images"
            )
        channels = values.argsort(dim=1, stable=True)[:, :kept].sort(dim=1).values + start
        positions = noise.positions.argsort(dim=1, stable=True)[:, :places].sort(dim=1).values
        return channels, positions.expand(len(channels), -1)

    def _decode(self, tokens: Tensor, patches: Patches, channels: Tensor, positions: Tensor) -> Tensor:
        """Maps the encoder's tokens to predicted pixels (B, C, N, p p)."""
        tokens = self.decoder_embed(tokens)
        batch, total, count = patches.pixels.shape[:3]
        x = self.decoder_mask_token.to(tokens.dtype).repeat(batch, 1 + total, 1 + count, 1)
        x[:, 0, 1:] = self.decoder_channel_mask_token.to(tokens.dtype)
        x[:, 1:, 0] = self.decoder_spatial_mask_token.to(tokens.dtype)
        rows, columns = (torch.nn.functional.pad(index + 1, (1, 0)) for index in (channels, positions))
        coordinates = patches.coordinates
        if self.interpolation is not None:
            x = x + self.interpolation(tokens, coordinates, coordinates.keep(channels, positions)).to(x.dtype)
        sample = torch.arange(batch, device=tokens.device)[:, None, None]
        x[sample, rows[:, :, None], columns[:, None, :]] = tokens
        if self.decoder_embedding == "sincos":
            x = self.encoder.add_coordinates(x, coordinates)
        context = make_context(
            *(coordinates, self.encoder.field_radius, self.decoder_embedding or "none", self.decoder_turned),
            self.encoder.wavelength_range,
        )
        for block in self.decoder_blocks:
            x = block(x, context)
        x = self.decoder_norm(x)[:, 1:, 1:]
        parts = {"optical": x[:, : patches.optical], "radar": x[:, patches.optical :]}
        return torch.cat([self.decoder_pred[name](part) for name, part in parts.items() if part.shape[1]], 1)

    def target_scale(self, pixels: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns shift and gain (B, C, N, 1) with which pixels become targets, (pixels - shift) * gain.

        Statistics of a patch are those of its valid pixels.
        """
        if not self.normalise_targets:
            return torch.zeros_like(pixels[..., :1]), torch.ones_like(pixels[..., :1])
        weight = torch.ones_like(pixels[:, :1]) if valid is None else valid.unsqueeze(1).to(pixels.dtype)
        number = weight.sum(-1, keepdim=True)
        mean = (pixels * weight).sum(-1, keepdim=True) / number.clamp(min=1)
        variance = ((pixels - mean).square() * weight).sum(-1, keepdim=True) / (number - 1).clamp(min=1)
        return mean, (variance + self.variance_floor).rsqrt()

    def _mean_by_modality(self, error: Tensor, weight: Tensor, optical: int) -> Tensor:
        """Returns the weighted mean error of optical and of radar channels, averaged; 0 where nothing has weight."""
        means = []
        for part in (slice(0, optical), slice(optical, error.shape[1])):
            total = weight[:, part].sum()
            if self.training:
                # values that count are not equally many on all processes
                total = mean_over_processes(total)
            if total > 0:
                means.append((error[:, part] * weight[:, part]).sum() / total)
        return torch.stack(means).mean() if means else error.new_zeros(())


def _seen_channels(patches: Patches, seen: Seen) -> tuple[int, int]:
    """Returns the range of channels that may be kept."""
    total = patches.pixels.shape[1]
    ranges = {"optical": (0, patches.optical), "radar": (patches.optical, total), "multi": (0, total)}
    start, stop = ranges[seen]
    if start == stop:
        raise ConfigError(f"a pass over {seen} channels, but the images have none; choose another modal_mode")
    return start, stop
