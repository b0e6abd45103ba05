"""LoRAs of regions in all layers, convolutions included: against merged weights, and against masks over whole maps."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from composer_zoo import build_unet, delta, lora, noise, scene, text
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from vision_lowrank.composer.attention import regional_unet
from vision_lowrank.composer.layout import Box, Region, Scene
from vision_lowrank.composer.sampler import Settings, compose, guide
from vision_lowrank.errors import AdapterError

STEPS, GUIDANCE = 4, 3.0
ALL = Settings(map_factor=2, all_layers=True)
UNGUIDED = replace(ALL, self_mask=False, enhancement=False, fill=False, region=False, reinitialisation=False)
CROSS = ("attn2.to_k", "attn2.to_v", "attn2.to_out.0")
TRANSFORMER = (
    "attn2.to_q", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in",
    "proj_out",
)  # fmt: skip
RESIDUAL = (
    "conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in",
    "conv_out",
)  # fmt: skip
EVERYTHING = (*CROSS, *TRANSFORMER, *RESIDUAL)


@pytest.fixture(scope="module")
def unet():
    return build_unet()


def start_of(size, images=1):
    return torch.randn(images, 4, *size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def composed(unet, what, start=None, settings=ALL, scheduler=DPMSolverMultistepScheduler):
    return compose(unet, scheduler(), what, noise() if start is None else start, STEPS, GUIDANCE, settings)


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


# the second size has maps of odd sizes
@pytest.mark.parametrize("size", [(12, 16), (9, 15)])
@pytest.mark.parametrize("layers", [CROSS, (*CROSS, *TRANSFORMER), EVERYTHING])
def test_a_region_of_the_whole_image_is_its_prompt_with_its_lora_merged(unet, size, layers):
    loras = [(lora(unet, 1, layers), 0.6), (lora(unet, 2, layers[-2:]), 0.3)]
    merged = copy.deepcopy(unet)
    with torch.no_grad():
        for name, module in merged.named_modules():
            if name.endswith(EVERYTHING):
                module.weight += delta(module, loras, name)
    prompts, start = text(4), start_of(size)
    whole = Scene(text(5), [Region(Box(0, 0, 1, 1), prompts, [1], loras)])
    found = composed(unet, whole, start, replace(UNGUIDED, all_layers=layers != CROSS)).latents
    torch.testing.assert_close(found, sampled(merged, prompts, start), rtol=1e-9, atol=1e-9)
    assert (found - sampled(unet, prompts, start)).abs().max() > 0.01


class Dense:
    """Layers computed once for each region and once for the rest, whole, of which each counts where it belongs."""

    def __init__(self, unet, what, size):
        self.what = what
        self.owners = [*(region.loras for region in what.regions), what.background]
        self.sizes = {height * width: (height, width) for height, width in (size, [-(-side // 2) for side in size])}
        self.times = {}
        self.blocks = {f"{n}.conv1": (n, m) for n, m in unet.named_modules() if isinstance(m, ResnetBlock2D)}
        self.handles = [block.register_forward_pre_hook(self.keep_time) for _, block in self.blocks.values()]
        for name, module in unet.named_modules():
            if name.endswith("time_emb_proj"):
                self.handles.append(module.register_forward_hook(lambda module, inputs, output: 0 * output))
            elif name.endswith((*TRANSFORMER, *RESIDUAL)):
                hook = lambda module, inputs, output, name=name: self.layer(module, inputs[0], name)  # noqa: E731
                self.handles.append(module.register_forward_hook(hook))

    def keep_time(self, module, inputs):
        self.times[module] = inputs[1]

    def masks(self, size):
        masks = torch.zeros(len(self.what.regions), *size, dtype=torch.float64)
        for mask, region in zip(masks, self.what.regions, strict=True):
            top, left, bottom, right = region.box.cells(*size)
            mask[top:bottom, left:right] = 1
        masks = masks / masks.sum(0).clamp(min=1)
        return [*masks, 1 - masks.sum(0)]

    def weights(self, module, name):
        return [module.weight + delta(module, loras, name) for loras in self.owners]

    def layer(self, module, x, name):
        if isinstance(module, nn.Linear):
            masks = [mask.flatten()[:, None] for mask in self.masks(self.sizes[x.shape[1]])]
            parts = [F.linear(x, weight, module.bias) for weight in self.weights(module, name)]
        else:
            options = (module.bias, module.stride, module.padding)
            parts = [F.conv2d(x, weight, *options) for weight in self.weights(module, name)]
            masks = self.masks(parts[0].shape[2:])
        if name in self.blocks:
            path, block = self.blocks[name]
            projection, time = block.time_emb_proj, F.silu(self.times[block])
            weights = self.weights(projection, f"{path}.time_emb_proj")
            times = [F.linear(time, weight, projection.bias)[:, :, None, None] for weight in weights]
            parts = [part + added for part, added in zip(parts, times, strict=True)]
        return sum(mask * part for mask, part in zip(masks, parts, strict=True))


def everywhere(unet, count, background=()):
    """A scene whose regions have LoRAs of all layers, the first without the residual blocks."""
    what = scene(unet, count, background=background)
    layers = [(*CROSS, *TRANSFORMER), EVERYTHING, EVERYTHING]
    regions = [
        replace(region, loras=[*region.loras, (lora(unet, 20 + index, layers[index]), 0.4)])
        for index, region in enumerate(what.regions)
    ]
    return replace(what, regions=regions)


def only(loras, *endings):
    return [({n: change for n, change in changes.items() if n.endswith(endings)}, part) for changes, part in loras]


@pytest.mark.parametrize(("count", "size"), [(2, (12, 16)), (3, (9, 15))])
def test_all_layers_of_a_lora_act_in_its_box_alone(unet, count, size):
    """With losses, so that their gradients count; two images, and a background."""
    # the last has no positions, so it stays the background's in boxes too
    layers = ("attn1.to_q", "ff.net.2", "conv1", "time_emb_proj", "upsamplers.0.conv", "time_embedding.linear_1")
    what = everywhere(unet, count, [(lora(unet, 9, layers), 0.5)])
    bare = replace(
        what,
        background=only(what.background, layers[-1]),
        regions=[replace(region, loras=only(region.loras, *CROSS)) for region in what.regions],
    )
    start = start_of(size, images=2)
    found = composed(unet, what, start)
    dense = Dense(unet, what, size)
    expected = composed(unet, bare, start, replace(ALL, all_layers=False))
    for handle in dense.handles:
        handle.remove()
    torch.testing.assert_close(found.latents, expected.latents, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-8, atol=1e-8, equal_nan=True)
    assert found.losses[:2].isfinite().all()
    transformers = replace(
        what, regions=[replace(region, loras=only(region.loras, *CROSS, *TRANSFORMER)) for region in what.regions]
    )
    for other, settings in ((what, replace(ALL, all_layers=False)), (transformers, ALL)):
        assert (found.latents - composed(unet, other, start, settings).latents).abs().max() > 0.01


def test_the_gradient_is_that_of_the_loss(unet):
    scheduler, start = DPMSolverMultistepScheduler(), noise()
    scheduler.set_timesteps(STEPS)
    timestep, direction = scheduler.timesteps[1], noise(seed=8)
    with regional_unet(unet, everywhere(unet, 2), **ALL.attention) as model:
        _, gradient = guide(model, scheduler, start, timestep, ALL.weights)
        high, low = (
            guide(model, scheduler, start + step * direction, timestep, ALL.weights)[0] for step in (1e-5, -1e-5)
        )
    torch.testing.assert_close((gradient * direction).sum(), (high - low)[0] / 2e-5, rtol=1e-5, atol=1e-8)


def test_without_negative_loras_the_negative_prompts_are_the_base_s(unet):
    what = everywhere(unet, 3, [(lora(unet, 9, ("attn1.to_q", "attn2.to_k", "conv1", "time_embedding.linear_1")), 0.5)])
    bare = replace(what, background=[], regions=[replace(region, loras=[]) for region in what.regions])

    def predicted(composed_scene, negative_loras):
        settings = replace(ALL, negative_loras=negative_loras)
        with torch.no_grad(), regional_unet(unet, composed_scene, **settings.attention) as model:
            both = model.noise(start_of((9, 15), 2), 500)
            return [*both.chunk(2), model.noise(noise(), 500, negative=False)]

    found, full, none = predicted(what, False), predicted(what, True), predicted(bare, True)
    torch.testing.assert_close(found, [none[0], *full[1:]], rtol=1e-9, atol=1e-9)
    assert (full[0] - none[0]).abs().max() > 0.01


def test_only_cross_attention_takes_a_lora_by_default(unet):
    what, settings = everywhere(unet, 2), replace(ALL, all_layers=False)
    cross = [replace(region, loras=only(region.loras, *CROSS)) for region in what.regions]
    expected = composed(unet, replace(what, regions=cross), settings=settings)
    assert torch.equal(composed(unet, what, settings=settings).latents, expected.latents)


def test_the_order_of_regions_does_not_matter(unet):
    what = everywhere(unet, 3)
    found, expected = composed(unet, replace(what, regions=what.regions[::-1])), composed(unet, what)
    torch.testing.assert_close(found.latents, expected.latents, rtol=1e-9, atol=1e-9)


def test_a_lora_of_no_strength_is_none(unet):
    changes = lora(unet, 1, EVERYTHING)
    found, expected = (
        composed(unet, Scene(text(5), [Region(Box(0, 0, 0.5, 1), text(4), [1, 2], loras)]))
        for loras in ([(changes, 0.0)], [])
    )
    assert torch.equal(found.latents, expected.latents)


class _Broken(DDIMScheduler):
    def step(self, *args, **kwargs):
        raise RuntimeError("broken on purpose")


def test_the_unet_is_left_as_it_was_after_an_error():
    unet = build_unet()
    weights = copy.deepcopy(unet.state_dict())
    what = everywhere(unet, 2, [(lora(unet, 9, RESIDUAL), 0.5)])
    with pytest.raises(RuntimeError, match="broken on purpose"):
        composed(unet, what, settings=replace(ALL, norm_mask=True), scheduler=_Broken)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())
    assert all(torch.equal(value, weights[name]) for name, value in unet.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in unet.parameters())


@pytest.mark.parametrize(
    ("layer", "options"),
    [("time_embedding.linear_1", {}), ("time_emb_proj", {"resnet_time_scale_shift": "scale_shift"})],
)
def test_layers_without_positions_are_refused_in_boxes(layer, options):
    unet = build_unet(**options)
    loras = [(lora(unet, 1, (*CROSS, layer)), 1.0)]
    what = Scene(text(5), [Region(Box(0, 0, 0.5, 1), text(4), [1], loras)])
    with pytest.raises(AdapterError, match=rf"changes .*{layer}, which has no positions .* all_layers: false"):
        composed(unet, what)
    # elsewhere it is welcome
    assert composed(unet, what, settings=replace(ALL, all_layers=False)).latents.isfinite().all()
    background = composed(unet, replace(scene(unet), background=loras)).latents
    assert (background - composed(unet, scene(unet)).latents).abs().max() > 1e-3
