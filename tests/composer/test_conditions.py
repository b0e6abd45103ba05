"""ControlNet and T2I-Adapter against diffusers' own pipelines, their gradients, and conditions in scene files."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from composer_zoo import build_unet, noise, scene
from diffusers import (
    ControlNetModel,
    DPMSolverMultistepScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from PIL import Image

from vision_lowrank.composer.attention import regional_unet
from vision_lowrank.composer.conditions import AdapterCondition, ControlCondition, read_image
from vision_lowrank.composer.layout import Scene, Text
from vision_lowrank.composer.pipeline import build_pipeline
from vision_lowrank.composer.sampler import Settings, compose, guide
from vision_lowrank.composer.scene_files import load_scene, prepare
from vision_lowrank.errors import CheckpointError, ConfigError

HEIGHT, WIDTH, STEPS, GUIDANCE = 32, 48, 3, 4.0
SETTINGS = Settings(map_factor=2)
# levels with and without cross-attention at the finest, and the adapter that fits each
ADAPTERS = {
    "full_adapter_xl": ("DownBlock2D", "UpBlock2D", 4),
    "full_adapter": ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D", 2),
}


def make_control(unet, seed=0):
    torch.manual_seed(seed)
    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8)).eval()
    with torch.no_grad():
        for parameter in control.parameters():
            # the last layers are zero
            parameter.add_(0.1 * torch.randn_like(parameter))
    return control


def make_adapter(kind="full_adapter_xl", channels=(8, 16), in_channels=3):
    torch.manual_seed(2)
    factor = ADAPTERS[kind][2]
    return T2IAdapter(in_channels, channels, num_res_blocks=1, downscale_factor=factor, adapter_type=kind).eval()


def picture(height=HEIGHT, width=WIDTH, channels=3, seed=4):
    return torch.rand(1, channels, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    tiny = {"channels": (8, 16), "heads": 2, "groups": 4, "text_width": 16, "text_layers": 1, "text_heads": 2}
    return build_pipeline(["a", "dog"], length=12, side=WIDTH, **tiny)


@pytest.fixture(scope="module")
def prompts():
    return Text(*torch.randn(2, 1, 12, 16, generator=torch.Generator().manual_seed(3)))


def composed(unet, scheduler, text, start, *conditions):
    return compose(unet, scheduler, Scene(text, conditions=conditions), start, STEPS, GUIDANCE, SETTINGS).latents


def asked(text, start, **options):
    """Arguments of diffusers' pipelines for the same composition."""
    return {
        "prompt_embeds": text.positive.expand(len(start), -1, -1),
        "negative_prompt_embeds": text.negative.expand(len(start), -1, -1),
        "latents": start,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "output_type": "latent",
        "height": HEIGHT,
        "width": WIDTH,
    } | options


def latents(images=2):
    return torch.randn(images, 12, HEIGHT // 2, WIDTH // 2, generator=torch.Generator().manual_seed(8))


def with_parts(kind, pipeline, **parts):
    components = {name: part for name, part in pipeline.components.items() if name != "image_encoder"}
    built = kind(**(components | parts), requires_safety_checker=False)
    built.set_progress_bar_config(disable=True)
    return built


def test_controlnets_act_as_in_diffusers_pipeline_and_add_up(pipeline, prompts):
    unet, start, images = pipeline.unet, latents(), [picture(seed=4), picture(seed=5)]
    controls = [make_control(unet, 1), make_control(unet, 2)]
    reference = with_parts(StableDiffusionControlNetPipeline, pipeline, controlnet=controls)
    expected = reference(
        # the pipeline takes an image for each prompt
        image=[image.expand(2, -1, -1, -1) for image in images],
        controlnet_conditioning_scale=[0.8, 0.3],
        **asked(prompts, start),
    ).images
    conditions = [
        ControlCondition(control, image, strength)
        for control, image, strength in zip(controls, images, (0.8, 0.3), strict=True)
    ]
    found = composed(unet, pipeline.scheduler, prompts, start, *conditions)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # one of them alone is something else
    assert (found - composed(unet, pipeline.scheduler, prompts, start, conditions[0])).abs().max() > 0.01


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_acts_as_in_diffusers_pipeline(pipeline, prompts, kind):
    down, up, _ = ADAPTERS[kind]
    torch.manual_seed(1)
    config = {"down_block_types": (down, "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", up)}
    unet = UNet2DConditionModel(**(dict(pipeline.unet.config) | config)).eval()
    start, adapter = latents(1), make_adapter(kind)
    reference = with_parts(StableDiffusionAdapterPipeline, pipeline, unet=unet, adapter=adapter)
    expected = reference(image=picture(), adapter_conditioning_scale=0.7, **asked(prompts, start)).images
    found = composed(unet, pipeline.scheduler, prompts, start, AdapterCondition(adapter, picture(), 0.7))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - composed(unet, pipeline.scheduler, prompts, start)).abs().max() > 0.01


