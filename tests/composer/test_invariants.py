"""What a composition must equal or must not depend on, and what is refused before sampling."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from composer_zoo import TOKENS, WIDTH, build_unet, lora, noise, scene, text
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LMSDiscreteScheduler,
    SD3Transformer2DModel,
    UniPCMultistepScheduler,
)
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor

from vision_lowrank.composer.layout import Box, Region, Scene, Text
from vision_lowrank.composer.losses import Constants
from vision_lowrank.composer.pipeline import build_pipeline
from vision_lowrank.composer.sampler import Settings, compose
from vision_lowrank.errors import AdapterError, ConfigError

STEPS, GUIDANCE = 4, 3.0
FULL = Settings(map_factor=2)
UNGUIDED = replace(FULL, enhancement=False, fill=False, region=False, reinitialisation=False)
INJECTION = replace(UNGUIDED, self_mask=False)
CROSS = ("attn2.to_k", "attn2.to_v", "attn2.to_out.0")
TRANSFORMER = (
    *CROSS, "attn2.to_q", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2",
    "proj_in", "proj_out",
)  # fmt: skip
SCHEDULERS = {
    "DDIM": DDIMScheduler,
    "DPM++": DPMSolverMultistepScheduler,
    "Euler": EulerDiscreteScheduler,
    "Euler, ancestral": EulerAncestralDiscreteScheduler,
    "LMS": LMSDiscreteScheduler,
    "UniPC": UniPCMultistepScheduler,
}


@pytest.fixture(scope="module")
def unet():
    return build_unet()


def composed(unet, what, start=None, settings=FULL, scheduler=None, guidance_scale=GUIDANCE, **options):
    start = noise() if start is None else start
    scheduler = scheduler or DPMSolverMultistepScheduler()
    return compose(unet, scheduler, what, start, STEPS, guidance_scale, settings, **options)


def sampled(unet, prompts, start):
    """Plain sampling with guidance, by the UNet and scheduler alone."""
    scheduler = DPMSolverMultistepScheduler()
    scheduler.set_timesteps(STEPS)
    states = torch.cat([prompts.negative, prompts.positive])
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            negative, positive = unet(torch.cat([start, start]), timestep, states).sample.chunk(2)
        start = scheduler.step((1 - GUIDANCE) * negative + GUIDANCE * positive, timestep, start).prev_sample
    return start


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(("images", "guidance_scale"), [(1, GUIDANCE), (2, GUIDANCE), (2, 1.0)])
def test_without_regions_it_is_diffusers_pipeline_bit_for_bit(name, images, guidance_scale):
    torch.manual_seed(0)
    tiny = {"channels": (8, 16), "heads": 2, "groups": 4, "text_width": 16, "text_layers": 1, "text_heads": 2}
    pipeline = build_pipeline(["a", "dog"], length=12, side=32, **tiny)
    pipeline.scheduler = SCHEDULERS[name]()
    start = torch.randn(images, 12, 16, 20)
    positive, negative = torch.randn(2, 1, 12, 16)
    expected = pipeline(
        prompt_embeds=positive.expand(images, -1, -1),
        negative_prompt_embeds=negative.expand(images, -1, -1),
        latents=start,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        height=32,
        width=40,
    ).images
    found = composed(
        pipeline.unet,
        Scene(Text(positive, negative)),
        start,
        scheduler=SCHEDULERS[name](),
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(1),
    )
    assert torch.equal(found.latents, expected)


# the second has maps of odd sizes
@pytest.mark.parametrize("size", [(12, 16), (9, 15)])
@pytest.mark.parametrize("all_layers", [False, True])
def test_a_region_of_the_whole_image_is_its_prompt_with_its_lora_merged(unet, size, all_layers):
    changes = lora(unet, 1, TRANSFORMER if all_layers else CROSS)
    merged = copy.deepcopy(unet)
    with torch.no_grad():
        for name, change in changes.items():
            weight = merged.get_submodule(name).weight
            weight += (0.6 * change.scale * change.up @ change.down).view_as(weight)
    prompts = text(4)
    start = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    whole = Scene(text(5), [Region(Box(0, 0, 1, 1), prompts, [1], [(changes, 0.6)])])
    found = composed(unet, whole, start, replace(INJECTION, all_layers=all_layers)).latents
    torch.testing.assert_close(found, sampled(merged, prompts, start), rtol=1e-10, atol=1e-10)
    assert (found - sampled(unet, prompts, start)).abs().max() > 0.01


def test_all_layers_of_a_lora_act_in_its_box_alone(unet):
    """Against masks over whole maps, and layers whose changes are in their weights."""
    others = tuple(ending for ending in TRANSFORMER if ending not in CROSS)
    what = scene(unet, 3, background=[(lora(unet, 9, ("attn1.to_q", "ff.net.2")), 0.5)])
    regions = [
        replace(region, loras=[(lora(unet, 20 + index, TRANSFORMER), 0.8)]) for index, region in enumerate(what.regions)
    ]
    what = replace(what, regions=regions)
    cross = [({n: c for n, c in r.loras[0][0].items() if n.endswith(CROSS)}, 0.8) for r in regions]
    bare = replace(what, background=(), regions=[replace(r, loras=[c]) for r, c in zip(regions, cross, strict=True)])

    def dense(module, inputs, output, name):
        x = inputs[0]
        weight = module.weight.flatten(1)
        tokens = x.flatten(2).mT if x.ndim == 4 else x
        height, width = {192: (12, 16), 48: (6, 8)}[tokens.shape[1]]
        masks = torch.zeros(3, height, width, dtype=x.dtype)
        for mask, region in zip(masks, regions, strict=True):
            top, left, bottom, right = region.box.cells(height, width, "nearest")
            mask[top:bottom, left:right] = 1
        masks = masks.flatten(1) / masks.flatten(1).sum(0).clamp(min=1)
        total = tokens @ weight.T * masks.sum(0)[:, None]
        for loras, mask in [*((r.loras, m) for r, m in zip(regions, masks, strict=True))]:
            for changes, strength in loras:
                change = changes[name]
                total = total + mask[:, None] * (tokens @ (strength * change.scale * change.up @ change.down).T)
        outside = weight
        for changes, strength in what.background:
            if name in changes:
                outside = outside + strength * changes[name].scale * changes[name].up @ changes[name].down
        total = total + (1 - masks.sum(0))[:, None] * (tokens @ outside.T)
        if module.bias is not None:
            total = total + module.bias
        return total.mT.reshape(output.shape) if x.ndim == 4 else total

    settings = replace(FULL, all_layers=True)
    found = composed(unet, what, settings=settings)
    hooks = [
        module.register_forward_hook(lambda *given, name=name: dense(*given, name))
        for name, module in unet.named_modules()
        if name.endswith(others)
    ]
    expected = composed(unet, bare)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(found.latents, expected.latents, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-8, atol=1e-8, equal_nan=True)
    assert (found.latents - composed(unet, what).latents).abs().max() > 0.01


def test_a_lora_of_no_strength_is_none(unet):
    loras = [(lora(unet, 1), 0.0)], []
    regions = [Region(Box(0, 0, 0.5, 1), text(4), [1, 2], own) for own in loras]
    found, expected = (composed(unet, Scene(text(5), [region])) for region in regions)
    assert torch.equal(found.latents, expected.latents)
    with_strength = composed(unet, Scene(text(5), [replace(regions[0], loras=[(lora(unet, 1), 1.0)])]))
    assert not torch.equal(with_strength.latents, expected.latents)


@pytest.mark.parametrize("count", [2, 3])
def test_the_order_of_regions_does_not_matter(unet, count):
    what = scene(unet, count)
    backwards = replace(what, regions=what.regions[::-1])
    found, expected = composed(unet, backwards), composed(unet, what)
    torch.testing.assert_close(found.latents, expected.latents, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_a_seed_makes_the_same_image_again(unet):
    first, second = (composed(unet, scene(unet, 3)) for _ in range(2))
    assert torch.equal(first.latents, second.latents)
    assert not torch.equal(first.latents, composed(unet, scene(unet, 3), noise(seed=8)).latents)


def test_inference_mode_changes_nothing(unet):
    expected = composed(unet, scene(unet))
    with torch.inference_mode():
        found = composed(unet, scene(unet))
    assert torch.equal(found.latents, expected.latents)
    assert torch.equal(found.losses.nan_to_num(), expected.losses.nan_to_num())


def test_images_of_a_batch_do_not_know_each_other(unet):
    settings = replace(FULL, constants=Constants(patience=1, last=None))
    start = noise(4)
    together = composed(unet, scene(unet), start, settings)
    alone = [composed(unet, scene(unet), one[None], settings) for one in start]
    torch.testing.assert_close(together.latents, torch.cat([one.latents for one in alone]), rtol=1e-9, atol=1e-9)
    losses = torch.cat([one.losses for one in alone], 1)
    torch.testing.assert_close(together.losses, losses, rtol=1e-9, atol=1e-9, equal_nan=True)
    # they stop at different steps
    assert len(set(together.losses.isfinite().sum(0).tolist())) > 1


class _Broken(DDIMScheduler):
    def step(self, *args, **kwargs):
        raise RuntimeError("broken on purpose")


@pytest.mark.parametrize("fails", [False, True])
def test_the_unet_is_left_as_it_was(fails):
    unet = build_unet()
    unet.conv_in.weight.requires_grad_(False)
    unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.set_processor(AttnProcessor())
    background = [(lora(unet, 9, ("to_q", "to_k", "to_out.0", "proj_in")), 0.6)]

    def state():
        return (
            dict(unet.attn_processors),
            [parameter.requires_grad for parameter in unet.parameters()],
            [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in unet.modules()],
            {name: value.clone() for name, value in unet.state_dict().items()},
        )

    before = state()
    if fails:
        with pytest.raises(RuntimeError, match="broken on purpose"):
            composed(unet, scene(unet, background=background), scheduler=_Broken())
    else:
        composed(unet, scene(unet, background=background))
    after = state()
    # processors compare by identity
    assert after[:3] == before[:3]
    assert all(torch.equal(value, before[3][name]) for name, value in after[3].items())
    assert all(parameter.grad is None for parameter in unet.parameters())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_can_be_guided(unet, name):
    found = {}
    for settings in (FULL, UNGUIDED):
        generator = torch.Generator().manual_seed(1)
        found[settings] = composed(unet, scene(unet), None, settings, SCHEDULERS[name](), generator=generator)
    assert found[FULL].losses[0].isfinite().all()
    assert (found[FULL].latents - found[UNGUIDED].latents).abs().max() > 0.01


def test_a_box_smaller_than_a_cell_is_that_cell(unet):
    # in row 5 and column 7 of 12 by 16, and of 6 by 8 in row 2 and column 3
    cell, dot = Box(5 / 12, 7 / 16, 6 / 12, 8 / 16), Box(0.425, 0.445, 0.44, 0.455)
    found = [composed(unet, Scene(text(5), [Region(box, text(4), [1], [(lora(unet, 1), 1.0)])])) for box in (cell, dot)]
    assert torch.equal(found[0].latents, found[1].latents)
    assert found[0].losses[:2].isfinite().all()


# a pass has about three roundings' error, steps with guidance add to it; the bounds are 12 and 20 roundings
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 12 * 2**-8), (torch.float16, 20 * 2**-11)])
def test_half_precision_is_near_single(dtype, bound):
    # attention that prefers little, else a rounding becomes another preference
    single = build_unet(sharpness=1).float()
    half = copy.deepcopy(single).to(dtype)
    expected = composed(single, scene(single), noise().float()).latents
    found = composed(half, scene(half), noise().to(dtype)).latents
    assert found.dtype == dtype
    assert (found.float() - expected).square().mean().sqrt() < bound * expected.std()


def nan_lora(unet):
    changes = lora(unet, 1)
    next(iter(changes.values())).up[0, 0] = math.nan
    return changes


def one_region(unet, **changes):
    region = Region(Box(0, 0, 0.5, 1), text(4), [1], [(lora(unet, 1), 1.0)])
    return Scene(text(5), [replace(region, **changes)])


def wide_text():
    return Text(*torch.randn(2, 1, TOKENS, WIDTH + 1))


def nan_text():
    prompts = text(4)
    prompts.negative[0, 0, 0] = math.nan
    return prompts


CHANGES = {
    "NaN": (
        lambda unet: {"loras": [(nan_lora(unet), 1.0)]},
        AdapterError,
        "region 0: .* holds numbers that are not finite",
    ),
    "another base": (
        lambda unet: {"loras": [(lora(build_unet(cross_attention_dim=5), 1), 1.0)]},
        AdapterError,
        r"takes 8 to 8 features, the LoRA 5 to 8; it belongs to another base model",
    ),
    "missing layer": (
        lambda unet: {"loras": [({"down_blocks.7.to_k": next(iter(lora(unet, 1).values()))}, 1.0)]},
        AdapterError,
        "the UNet has no layer down_blocks.7.to_k",
    ),
    "convolution": (
        lambda unet: {"loras": [(lora(unet, 1, ("conv_in",)), 1.0)]},
        AdapterError,
        "conv_in is a convolution larger than a position",
    ),
    "other text": (
        lambda unet: {"text": wide_text()},
        ConfigError,
        r"positive text of region 0 is \(1, 7, 9\); .*, 8\)",
    ),
    "NaN in text": (lambda unet: {"text": nan_text()}, ConfigError, "negative text of region 0 is not finite"),
    "token": (lambda unet: {"tokens": [7]}, ConfigError, r"tokens of region 0 are \[7\]; give positions from 0 to 6"),
    "no token": (lambda unet: {"tokens": []}, ConfigError, r"tokens of region 0 are \[\]"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_scenes_that_do_not_fit_are_refused(unet, case):
    change, error, message = CHANGES[case]
    with pytest.raises(error, match=message):
        composed(unet, one_region(unet, **change(unet)))


def test_other_architectures_are_refused():
    transformer = SD3Transformer2DModel(
        sample_size=8, num_layers=1, attention_head_dim=4, num_attention_heads=2, in_channels=4,
        joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=8,
    )  # fmt: skip
    what = Scene(text(5))
    with pytest.raises(ConfigError, match="the model is a SD3Transformer2DModel"):
        composed(transformer, what)
    unet = build_unet(only_cross_attention=True)
    with pytest.raises(ConfigError, match="the UNet has only_cross_attention"):
        composed(unet, what)
    unet = build_unet()
    unet.set_attn_processor(SlicedAttnProcessor(2))
    with pytest.raises(ConfigError, match=r"is a SlicedAttnProcessor; call unet.set_default_attn_processor\(\)"):
        composed(unet, what)


@pytest.mark.parametrize("shape", [(1, 3, 12, 16), (4, 12, 16), (1, 4, 12, 3)])
def test_noise_of_another_shape_is_refused(unet, shape):
    with pytest.raises(ConfigError, match=r"noise is .*; this UNet takes \(images, 4, height, width\)"):
        composed(unet, scene(unet), torch.zeros(shape, dtype=torch.float64))


def test_maps_come_from_layers_that_exist(unet):
    with pytest.raises(ConfigError, match="map_factor is 8; the UNet has cross-attention at 1, 2"):
        composed(unet, scene(unet), torch.zeros(1, 4, 16, 16).double(), replace(FULL, map_factor=8))
