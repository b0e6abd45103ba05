"""LoRA-Composer's sampling: lay out the noise, then, step by step, move the latent along the losses and denoise it."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_lowrank.composer.attention import Maps, RegionalUNet, regional_unet
from vision_lowrank.composer.layout import CellPolicy, OverlapPolicy, Scene, UNet
from vision_lowrank.composer.losses import LOSSES, Constants, Losses, evaluate, token_maps
from vision_lowrank.errors import ConfigError

# one for all images, or one for each
Generators: TypeAlias = torch.Generator | list[torch.Generator]


@dataclass(frozen=True)
class Settings:
    """Which parts of the method run, and how.

    Args:
        injection: regions take their own prompts and LoRAs in cross-attention.
        all_layers: regions take their LoRAs in all other layers too, at their positions, convolutions included; the
            paper's method leaves those out, and with them what a LoRA learned there.
        negative_loras: LoRAs change the UNet for the negative prompts too, as in the paper; without, guidance
            strengthens what they bring.
        self_mask: concepts do not see each other in self-attention.
        norm_mask: nor in group normalisation, whose statistics otherwise carry each concept to all positions; the
            paper's method leaves them as they are.
        enhancement: the loss that strengthens a concept's tokens in its box.
        fill: the loss that spreads them over the box.
        region: the loss on what a box sees outside it.
        reinitialisation: the noise is laid out anew before the first step.
        constants: numbers of the method.
        cells: see `layout.Box.cells`.
        overlaps: see `layout.Places`.
        map_factor: latents along a side of a position of the maps.
    """

    injection: bool = True
    all_layers: bool = False
    negative_loras: bool = True
    self_mask: bool = True
    norm_mask: bool = False
    enhancement: bool = True
    fill: bool = True
    region: bool = True
    reinitialisation: bool = True
    constants: Constants = field(default_factory=Constants)
    cells: CellPolicy = "nearest"
    overlaps: OverlapPolicy = "own"
    map_factor: int = 4

    @property
    def weights(self) -> Constants:
        """The constants, with weight 0 for losses that are off."""
        return self.constants.only([name for name in LOSSES if getattr(self, name)])

    @property
    def attention(self) -> dict[str, Any]:
        """Arguments of `regional_unet`."""
        masks = ("self_mask", "norm_mask", "cells", "overlaps", "map_factor")
        names = ("injection", "all_layers", "negative_loras", *masks)
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Composition:
    """What was composed.

    Args:
        latents: the finished latents (S, channels, height, width).
        losses: the loss (steps, S) before each step along its gradient; NaN where an image took none.
    """

    latents: Tensor
    losses: Tensor


def compose(
    unet: UNet,
    scheduler: Any,
    scene: Scene,
    noise: Tensor,
    steps: int = 50,
    guidance_scale: float = 7.5,
    settings: Settings | None = None,
    generator: Generators | None = None,
) -> Composition:
    """Composes images of one scene from noise; the UNet is left as it was.

    Args:
        unet: of Stable Diffusion 1, 2 or XL.
        scheduler: any with `scale_model_input`; with losses, UniPC and SA run without their correctors.
        scene: what is to be composed.
        noise: standard normal (S, channels, height, width), one for each image.
        steps: number of denoising steps.
        guidance_scale: of the positive over the negative prompts; at most 1, only the positive ones are run.
        settings: parts of the method.
        generator: for schedulers that add noise.

    Raises:
        ConfigError: UNet, scene, noise or settings do not go together, or the latents are no longer finite.
        AdapterError: a LoRA does not fit the UNet.
    """
    settings = settings or Settings()
    check_noise(unet, tuple(noise.shape), settings.map_factor if scene.regions else 1)
    if noise.device != unet.device:
        raise ConfigError(f"noise is on {noise.device} and the UNet on {unet.device}; put both on one device")
    denoiser = Denoiser(scheduler, noise.device, steps, guidance_scale, generator)
    # in inference mode there would be no gradients, and no word of it
    with torch.inference_mode(False), torch.no_grad(), regional_unet(unet, scene, **settings.attention) as model:
        latents = noise * scheduler.init_noise_sigma
        if settings.reinitialisation and scene.regions:
            latents = _laid_out(model, scheduler, latents, settings)
        guidance = _Guidance(model, scheduler, settings.weights, len(latents))
        for index, timestep in enumerate(scheduler.timesteps):
            latents = guidance.move(latents, timestep, index)
            latents = checked(denoiser.step(denoiser.predict(model, latents, timestep), timestep, latents))
    return Composition(latents, torch.stack(guidance.losses))


class Denoiser:
    """A scheduler's steps along predictions with guidance.

    Args:
        scheduler: any with `scale_model_input`; its timesteps are set.
        device: of the latents.
        steps: number of denoising steps.
        guidance_scale: of the positive over the negative prompts; at most 1, only the positive ones are run.
        generator: for schedulers that add noise.

    Raises:
        ConfigError: the scheduler does not take as many steps, or as few.
    """

    def __init__(
        self,
        scheduler: Any,
        device: torch.device,
        steps: int,
        guidance_scale: float,
        generator: Generators | None = None,
    ) -> None:
        try:
            scheduler.set_timesteps(steps, device=device)
        except ValueError as error:
            reason = " ".join(str(error).split())
            kind = type(scheduler).__name__
            raise ConfigError(f"steps={steps}: not for a {kind} with its settings ({reason[:200]})") from error
        self.scheduler = scheduler
        self.guidance_scale = guidance_scale
        # as pipelines of diffusers do
        takes = inspect.signature(scheduler.step).parameters
        self._extra = {name: value for name, value in (("generator", generator), ("eta", 0.0)) if name in takes}

    def predict(self, model: RegionalUNet, latents: Tensor, timestep: Tensor) -> Tensor:
        """Returns the guided output of the UNet for latents (S, channels, height, width)."""
        sample = self.scheduler.scale_model_input(latents, timestep)
        prediction = model.noise(sample, timestep, negative=self.guidance_scale > 1)
        if self.guidance_scale <= 1:
            return prediction
        negative, positive = prediction.chunk(2)
        return negative + self.guidance_scale * (positive - negative)

    def step(self, prediction: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
        """Returns the latents of the next timestep."""
        found: Tensor = self.scheduler.step(prediction, timestep, latents, **self._extra, return_dict=False)[0]
        return found


def checked(latents: Tensor) -> Tensor:
    """Returns the latents.

    Raises:
        ConfigError: they are not finite.
    """
    if not latents.isfinite().all():
        raise ConfigError(
            "the latents are not finite; compose in float32 or bfloat16, with LoRAs of a smaller strength, or with a "
            "smaller step_size"
        )
    return latents


def measure(
    model: RegionalUNet, scheduler: Any, latents: Tensor, timestep: Tensor, constants: Constants
) -> tuple[Losses, Maps]:
    """Returns the losses at some latents, and the maps they are computed from.

    Args:
        model: a UNet inside `regional_unet`.
        scheduler: scales the latents.
        latents: (S, channels, height, width); images do not influence each other.
        timestep: the step's.
        constants: weights and other numbers.
    """
    maps = model.maps(scheduler.scale_model_input(latents, timestep), timestep, own=constants.region > 0)
    tokens = [region.tokens for region in model.scene.regions]
    return evaluate(maps, tokens, model.places(maps.size), constants), maps


def guide(
    model: RegionalUNet, scheduler: Any, latents: Tensor, timestep: Tensor, constants: Constants
) -> tuple[Tensor, Tensor]:
    """Returns the total losses (S,) and their gradient at the latents; arguments as for `measure`."""
    with torch.enable_grad():
        latents = latents.detach().requires_grad_()
        total = measure(model, scheduler, latents, timestep, constants)[0].total
        if not total.requires_grad:
            # no region has a cell on these maps
            return total, torch.zeros_like(latents)
        (gradient,) = torch.autograd.grad(total.sum(), latents)
    return total.detach(), gradient


def goes_on(losses: Sequence[Tensor], constants: Constants) -> Tensor:
    """Whether each image is moved again (S,), after steps along the gradient at which its losses were these."""
    index = len(losses) - 1
    going = torch.ones_like(losses[-1], dtype=torch.bool)
    if index > 0 and index >= constants.patience:
        # false for NaN too, so an image that stopped stays so
        going = losses[-1] <= losses[-2]
    if constants.last is not None and index >= constants.last:
        going = torch.zeros_like(going)
    return going


def reinitialise(latents: Tensor, maps: Maps, model: RegionalUNet, moments: tuple[Tensor, Tensor] | None) -> Tensor:
    """Copies, for each region, the part of the latent that its concept attends to most into its box.

    Where boxes overlap, the parts are added and kept as strong as one, those of boxes that are moved alike once; with
    the original's policy the last one stays.

    Args:
        latents: (S, channels, height, width).
        maps: of the positive prompts at these latents.
        model: knows the regions.
        moments: mean and deviation that each image gets, (S, 1, 1, 1); None for what they were.
    """
    factor = model.map_factor
    places = model.places(maps.size)
    out, layers = latents.clone(), torch.zeros_like(latents)
    # by image and distance to the source: where a part from there is in
    filled: dict[tuple[int, int, int], Tensor] = {}
    for region, cross, cells in zip(model.scene.regions, maps.cross, places.cells, strict=True):
        if cells is None:
            continue
        top, left, bottom, right = cells
        scores = token_maps(cross, region.tokens).sum(1, keepdim=True)
        sums = F.conv2d(scores, scores.new_ones(1, 1, bottom - top, right - left))
        box = (..., slice(top * factor, bottom * factor), slice(left * factor, right * factor))
        for image, best in enumerate(sums.flatten(1).argmax(1).tolist()):
            row, column = divmod(best, sums.shape[3])
            source = latents[image, :, row * factor :, column * factor :]
            target, layer = out[image][box], layers[image][box]
            # at the lower and right borders the last position may stand for fewer latents
            rows, columns = (min(target.shape[axis], source.shape[axis]) for axis in (1, 2))
            part = (slice(None), slice(rows), slice(columns))
            if places.overlaps == "own":
                shift = (image, row - top, column - left)
                known = filled.setdefault(shift, torch.zeros_like(out[image], dtype=torch.bool))[box][part]
                both = torch.where(layer[part] > 0, target[part], 0) + source[part]
                # the same noise twice would not be independent
                target[part] = torch.where(known, target[part], both)
                layer[part] += ~known
                known[:] = True
            else:
                target[part] = source[part]
    # the sum of independent noise is as strong as one of its parts after division by the root of their number
    out = out / layers.clamp(min=1).sqrt()
    mean, deviation = moments or _moments(latents)
    own_mean, own_deviation = _moments(out)
    return (out - own_mean) / own_deviation * deviation + mean


def _laid_out(model: RegionalUNet, scheduler: Any, latents: Tensor, settings: Settings) -> Tensor:
    timestep = scheduler.timesteps[0]
    constants = settings.weights
    moments = None
    if constants.moments == "normal":
        deviation = latents.new_full((len(latents), 1, 1, 1), float(scheduler.init_noise_sigma))
        moments = (torch.zeros_like(deviation), deviation)
    if constants.start_step:
        _, gradient = guide(model, scheduler, latents, timestep, constants)
        latents = latents - _change(gradient, latents, constants, 0, scheduler)
    maps = model.maps(scheduler.scale_model_input(latents, timestep), timestep, own=False)
    return reinitialise(latents, maps, model, moments)


def _change(gradient: Tensor, latents: Tensor, constants: Constants, index: int, scheduler: Any) -> Tensor:
    """Returns by how much the latents (S, ...) go down the gradient in step `index`.

    Step sizes are for latents of variance 1, as the UNet sees them. Where a scheduler's are longer by 1 / c, so has the
    step to be, and the gradient is shorter by c besides.
    """
    ones = latents.new_ones(1, 1, 1, 1)
    scale = scheduler.scale_model_input(ones, scheduler.timesteps[index])
    change = constants.step_at(index, len(scheduler.timesteps)) * gradient / scale.square()
    if constants.largest_step is None:
        return change
    length, norm = (torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True) for x in (change, latents))
    return change * (constants.largest_step * norm / length).clamp(max=1)


def _starts_here(scheduler: Any, index: int) -> bool:
    """Whether step `index` goes on from the latents it is given.

    Later evaluations of one step, as of Heun, of PNDM and of DPM++ in single steps, go on from those of the first one.
    """
    orders = getattr(scheduler, "order_list", None)
    if orders is not None:
        return bool(orders[index] == 1)
    # PNDM's evaluations so far: four for each step of its start, where it has that, else two for the first step
    done, start = getattr(scheduler, "counter", 0), len(getattr(scheduler, "prk_timesteps", ()))
    first = done % 4 == 0 if done < start else start > 0 or done != 1
    return first and getattr(scheduler, "state_in_first_order", True)


def _moments(latents: Tensor) -> tuple[Tensor, Tensor]:
    axes = (1, 2, 3)
    return latents.mean(axes, keepdim=True), latents.std(axes, keepdim=True)


class _Guidance:
    """Moves latents along the losses, each image until its loss grows; keeps what the losses were."""

    def __init__(self, model: RegionalUNet, scheduler: Any, constants: Constants, images: int) -> None:
        self.model = model
        self.scheduler = scheduler
        self.constants = constants
        self.losses: list[Tensor] = []
        self.totals: list[Tensor] = []
        self.wanted = bool(model.scene.regions) and any((constants.enhancement, constants.fill, constants.region))
        self.active = torch.full((images,), self.wanted, device=model.unet.device)

    def move(self, latents: Tensor, timestep: Tensor, index: int) -> Tensor:
        """Returns the latents after a step along the gradient, `index` counted from 0; images that stopped stay."""
        # at least float32: bfloat16 could not tell whether a loss grows
        kind = torch.promote_types(latents.dtype, torch.float32)
        self.losses.append(latents.new_full((len(latents),), torch.nan, dtype=kind))
        if self.wanted and hasattr(self.scheduler, "last_sample"):
            # correctors (UniPC, SA) go back to where the last step started, and would lose most of a move. Also where
            # no image is moved any more, since images of a batch stop at different steps
            self.scheduler.last_sample = None
        if not self.active.any() or not _starts_here(self.scheduler, index):
            return latents
        total, gradient = guide(self.model, self.scheduler, latents[self.active], timestep, self.constants)
        self.losses[-1][self.active] = total.to(kind)
        moved = latents.clone()
        moved[self.active] -= _change(gradient, latents[self.active], self.constants, index, self.scheduler)
        self.totals.append(self.losses[-1])
        self.active &= goes_on(self.totals, self.constants)
        return moved


def check_noise(unet: UNet, shape: tuple[int, ...], factor: int) -> None:
    """Raises ConfigError where noise of that shape cannot become an image of this UNet."""
    channels = unet.config.in_channels
    if len(shape) != 4 or shape[1] != channels or min(shape[2:], default=0) < 2 * factor:
        raise ConfigError(
            f"noise is {shape}; this UNet takes (images, {channels}, height, width), both sides at least "
            f"{2 * factor} so that maps have two positions"
        )
