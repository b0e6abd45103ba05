"""Ways to compose a scene: LoRA-Composer, and what it is compared with, behind one interface.

- composer: regions with losses, as `Settings` says.
- regional: regions have their own prompts and LoRAs in cross-attention, without losses, masks and new noise (after
  Mix-of-Show, arXiv 2305.18292); with the scene's `all_layers` they have their LoRAs in all layers, which is ours.
- prompt: the joined prompt and the base's weights; only the concepts' tokens are known.
- merge: the joined prompt and the sum of all LoRAs' changes, as `set_adapters` of diffusers.
- switch: the joined prompt and one LoRA at a time, the next one after five steps (arXiv 2402.16843, section 3.2).
- composite: the joined prompt, guided predictions of each LoRA alone averaged in every step (section 3.3).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vision_lowrank.composer.attention import regional_unet
from vision_lowrank.composer.layout import Scene, UNet
from vision_lowrank.composer.sampler import Composition, Denoiser, Generators, Settings, check_noise, checked, compose
from vision_lowrank.composer.scene_files import LoadedScene, prepare, prepare_joined
from vision_lowrank.errors import ConfigError

METHODS = ("composer", "regional", "prompt", "merge", "switch", "composite")
# steps that a LoRA has before the next one's turn
TURN = 5


@dataclass(frozen=True)
class Plan:
    """A method with the scene it composes, prompts encoded.

    Args:
        scenes: one, or one for each LoRA.
        settings: of what is composed by regions.
        turn: steps of each scene before the next one's; None averages the predictions of several.
    """

    scenes: Sequence[Scene]
    settings: Settings
    turn: int | None = None

    def check(self, unet: UNet, scheduler: Any, size: tuple[int, int]) -> None:
        """Looks for what would stop `compose`, before any work.

        Args:
            unet: of Stable Diffusion 1, 2 or XL.
            scheduler: any with `scale_model_input`.
            size: height and width of the latents.

        Raises:
            ConfigError: scene, settings, UNet, scheduler or size do not go together.
            AdapterError: a LoRA does not fit the UNet.
        """
        if missing := [name for name in ("scale_model_input", "init_noise_sigma") if not hasattr(scheduler, name)]:
            raise ConfigError(f"the scheduler is a {type(scheduler).__name__}, without {missing[0]}; take another one")
        for scene in self.scenes:
            factor = self.settings.map_factor if scene.regions else 1
            check_noise(unet, (1, unet.config.in_channels, *size), factor)
            with torch.no_grad(), regional_unet(unet, scene, **self.settings.attention) as model:
                model.places(size)

    def compose(
        self,
        unet: UNet,
        scheduler: Any,
        noise: Tensor,
        steps: int = 50,
        guidance_scale: float = 7.5,
        generator: Generators | None = None,
    ) -> Composition:
        """Composes images; arguments and errors are those of `sampler.compose`."""
        if len(self.scenes) == 1:
            scene = self.scenes[0]
            return compose(unet, scheduler, scene, noise, steps, guidance_scale, self.settings, generator)
        denoiser = Denoiser(scheduler, noise.device, steps, guidance_scale, generator)
        latents = noise * scheduler.init_noise_sigma
        losses = latents.new_full((len(scheduler.timesteps), len(latents)), torch.nan)
        with torch.no_grad():
            for index, timestep in enumerate(scheduler.timesteps):
                active = self.scenes
                if self.turn is not None:
                    active = [self.scenes[index // self.turn % len(self.scenes)]]
                predictions = []
                for scene in active:
                    with regional_unet(unet, scene, map_factor=self.settings.map_factor) as model:
                        predictions.append(denoiser.predict(model, latents, timestep))
                latents = checked(denoiser.step(torch.stack(predictions).mean(0), timestep, latents))
        return Composition(latents, losses)


def plan(method: str, scene: LoadedScene, pipeline: Any, settings: Settings) -> Plan:
    """Encodes what a method needs of a scene.

    Args:
        method: one of `METHODS`.
        scene: the scene.
        pipeline: of diffusers; the base model.
        settings: those of `composer`.

    Raises:
        ConfigError: no such method, or the scene does not fit the model.
        LoraFileError: a LoRA belongs to another base model.
    """
    if method not in METHODS:
        raise ConfigError(f"method={method}: it can be {', '.join(METHODS)}")
    if method != "composer":
        # the others are what their papers say, but for `all_layers` of regional
        settings = replace(
            settings,
            injection=True, negative_loras=True,
            self_mask=False, norm_mask=False, enhancement=False, fill=False, region=False, reinitialisation=False,
        )  # fmt: skip
    if method in ("composer", "regional"):
        return Plan([prepare(scene, pipeline)], settings)
    files = list(dict.fromkeys(entry.file for region in scene.file.regions for entry in region.loras))
    if method in ("switch", "composite") and files:
        scenes = [prepare_joined(scene, pipeline, [file]) for file in files]
        return Plan(scenes, settings, TURN if method == "switch" else None)
    return Plan([prepare_joined(scene, pipeline, files if method == "merge" else ())], settings)
