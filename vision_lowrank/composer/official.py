"""The original code's numbers (Young98CN/LoRA_Composer at a48a5a5), from our own implementation with its choices."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vision_lowrank.composer.attention import RegionalUNet, regional_unet
from vision_lowrank.composer.layout import Box, Lora, Region, Scene, Text
from vision_lowrank.composer.lora_files import LowRank
from vision_lowrank.composer.losses import CONSTANTS, Losses, smooth, smoothing_kernel, token_maps
from vision_lowrank.composer.sampler import Settings, goes_on, measure, reinitialise
from vision_lowrank.errors import CheckpointError

OFFICIAL = Settings(constants=replace(CONSTANTS["code"], least=0), cells="inner", overlaps="official")
# where the fixtures look at single predictions of the UNet
_TIMESTEP = 481


def replay(folder: str | Path, case: str) -> dict[str, Tensor]:
    """Computes what the original computed, from the inputs of a fixture folder alone.

    Args:
        folder: holds `unet.safetensors`, `unet_config.json`, and of each case `case_X.safetensors`, `case_X.json`,
            `lora_X.safetensors`.
        case: name X of a case.

    Returns:
        Tensors under the fixture's names, without the inputs; also the numbers of its `iterations`, as
        `iter{i}_total`, `iter{i}_L_ce_terms` and so on, and `refinements_done`. Iterations after the original's rule
        stopped the steps along the gradient have latents and predictions only.

    Raises:
        CheckpointError: a file is missing, damaged or lacks an entry.
    """
    folder = Path(folder)
    try:
        case_file, facts = load_file(folder / f"case_{case}.safetensors"), _json(folder / f"case_{case}.json")
        loras = _loras(load_file(folder / f"lora_{case}.safetensors"), facts["lora_scale"])
        unet = _unet(_json(folder / "unet_config.json"), load_file(folder / "unet.safetensors"))
        scene = _scene(case_file, facts, loras)
        initial = case_file["latents_initial"]
        scheduler = _scheduler(facts)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: case {case} cannot be read, {error!r}; give the folder as published"
        ) from error
    out = {"smoothing_kernel": smoothing_kernel(OFFICIAL.constants.smoothing).float()}
    with torch.no_grad():
        states = torch.stack([scene.text.negative[0], scene.text.positive[0]])
        out["plain_noise_pred_t481_layer0embeds"] = unet(torch.cat([initial] * 2), _TIMESTEP, states).sample
        for name, part, options in (
            ("noregion_noise_pred_t481_layerwise", replace(scene, regions=()), OFFICIAL),
            ("region_noise_pred_t481_noselfmask", scene, replace(OFFICIAL, self_mask=False)),
        ):
            with regional_unet(unet, part, **options.attention) as model:
                out[name] = model.noise(initial, _TIMESTEP)
        with regional_unet(unet, scene, **OFFICIAL.attention) as model:
            out["region_noise_pred_t481"] = model.noise(initial, _TIMESTEP)
            latents = _start(model, scheduler, initial, out)
            _iterations(model, scheduler, latents, facts, out)
    return out


def _start(model: RegionalUNet, scheduler: Any, latents: Tensor, out: dict[str, Tensor]) -> Tensor:
    first = scheduler.timesteps[0]
    out["reinit_pass_noise_pred_cond"] = model.noise(latents, first, negative=False)
    maps = model.maps(latents, first, own=False)
    out |= {f"reinit_cross_map_region{index}": cross[0] for index, cross in enumerate(maps.cross)}
    out["latents_after_reinit"] = reinitialise(latents, maps, model, None)
    return out["latents_after_reinit"]


def _iterations(
    model: RegionalUNet, scheduler: Any, latents: Tensor, facts: Mapping[str, Any], out: dict[str, Tensor]
) -> None:
    totals: list[Tensor] = []
    refining = True
    for index, timestep in enumerate(scheduler.timesteps[: facts["iterations_run"]]):
        out[f"iter{index}_latents_in"] = latents
        if refining:
            latents = _refined(model, scheduler, latents, index, out)
            totals.append(out[f"iter{index}_total"])
            refining = bool(goes_on(totals, OFFICIAL.constants))
        prediction = model.noise(latents, timestep)
        negative, positive = prediction.chunk(2)
        guided = negative + facts["guidance_scale"] * (positive - negative)
        out[f"iter{index}_noise_pred"] = prediction
        latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]
        out[f"iter{index}_latents_out"] = latents
    out["refinements_done"] = torch.tensor(len(totals))


def _refined(model: RegionalUNet, scheduler: Any, latents: Tensor, index: int, out: dict[str, Tensor]) -> Tensor:
    """Returns the latents after step `index` along the gradient, and keeps what led to it."""
    constants = OFFICIAL.constants
    # attention written out as in the original, whose float32 rounding is in the stored gradients
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        leaf = latents.clone().requires_grad_()
        losses, maps = measure(model, scheduler, leaf, scheduler.timesteps[index], constants)
        terms = {"L_ce": losses.enhancement, "L_fill": losses.fill_x + losses.fill_y, "L_region": losses.region}
        gradients = {name: _gradient(term, leaf) for name, term in terms.items()} if index == 0 else {}
        gradient = _gradient(losses.total, leaf)
    if index == 0:
        out |= {f"iter0_grad_{name}": value for name, value in gradients.items()}
        _keep_maps(model, maps.cross, out)
        assert maps.own is not None
        out["iter0_self_map"] = maps.own[0].detach().unflatten(1, maps.size).unflatten(0, maps.size)
    out |= {f"iter{index}_{name}": value for name, value in _numbers(losses).items()}
    out[f"iter{index}_grad_total"] = gradient
    moved = latents - constants.step_at(index, len(scheduler.timesteps)) * gradient
    out[f"iter{index}_latents_after_guidance"] = moved
    return moved


def _gradient(terms: Tensor, latents: Tensor) -> Tensor:
    if not terms.requires_grad:
        # no region has enough cells for these losses
        return torch.zeros_like(latents)
    (gradient,) = torch.autograd.grad(terms.sum(), latents, retain_graph=True)
    return gradient


def _keep_maps(model: RegionalUNet, cross: Sequence[Tensor], out: dict[str, Tensor]) -> None:
    for index, (region, found) in enumerate(zip(model.scene.regions, cross, strict=True)):
        raw = token_maps(found.detach(), region.tokens)
        out[f"iter0_cross_map_region{index}"] = found[0].detach()
        out[f"iter0_concept_maps_raw_region{index}"] = raw[0]
        out[f"iter0_concept_maps_smooth_region{index}"] = smooth(raw, OFFICIAL.constants.smoothing)[0]


def _numbers(losses: Losses) -> dict[str, Tensor]:
    """Returns the losses under the names of the fixture's `iterations`."""
    terms = {
        "L_ce_terms": losses.enhancement,
        "L_fill_x_terms": losses.fill_x,
        "L_fill_y_terms": losses.fill_y,
        "L_region_terms": losses.region,
    }
    fill = losses.fill_x.sum() + losses.fill_y.sum()
    totals = {"L_ce": losses.enhancement.sum(), "L_fill": fill, "L_region": losses.region.sum()}
    totals["total"] = losses.total[0]
    return {name: value.detach() for name, value in totals.items()} | {n: v[0].detach() for n, v in terms.items()}


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _loras(tensors: Mapping[str, Tensor], scale: float) -> dict[int, dict[str, LowRank]]:
    """Groups factors named `concept{i}.<module>_lora.down.weight` by concept and module."""
    found: dict[int, dict[str, LowRank]] = {}
    for name, down in tensors.items():
        concept, _, rest = name.partition(".")
        module, _, factor = rest.rpartition("_lora.")
        if factor == "down.weight":
            up = tensors[f"{concept}.{module}_lora.up.weight"]
            found.setdefault(int(concept.removeprefix("concept")), {})[module] = LowRank(down, up, scale)
    return found


def _unet(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Any:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_config(dict(config))
    unet.load_state_dict(dict(weights), strict=True)
    return unet.eval()


def _scheduler(facts: Mapping[str, Any]) -> Any:
    """Builds the scheduler of diffusers 0.14, whose timesteps and last step are no longer the default."""
    import diffusers

    kind = getattr(diffusers, facts["scheduler"]["cls"])
    config = facts["scheduler"]["config"]
    scheduler = kind.from_config(config, final_sigmas_type="sigma_min", timestep_spacing="linspace")
    scheduler.set_timesteps(facts["num_inference_steps"])
    return scheduler


def _scene(
    tensors: Mapping[str, Tensor], facts: Mapping[str, Any], loras: Mapping[int, Mapping[str, LowRank]]
) -> Scene:
    regions = []
    for index, edges in enumerate(facts["boxes_fraction"]):
        lora: Lora = (loras[facts["region_to_concept"][index]], 1.0)
        text = _text(tensors[f"embeds_region{index}"])
        regions.append(Region(Box(*edges), text, facts["token_idx_with_bos"][index], [lora]))
    return Scene(_text(tensors["embeds_global"]), regions)


def _text(rows: Tensor) -> Text:
    return Text(positive=rows[1], negative=rows[0])
