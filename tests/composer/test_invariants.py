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
        r"the weight of .*to_k is \(8, 8\), the LoRA's \(8, 5\); it belongs to another base model",
    ),
    "missing layer": (
        lambda unet: {"loras": [({"down_blocks.7.to_k": next(iter(lora(unet, 1).values()))}, 1.0)]},
        AdapterError,
        "the UNet has no layer down_blocks.7.to_k",
    ),
    "another kernel": (
        lambda unet: {"loras": [(lora(build_unet(conv_in_kernel=1), 1, ("conv_in",)), 1.0)]},
        AdapterError,
        r"the weight of conv_in is \(8, 4, 3, 3\), the LoRA's \(8, 4, 1, 1\)",
    ),
    "no matrix": (
        lambda unet: {"loras": [({"conv_norm_out": next(iter(lora(unet, 1).values()))}, 1.0)]},
        AdapterError,
        r"the weight of conv_norm_out is \(8,\), the LoRA's \(8, 8\)",
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