def test_with_regions_a_condition_counts_by_its_strength():
    unet, image = build_unet(), picture(24, 32)
    control, adapter = make_control(unet).double(), make_adapter("full_adapter").double()

    def found(*conditions):
        conditioned = replace(scene(unet), conditions=conditions)
        return compose(unet, DPMSolverMultistepScheduler(), conditioned, noise(), 3, GUIDANCE, SETTINGS)

    without, off = found(), found(ControlCondition(control, image, 0.0), AdapterCondition(adapter, image, 0.0))
    assert torch.equal(off.latents, without.latents)
    assert torch.equal(off.losses, without.losses)
    for made in (ControlCondition(control, image), AdapterCondition(adapter, image)):
        changed = found(made)
        assert (changed.latents - without.latents).abs().max() > 1e-3
        # the loss before the first step sees it already
        assert (changed.losses[0] - without.losses[0]).abs() > 1e-6


def test_a_controlnet_of_sdxl_gets_what_its_unet_gets():
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    unet = build_unet(**added, projection_class_embeddings_input_dim=6 * 4 + 5)
    control, image = make_control(unet).double(), picture(24, 32)
    generator = torch.Generator().manual_seed(9)
    extra = {
        "text_embeds": torch.randn(2, 5, generator=generator, dtype=torch.float64),
        "time_ids": torch.tensor([[24.0, 32, 0, 0, 24, 32]]).double().expand(2, -1),
    }
    plain = scene(unet).text
    with regional_unet(
        unet, Scene(plain, added=extra, conditions=[ControlCondition(control, image, 0.6)]), map_factor=2
    ) as model:
        sample, states = noise(2), torch.cat([plain.negative, plain.positive])
        with torch.no_grad():
            found = model.noise(sample, 30)
    rows = {name: value.repeat_interleave(2, 0) for name, value in extra.items()}
    call = (torch.cat([sample, sample]), 30, states.repeat_interleave(2, 0))
    with torch.no_grad():
        down, middle = control(*call, image.double().repeat(4, 1, 1, 1), 0.6, added_cond_kwargs=rows, return_dict=False)
        expected = unet(
            *call, added_cond_kwargs=rows, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_gradients_of_the_losses_go_through_the_controlnet():
    unet = build_unet()
    control = make_control(unet).double()
    condition = ControlCondition(control, picture(24, 32), 2.0)
    scheduler, start, constants = DPMSolverMultistepScheduler(), noise(), SETTINGS.weights
    scheduler.set_timesteps(4)
    timestep = scheduler.timesteps[1]

    def slope(*conditions):
        with regional_unet(unet, replace(scene(unet), conditions=conditions), map_factor=2) as model:
            return guide(model, scheduler, start, timestep, constants)[1]

    gradient = slope(condition)
    assert (gradient - slope()).abs().max() > 1e-3 * gradient.abs().max()
    with regional_unet(unet, replace(scene(unet), conditions=[condition]), map_factor=2) as model:
        for seed in range(3):
            direction = noise(seed=seed)
            high, low = (
                guide(model, scheduler, start + step * direction, timestep, constants)[0] for step in (1e-5, -1e-5)
            )
            torch.testing.assert_close((gradient * direction).sum(), (high - low)[0] / 2e-5, rtol=1e-5, atol=1e-8)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in control.parameters())


