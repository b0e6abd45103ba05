"""LoRA-Composer as its formulas read, slow on purpose: what `vision_lowrank.composer` is checked and timed against.

Every layer and step computes keys and values of all prompts with merged weights, each region's attention over the
whole image, and a dense mask for every head; probabilities are formed and kept in all layers; guidance goes through the
whole UNet and back, with parameters that want gradients. It takes one image, prompts of one layer and the constants of
the original code. `N` is the number of a map's positions, `T` of a prompt's tokens.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor

from vision_lowrank.composer.attention import regional_unet
from vision_lowrank.composer.layout import Box, Region, Scene, Text, UNet
from vision_lowrank.composer.sampler import Settings, guide, measure

ENHANCEMENT, FILL, REGION, SHARE = 8.0, 2.0, 10.0, 0.2
MAP_FACTOR = 4
MASKED = -1e6
PROJECTIONS = ("to_k", "to_v", "to_out.0")


class SlowComposer:
    """A UNet and a scene.

    Args:
        unet: of Stable Diffusion's layout with four levels; its attention layers are exchanged during a pass only.
        scene: what is to be composed; without background LoRAs.
    """

    def __init__(self, unet: UNet, scene: Scene) -> None:
        self.unet = unet.requires_grad_()
        self.scene = scene
        self.layers = [name.removesuffix(".processor") for name in unet.attn_processors]
        self.merged = [self._merge(region) for region in scene.regions]
        self.maps: dict[str, Tensor] = {}
        self.sizes: dict[int, tuple[int, int]] = {}

    def noise(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Maps (1, channels, height, width) to the UNet's output for the negative and the positive prompts (2, ...)."""
        with torch.no_grad():
            return self._run(torch.cat([sample, sample]), timestep)

    def layout(self, sample: Tensor, timestep: Tensor) -> list[Tensor]:
        """Returns, for each region, its cross-attention map (height, width, T) at a sample (1, ...)."""
        with torch.no_grad():
            self._run(sample, timestep)
        return self._cross_maps()

    def guide(self, sample: Tensor, timestep: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Returns the sums of each kind of loss at a sample (1, ...), and the gradient of their total."""
        sample = sample.detach().requires_grad_()
        self._run(sample, timestep)
        losses = self._losses()
        (gradient,) = torch.autograd.grad(torch.stack(list(losses.values())).sum(), sample, retain_graph=True)
        self.maps.clear()
        return {name: value.detach() for name, value in losses.items()}, gradient

    def prompted(self, name: str, attn: Any, query: Tensor, text: Text, weights: Sequence[Tensor]) -> Tensor:
        """Attends to a prompt from queries (rows, heads, N, width), keeps its map, returns (rows, N, C)."""
        to_k, to_v, to_out = weights
        states = torch.cat([text.negative, text.positive])[-len(query) :]
        key, value = (_split(F.linear(states, weight), attn.heads) for weight in (to_k, to_v))
        return F.linear(self.attend(name, query, key, value), to_out, attn.to_out[0].bias)

    def attend(self, name: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Returns what is attended to (rows, N, C); keeps the map of the positive prompts."""
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        probabilities = (scores if mask is None else scores + mask).softmax(-1)
        self.maps[name] = probabilities[-1].mean(0)
        return (probabilities @ value).transpose(1, 2).flatten(2)

    def masks(self, size: tuple[int, int]) -> Tensor:
        """Returns which positions of a map each region has, bool (regions, height, width)."""
        masks = torch.zeros(len(self.scene.regions), *size, dtype=torch.bool)
        for mask, region in zip(masks, self.scene.regions, strict=True):
            top, left, bottom, right = cells(region.box, size)
            mask[top:bottom, left:right] = True
        return masks

    def _merge(self, region: Region) -> dict[str, Tensor]:
        """Returns the region's weights of all cross-attention layers, the base's with its LoRAs added."""
        merged = {}
        for layer in self.layers:
            for name in (f"{layer}.{projection}" for projection in PROJECTIONS if layer.endswith("attn2")):
                weight = self.unet.get_submodule(name).weight.detach().clone()
                for lora, strength in region.loras:
                    if name in lora:
                        weight += strength * lora[name].scale * lora[name].up @ lora[name].down
                merged[name] = weight.requires_grad_()
        return merged

    def _run(self, sample: Tensor, timestep: Tensor) -> Tensor:
        height, width = sample.shape[2:]
        self.maps.clear()
        self.sizes.clear()
        for _ in self.unet.config.block_out_channels:
            self.sizes[height * width] = (height, width)
            height, width = (height + 1) // 2, (width + 1) // 2
        before = dict(self.unet.attn_processors)
        self.unet.set_attn_processor({f"{name}.processor": _Attention(self, name) for name in self.layers})
        try:
            states = torch.cat([self.scene.text.negative, self.scene.text.positive])[-len(sample) :]
            out: Tensor = self.unet(sample, timestep, states, return_dict=False)[0]
        finally:
            self.unet.set_attn_processor(before)
        return out

    def _map_layers(self, kind: str) -> list[str]:
        levels = len(self.unet.config.block_out_channels)
        down = MAP_FACTOR.bit_length() - 1
        blocks = (f"down_blocks.{down}.", f"up_blocks.{levels - 1 - down}.")
        return [name for name in self.layers if name.startswith(blocks) and name.endswith(kind)]

    def _cross_maps(self) -> list[Tensor]:
        names = self._map_layers("attn2")
        found = []
        for index in range(len(self.scene.regions)):
            flat = torch.stack([self.maps[f"{name}/{index}"] for name in names]).mean(0)
            found.append(flat.unflatten(0, self.sizes[len(flat)]))
        return found

    def _losses(self) -> dict[str, Tensor]:
        own = torch.stack([self.maps[name] for name in self._map_layers("attn1")]).mean(0)
        height, width = size = self.sizes[len(own)]
        losses = {name: own.new_zeros(()) for name in ("enhancement", "fill_x", "fill_y", "region")}
        for region, mask, cross in zip(self.scene.regions, self.masks(size), self._cross_maps(), strict=True):
            count = max(math.floor(SHARE * int(mask.sum())), 1)
            centre = centre_weight(mask).to(own)
            for token in region.tokens:
                attention = smooth(cross[..., token]) * mask
                strongest = (attention * centre).flatten().topk(count).values.mean()
                losses["enhancement"] = losses["enhancement"] + ENHANCEMENT * (1 - strongest).clamp(min=0)
                for axis, name, length in ((0, "fill_x", width), (1, "fill_y", height)):
                    missing = (attention.amax(axis) - mask.any(axis).to(own)).abs().sum() / length
                    losses[name] = losses[name] + FILL * missing
            leaving = own[mask.flatten()][:, ~mask.flatten()].flatten()
            losses["region"] = losses["region"] + REGION * leaving.topk(min(count, len(leaving))).values.mean()
        return losses


class _Attention:
    """An attention layer; self-attention where its name says so."""

    def __init__(self, slow: SlowComposer, name: str) -> None:
        self.slow, self.name = slow, name

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        slow, scene = self.slow, self.slow.scene
        query = _split(attn.to_q(hidden_states), attn.heads)
        masks = slow.masks(slow.sizes[hidden_states.shape[1]]).flatten(1)
        if self.name.endswith("attn1"):
            key, value = (_split(layer(hidden_states), attn.heads) for layer in (attn.to_k, attn.to_v))
            mask = penalties(masks).to(query).repeat(*query.shape[:2], 1, 1)
            out: Tensor = attn.to_out[0](slow.attend(self.name, query, key, value, mask))
            return out
        base = [attn.get_submodule(name).weight for name in PROJECTIONS]
        out = slow.prompted(self.name, attn, query, scene.text, base)
        inside = torch.zeros_like(out)
        for index, region in enumerate(scene.regions):
            weights = [slow.merged[index][f"{self.name}.{name}"] for name in PROJECTIONS]
            found = slow.prompted(f"{self.name}/{index}", attn, query, region.text, weights)
            inside = inside + found * masks[index][:, None]
        count = masks.sum(0)[:, None]
        return torch.where(count > 0, inside / count.clamp(min=1), out)


def compare(unet: UNet, other: UNet, scene: Scene, latents: Tensor, timestep: Tensor) -> dict[str, list[Tensor]]:
    """Returns what ours computes in its passes at latents (1, ...) and what the slow method does on the other UNet."""
    # one whose latents need no scaling
    scheduler, settings = DDIMScheduler(), Settings()
    slow = SlowComposer(other, scene)
    maps = slow.layout(latents, timestep)
    losses, gradient = slow.guide(latents, timestep)
    with torch.no_grad(), regional_unet(unet, scene, **settings.attention) as model:
        found, own_maps = measure(model, scheduler, latents, timestep, settings.weights)
        pairs = {
            "prediction": [model.noise(latents, timestep), slow.noise(latents, timestep)],
            "gradient": [guide(model, scheduler, latents, timestep, settings.weights)[1], gradient],
        }
    pairs |= {name: [getattr(found, name).sum(), value] for name, value in losses.items()}
    return pairs | {f"map {index}": [own_maps.cross[index][0], value] for index, value in enumerate(maps)}


def check(unet: UNet, other: UNet, scene: Scene, latents: Tensor, timestep: Tensor, tolerance: float) -> None:
    """Compares ours with the slow method on another UNet of the same weights; arguments as for `compare`.

    Raises:
        AssertionError: something differs by more than the tolerance, a share of its largest value.
    """
    for name, (ours, slow) in compare(unet, other, scene, latents, timestep).items():
        difference, largest = (float(values.abs().max()) for values in (ours - slow, slow))
        if not difference <= tolerance * largest:
            raise AssertionError(f"{name}: ours and the slow reference differ by {difference:.2g} of {largest:.2g}")


def cells(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Returns top, left, bottom, right of a box on a map: the nearest borders, or the one cell of its middle."""
    spans = []
    for start, end, length in ((box.top, box.bottom, size[0]), (box.left, box.right, size[1])):
        first, last = (math.floor(edge * length + 0.5 + 1e-6) for edge in (start, end))
        if first == last:
            first = min(math.floor((start + end) / 2 * length + 1e-6), length - 1)
            last = first + 1
        spans.append((first, last))
    (top, bottom), (left, right) = spans
    return top, left, bottom, right


def penalties(masks: Tensor) -> Tensor:
    """Returns what is added to scores (N, N): `MASKED` from boxes to boxes without a common one; masks (regions, N)."""
    concept = masks.any(0)
    together = torch.zeros(len(concept), len(concept), dtype=torch.bool)
    for mask in masks:
        together |= mask[:, None] & mask
    apart = concept[:, None] & concept & ~together
    return torch.zeros(apart.shape).masked_fill(apart, MASKED)


def smooth(image: Tensor) -> Tensor:
    """Smooths (height, width) by weights proportional to exp(-(x^2 + y^2)), mirrored at the borders."""
    line = torch.tensor([math.exp(-1), 1.0, math.exp(-1)], dtype=torch.float64).to(image)
    kernel = torch.outer(line, line) / line.sum() ** 2
    return F.conv2d(F.pad(image[None, None], (1, 1, 1, 1), mode="reflect"), kernel[None, None])[0, 0]


def centre_weight(mask: Tensor) -> Tensor:
    """Returns exp(-(u^2 + v^2) / 2) in a box given as a mask (height, width), 0 outside, its largest value 1."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    u, v = (torch.linspace(-1, 1, len(found), dtype=torch.float64) for found in (rows, columns))
    bell = torch.exp(-(u[:, None] ** 2 + v**2) / 2)
    out = torch.zeros(mask.shape, dtype=torch.float64)
    out[rows[:, None], columns] = bell / bell.max()
    return out


def _split(x: Tensor, heads: int) -> Tensor:
    """Maps (rows, N, C) to (rows, heads, N, C / heads)."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)
