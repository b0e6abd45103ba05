"""A small random model of SDXL's architecture: two text encoders, pooled text and image sizes, by the same code."""

import copy
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
import transformers
from composer_zoo import make_encoder, make_tokenizer

from vision_lowrank.composer.layout import Box, Region, Scene
from vision_lowrank.composer.lora_files import LoraWeights, LowRank, check_fits, write_lora
from vision_lowrank.composer.render import check_base, decode, draw_noise, seeded
from vision_lowrank.composer.sampler import Settings, compose
from vision_lowrank.composer.scene_files import added_conditions
from vision_lowrank.composer.text import encode
from vision_lowrank.errors import ConfigError

WIDTHS, SIZE, STEPS, SCALE = (16, 24), (24, 32), 3, 4.0
UNGUIDED = Settings(self_mask=False, enhancement=False, fill=False, region=False, reinitialisation=False, map_factor=2)


@pytest.fixture(scope="module")
def pipeline():
    first, second = make_tokenizer(), make_tokenizer()
    second.pad_token = "!"
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=12, block_out_channels=(8, 16), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=sum(WIDTHS), attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12 + 6 * 4,
    )  # fmt: skip
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
                                    down_block_types=("DownEncoderBlock2D",) * 2,
                                    up_block_types=("UpDecoderBlock2D",) * 2),
        unet=unet.eval(), scheduler=diffusers.EulerDiscreteScheduler(), tokenizer=first, tokenizer_2=second,
        text_encoder=make_encoder(first, WIDTHS[0], transformers.CLIPTextModel),
        text_encoder_2=make_encoder(second, WIDTHS[1], transformers.CLIPTextModelWithProjection),
        add_watermarker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(pipeline, noise):
    options = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "output_type": "latent"}
    height, width = SIZE
    return copy.deepcopy(pipeline)("a cat on a mat", height=height, width=width, latents=noise, **options).images


def ours(pipeline, scene, noise, settings=UNGUIDED):
    return compose(pipeline.unet, pipeline.scheduler, scene, noise, STEPS, SCALE, settings).latents


def test_without_regions_it_is_the_pipelines_own(pipeline):
    check_base(pipeline, "tiny")
    noise = draw_noise(pipeline, *SIZE, seeded([3]))
    whole = encode(pipeline, "a cat on a mat")
    found = ours(pipeline, Scene(whole.text, added=added_conditions(whole, *SIZE)), noise)
    torch.testing.assert_close(found, theirs(pipeline, noise), atol=1e-5, rtol=1e-5)
    assert decode(pipeline, found).shape == (1, *SIZE, 3)


def test_latents_are_decoded_as_by_the_pipeline(pipeline):
    latents = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    changed = copy.deepcopy(pipeline)
    changed.vae.register_to_config(latents_mean=[0.5, -1.0, 0.2, 0.0], latents_std=[2.0, 0.5, 1.0, 3.0])
    mean, deviation = (torch.tensor(changed.vae.config[name]).view(4, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        image = changed.vae.decode(latents * deviation / changed.vae.config.scaling_factor + mean).sample
    expected = ((image / 2 + 0.5).clamp(0, 1) * 255).round().movedim(1, -1)
    assert abs(decode(changed, latents).astype(float) - expected.numpy()).max() <= 1
    assert abs(decode(pipeline, latents).astype(float) - expected.numpy()).max() > 9


def test_an_autoencoder_that_overflows_in_half_precision_decodes_in_single(pipeline):
    latents = 1000 * torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(0)).half()
    half = copy.deepcopy(pipeline)
    # sums that float16 cannot hold, and that the normalisation after them would take back
    half.vae.half().decoder.conv_in.weight.data.mul_(2000)
    single = copy.deepcopy(half)
    single.vae.float()
    half.vae.register_to_config(force_upcast=False)
    with pytest.raises(ConfigError, match="pixels are not finite"):
        decode(half, latents)
    half.vae.register_to_config(force_upcast=True)
    found = decode(half, latents)
    assert np.array_equal(found, decode(single, latents.float()))
    assert len(np.unique(found)) > 10
    assert half.vae.dtype == torch.float16


def test_a_region_of_the_whole_image_is_the_pipeline_with_its_lora(pipeline, tmp_path):
    torch.manual_seed(1)

    def changes(model, endings):
        return {
            name: LowRank(torch.randn(2, module.weight.shape[1]), torch.randn(len(module.weight), 2) / 3, 1.0)
            for name, module in model.named_modules()
            if name.endswith(endings)
        }

    layers = ("attn2.to_k", "attn2.to_v", "attn2.to_out.0")
    encoders = [changes(model, ("q_proj",)) for model in (pipeline.text_encoder, pipeline.text_encoder_2)]
    encoders[1] = {name.removeprefix("text_model."): change for name, change in encoders[1].items()}
    lora = LoraWeights(changes(pipeline.unet, layers), *encoders)
    check_fits(lora, pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)
    write_lora(lora, tmp_path / "lora.safetensors")
    noise = draw_noise(pipeline, *SIZE, seeded([3]))
    own = encode(pipeline, "a cat on a mat", loras=[(lora, 1.0)], subject="cat")
    # the pooled text belongs to the image and not to a region, so here it is that of the region
    region = Region(Box(0, 0, 1, 1), own.text, own.tokens, [(lora.unet, 1.0)])
    scene = Scene(encode(pipeline, "a mat").text, [region], added=added_conditions(own, *SIZE))
    found = ours(pipeline, scene, noise)
    loaded = copy.deepcopy(pipeline)
    loaded.load_lora_weights(tmp_path / "lora.safetensors")
    torch.testing.assert_close(found, theirs(loaded, noise), atol=1e-4, rtol=1e-4)
    assert (found - theirs(pipeline, noise)).abs().max() > 0.01
    half = replace(scene, regions=[replace(region, box=Box(0, 0, 1, 0.5))])
    guided = ours(pipeline, half, noise, Settings(map_factor=2))
    assert guided.isfinite().all()
    assert (guided - ours(pipeline, half, noise)).abs().max() > 0.01