def test_gradients_do_not_keep_the_controlnets_parameters():
    unet = build_unet()
    control = make_control(unet).double()
    condition = ControlCondition(control, picture(24, 32))
    sample = noise().requires_grad_()
    found = condition.residuals(sample, 10, scene(unet).text.positive, {})
    total = sum(feature.sum() for features in found.values() for feature in features)
    leaves, waiting, seen = set(), [total.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
            leaves |= {id(node.variable)} if hasattr(node, "variable") else set()
    assert leaves == {id(sample)}


@pytest.fixture(scope="module")
def world(pipeline, tmp_path_factory):
    """Folder with a base model, both kinds of condition's models, and images."""
    folder = tmp_path_factory.mktemp("world")
    pipeline.save_pretrained(folder / "base")
    make_control(pipeline.unet).save_pretrained(folder / "control")
    make_adapter().save_pretrained(folder / "adapter")
    make_adapter(in_channels=1).save_pretrained(folder / "sketch")
    make_adapter(channels=(8, 24)).save_pretrained(folder / "wide")
    make_adapter("full_adapter").save_pretrained(folder / "early")
    broken = make_control(pipeline.unet)
    with torch.no_grad():
        broken.conv_in.bias[0] = torch.nan
    broken.save_pretrained(folder / "broken")
    config = dict(pipeline.unet.config)
    for name, changes in {"text": {"cross_attention_dim": 20}, "blocks": {"block_out_channels": (8, 24)}}.items():
        make_control(UNet2DConditionModel(**(config | changes))).save_pretrained(folder / name)
    colours = (255 * picture(20, 30)[0]).byte().permute(1, 2, 0).numpy()
    Image.fromarray(colours).save(folder / "photo.png")
    (folder / "text.png").write_text("no image")
    Image.fromarray(colours[..., 0].astype(np.uint16) * 256).save(folder / "deep.png")
    return folder


def write_scene(world, **condition):
    entry = {"kind": "controlnet", "model": "control", "image": "photo.png", "strength": 0.5} | condition
    content = {"base": "base", "prompt": "a dog", "height": HEIGHT, "width": WIDTH, "conditions": [entry]}
    (world / "one.yaml").write_text(yaml.safe_dump(content))
    return load_scene(world / "one.yaml")


@pytest.mark.parametrize(("kind", "model"), [("controlnet", "control"), ("t2i_adapter", "adapter")])
def test_what_the_file_says_conditions_the_composition(world, pipeline, kind, model):
    loaded = write_scene(world, kind=kind, model=model)
    conditioned = prepare(loaded, pipeline)
    (condition,) = conditioned.conditions
    # one copy of the models for all methods
    assert prepare(loaded, pipeline).conditions[0] is condition
    made = {"controlnet": ControlCondition, "t2i_adapter": AdapterCondition}[kind]
    original = {"controlnet": make_control(pipeline.unet), "t2i_adapter": make_adapter()}[kind]
    image = read_image(world / "photo.png", 3, HEIGHT, WIDTH, "here")
    expected = composed(pipeline.unet, pipeline.scheduler, conditioned.text, latents(), made(original, image, 0.5))
    found = composed(pipeline.unet, pipeline.scheduler, conditioned.text, latents(), condition)
    assert torch.equal(found, expected)


def test_images_become_numbers(tmp_path):
    colour = (255, 51, 0)
    Image.new("RGB", (7, 5), colour).save(tmp_path / "plain.png")
    found = read_image(tmp_path / "plain.png", 3, HEIGHT, WIDTH, "here")
    expected = torch.tensor([1.0, 0.2, 0.0])[None, :, None, None].expand(1, 3, HEIGHT, WIDTH)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    # grey by the weights of ITU-R 601
    grey = read_image(tmp_path / "plain.png", 1, HEIGHT, WIDTH, "here")
    torch.testing.assert_close(grey, torch.full((1, 1, HEIGHT, WIDTH), 0.299 + 0.587 * 0.2), rtol=0, atol=1 / 255)
    left_red = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    left_red[:, : WIDTH // 2, 0] = 255
    Image.fromarray(left_red).save(tmp_path / "left.png")
    same = read_image(tmp_path / "left.png", 3, HEIGHT, WIDTH, "here")
    assert torch.equal(same[0], torch.from_numpy(left_red).permute(2, 0, 1) / 255)


def test_a_sketch_adapter_sees_one_channel(world, pipeline):
    (condition,) = prepare(write_scene(world, kind="t2i_adapter", model="sketch"), pipeline).conditions
    assert torch.equal(condition.image, read_image(world / "photo.png", 1, HEIGHT, WIDTH, "here"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "control"}, r"conditions\[0\]: kind is 'control'; it can be controlnet or t2i_adapter"),
        ({"model": "nowhere"}, r"conditions\[0\]: .*nowhere cannot be loaded"),
        ({"model": "adapter"}, "is a T2IAdapter; for kind controlnet give a ControlNetModel"),
        ({"kind": "t2i_adapter"}, "is a ControlNetModel; for kind t2i_adapter give a T2IAdapter"),
        ({"model": "broken"}, "broken holds numbers that are not finite"),
        ({"model": "text"}, "cross_attention_dim of the ControlNet is 20, of the UNet 16"),
        ({"model": "blocks"}, r"block_out_channels of the ControlNet is .8, 24., of the UNet .8, 16."),
        ({"kind": "t2i_adapter", "model": "wide"}, r"features .* \(24, 8, 12\).* the UNet takes .*\(16, 8, 12\)"),
        ({"kind": "t2i_adapter", "model": "early"}, r"features .* the UNet takes .*; it belongs to another base"),
        ({"image": "nowhere.png"}, r"nowhere.png: there is no such file"),
        ({"image": "text.png"}, r"text.png: no image that can be read"),
        ({"image": "deep.png"}, r"deep.png has mode I;16; save it with 8 bits"),
        ({"strength": -0.5}, r"conditions\[0\]: strength is -0.5; give a number from 0 up"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"strength": float("inf")}, "strength is inf"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_sampling(world, pipeline, monkeypatch, changes, message):
    # a model that is no folder is a name on the hub, which would be asked again and again
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    loaded = write_scene(world, **changes)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        prepare(loaded, pipeline)


def test_conditions_made_in_code_are_checked_too(pipeline, prompts):
    unet, control = pipeline.unet, make_control(pipeline.unet)
    with pytest.raises(ConfigError, match="the model is a UNet2DConditionModel; give a ControlNetModel"):
        ControlCondition(unet, picture())
    with pytest.raises(ConfigError, match=r"its image is \(1, 1, 32, 48\); give \(1, 3, height, width\)"):
        ControlCondition(control, picture(channels=1))
    with pytest.raises(ConfigError, match="multiples of 4"):
        AdapterCondition(make_adapter(), picture(30, 40))
    for condition in (ControlCondition(control, picture(64, 48)), AdapterCondition(make_adapter(), picture(64, 48))):
        with pytest.raises(ConfigError, match="for latents of 32 x 24, these have 16 x 24"):
            composed(unet, pipeline.scheduler, prompts, latents(), condition)
    control.register_to_config(global_pool_conditions=True)
    with pytest.raises(ConfigError, match="global_pool_conditions"):
        composed(unet, pipeline.scheduler, prompts, latents(), ControlCondition(control, picture()))
    with pytest.raises(ConfigError, match=r"ControlNet is torch.float64 on cpu, the UNet torch.float32 on cpu"):
        composed(unet, pipeline.scheduler, prompts, latents(), ControlCondition(make_control(unet).double(), picture()))
