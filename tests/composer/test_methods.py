"""Methods to compare with, against diffusers with its own adapters."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import yaml

from vision_lowrank.composer.lora_files import LoraWeights, LowRank, write_lora
from vision_lowrank.composer.methods import TURN, plan
from vision_lowrank.composer.pipeline import build_pipeline
from vision_lowrank.composer.render import draw_noise, seeded
from vision_lowrank.composer.sampler import Settings, compose
from vision_lowrank.composer.scene_files import load_scene, prepare
from vision_lowrank.errors import ConfigError

SIDE, STEPS, SCALE = 32, 2 * TURN + 2, 3.0
STRENGTHS = {"first": 1.0, "second": 0.6}
UNET_LAYERS = (
    *("attn2.to_k", "attn2.to_v", "attn2.to_out.0", "conv_in", "conv1", "conv_shortcut", "time_emb_proj"),
    *("downsamplers.0.conv", "upsamplers.0.conv", "time_embedding.linear_1"),
)


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    words = ["a", "dog", "cat", "on", "grass", "and"]
    tiny = {"channels": (8, 16), "heads": 2, "groups": 4, "text_width": 16, "text_layers": 1, "text_heads": 2}
    return build_pipeline(words, length=12, side=SIDE, **tiny)


def random_changes(model, endings):
    changes = {}
    for name, module in model.named_modules():
        if name.endswith(endings):
            out, *inputs = module.weight.shape
            down = torch.randn(2, *inputs) / math.prod(inputs[1:])
            changes[name] = LowRank(down, torch.randn(out, 2) / 2, 1.0)
    return changes


@pytest.fixture(scope="module")
def scene(pipeline, tmp_path_factory):
    """Two concepts, one in two boxes; their words are those that the base knows, so that diffusers can encode them."""
    folder = tmp_path_factory.mktemp("scene")
    torch.manual_seed(1)
    for name in STRENGTHS:
        unet = random_changes(pipeline.unet, UNET_LAYERS)
        write_lora(
            LoraWeights(unet, random_changes(pipeline.text_encoder, ("q_proj",))), folder / f"{name}.safetensors"
        )
    boxes = [(0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), (0, 0.5, 0.5, 1)]
    regions = [
        {
            "box": dict(zip(("left", "top", "right", "bottom"), box, strict=True)),
            "prompt": f"a {word} on grass",
            "subject": word,
            "loras": [{"file": f"{name}.safetensors", "strength": STRENGTHS[name]}],
        }
        for box, name, word in zip(boxes, ("first", "second", "first"), ("dog", "cat", "dog"), strict=True)
    ]
    content = {
        "base": "base", "prompt": "on grass", "negative_prompt": "on grass",
        "joined_prompt": "a dog and a cat on grass", "joined_negative_prompt": "a",
        "height": SIDE, "width": SIDE, "regions": regions,
    }  # fmt: skip
    (folder / "two.yaml").write_text(yaml.safe_dump(content))
    return load_scene(folder / "two.yaml")


@pytest.fixture(scope="module")
def noise(pipeline):
    return draw_noise(pipeline, SIDE, SIDE, seeded([3, 4]))


def composed(method, scene, pipeline, noise):
    # what the methods to compare with do not have
    settings = Settings(map_factor=2, negative_loras=False, norm_mask=True)
    found = plan(method, scene, pipeline, settings)
    return found.compose(pipeline.unet, pipeline.scheduler, noise, STEPS, SCALE)


@pytest.fixture(scope="module")
def adapted(pipeline, scene):
    """The pipeline with both LoRAs loaded by diffusers."""
    loaded = copy.deepcopy(pipeline)
    for name in STRENGTHS:
        loaded.load_lora_weights(scene.folder / f"{name}.safetensors", adapter_name=name)
    return loaded


@torch.no_grad()
def reference(adapted, noise, active):
    """Samples, in each step with the mean of what the UNet says with each group of adapters of `active(step)`."""
    scheduler = copy.deepcopy(adapted.scheduler)
    scheduler.set_timesteps(STEPS)
    latents = noise
    for step, timestep in enumerate(scheduler.timesteps):
        predictions = []
        for names in active(step):
            adapted.set_adapters(names, [STRENGTHS[name] for name in names])
            positive, negative = adapted.encode_prompt("a dog and a cat on grass", "cpu", 1, True, "a")
            without, with_text = (
                adapted.unet(latents, timestep, states.expand(len(latents), -1, -1)).sample
                for states in (negative, positive)
            )
            predictions.append(without + SCALE * (with_text - without))
        latents = scheduler.step(sum(predictions) / len(predictions), timestep, latents).prev_sample
    return latents


ACTIVE = {
    "merge": lambda step: [["first", "second"]],
    "switch": lambda step: [["first"] if step // 5 in (0, 2) else ["second"]],
    "composite": lambda step: [["first"], ["second"]],
}


@pytest.mark.parametrize("method", ACTIVE)
def test_methods_with_one_prompt_are_those_of_diffusers(method, scene, pipeline, adapted, noise):
    found = composed(method, scene, pipeline, noise)
    expected = reference(adapted, noise, ACTIVE[method])
    torch.testing.assert_close(found.latents, expected, atol=2e-4, rtol=1e-4)
    plain = reference(adapted, noise, ACTIVE["merge" if method != "merge" else "switch"])
    assert (expected - plain).abs().max() > 0.01
    assert all(map(math.isnan, found.losses.flatten().tolist()))


@pytest.mark.parametrize("own", [True, False])
def test_plain_prompt_is_that_of_the_base(own, scene, pipeline, noise):
    if not own:
        scene = replace(scene, file=replace(scene.file, joined_negative_prompt=None, negative_prompt="a"))
    found = composed("prompt", scene, pipeline, noise)
    options = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "output_type": "latent"}
    prompts = {"prompt": ["a dog and a cat on grass"] * 2, "negative_prompt": ["a"] * 2}
    expected = copy.deepcopy(pipeline)(**prompts, latents=noise, **options).images
    torch.testing.assert_close(found.latents, expected, atol=1e-5, rtol=1e-5)


def test_regional_prompting_has_no_constraints(scene, pipeline, noise):
    bare = Settings(self_mask=False, enhancement=False, fill=False, region=False, reinitialisation=False, map_factor=2)
    expected = compose(pipeline.unet, pipeline.scheduler, prepare(scene, pipeline), noise, STEPS, SCALE, bare)
    assert torch.equal(composed("regional", scene, pipeline, noise).latents, expected.latents)
    assert not torch.equal(composed("composer", scene, pipeline, noise).latents, expected.latents)
    # but it takes the scene's LoRAs in all layers
    everything = Settings(all_layers=True, negative_loras=False, norm_mask=True, map_factor=2)
    assert plan("regional", scene, pipeline, everything).settings == replace(bare, all_layers=True)


def test_one_strength_for_the_whole_image_is_not_two(scene, pipeline):
    first, *others = scene.file.regions
    (entry,) = first.loras
    regions = (replace(first, loras=(replace(entry, strength=0.1),)), *others)
    changed = replace(scene, file=replace(scene.file, regions=regions))
    with pytest.raises(ConfigError, match=r"first\.safetensors has the strengths 0\.1 and"):
        plan("merge", changed, pipeline, Settings(map_factor=2))
    plan("composer", changed, pipeline, Settings(map_factor=2))


@pytest.mark.parametrize("method", ["composer", "merge"])
def test_a_pipeline_with_a_lora_of_its_own_is_the_one_with_it_merged(method, scene, pipeline, noise, adapted):
    merged = copy.deepcopy(adapted)
    merged.set_adapters(["second"], [0.7])
    merged.fuse_lora(adapter_names=["second"])
    merged.unload_lora_weights()
    carrying = copy.deepcopy(adapted)
    carrying.set_adapters(["second"], [0.7])
    settings = Settings(map_factor=2, all_layers=True, enhancement=False, fill=False, region=False)

    def made(each):
        planned = plan(method, scene, each, settings)
        (whole,) = planned.scenes
        # the time's embedding has no positions that a region could change
        regions = [
            replace(region, loras=[({n: c for n, c in lora.items() if n[:4] != "time"}, s) for lora, s in region.loras])
            for region in whole.regions
        ]
        planned = replace(planned, scenes=[replace(whole, regions=regions)])
        return planned.compose(each.unet, each.scheduler, noise, STEPS, SCALE).latents

    expected, found = made(merged), made(carrying)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert (found - made(pipeline)).abs().max() > 0.01


def test_unknown_method(scene, pipeline):
    with pytest.raises(ConfigError, match="method=blend: it can be composer, regional"):
        plan("blend", scene, pipeline, Settings())
