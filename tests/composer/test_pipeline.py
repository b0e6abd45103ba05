"""Our small Stable Diffusion as diffusers and transformers see it."""

import numpy as np
import pytest
import torch

from vision_lowrank.composer.render import load_base
from vision_lowrank.data.sprites import SPRITES, vocabulary
from vision_lowrank.errors import CheckpointError, ConfigError

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from vision_lowrank.composer.pipeline import (  # noqa: E402
    PixelUnshuffle,
    build_pipeline,
    build_tokenizer,
)


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    return build_pipeline(
        vocabulary(), length=24, side=16, channels=(8, 16), heads=2, groups=4, text_width=16, text_layers=1,
        text_heads=2,
    )  # fmt: skip


def test_each_word_is_one_token(tmp_path):
    build_tokenizer(vocabulary(), 24).save_pretrained(tmp_path)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(vocabulary()).input_ids
    assert all(len(row) == 3 for row in ids)
    assert len({row[1] for row in ids}) == len(vocabulary())
    assert tokenizer.tokenize("a dog, an owl") == ["a</w>", "dog</w>", ",</w>", "an</w>", "owl</w>"]
    # what is not known falls into letters and ends of known words
    assert tokenizer.tokenize("dogma") == ["d", "o", "g", "m", "a</w>"]
    assert tokenizer.tokenize("xowl") == ["x", "owl</w>"]
    assert tokenizer.decode(tokenizer("a dog on grass").input_ids, skip_special_tokens=True).strip() == "a dog on grass"
    assert tokenizer.model_max_length == 24
    tokenizer.add_tokens(["<fox1>", "<fox2>"])
    assert tokenizer.tokenize("a <fox1> <fox2> on") == ["a</w>", "<fox1>", "<fox2>", "on</w>"]


def test_pixel_unshuffle_is_exact_and_ordered():
    image = torch.rand(2, 3, 8, 6)
    autoencoder = PixelUnshuffle()
    latent = autoencoder.encode(image)
    expected = np.stack([image.numpy()[:, c, i::2, j::2] for c in range(3) for i in (0, 1) for j in (0, 1)], 1)
    np.testing.assert_array_equal(latent.numpy(), expected)
    assert torch.equal(autoencoder.decode(latent).sample, image)
    assert torch.equal(autoencoder.decode(latent, return_dict=False)[0], image)


def test_folder_is_one_of_stable_diffusion(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}

    def sample(model):
        model.set_progress_bar_config(disable=True)
        return model(["a dog on grass"], generator=torch.Generator().manual_seed(1), **settings).images

    images = sample(pipeline)
    assert images.shape == (1, 16, 16, 3)
    assert images.std() > 0.05
    ours = load_base(str(tmp_path))
    assert type(ours) is diffusers.StableDiffusionPipeline
    np.testing.assert_array_equal(sample(ours), images)
    np.testing.assert_array_equal(sample(diffusers.DiffusionPipeline.from_pretrained(tmp_path)), images)


def test_half_precision_is_read_in_full(pipeline, tmp_path):
    build_pipeline(["a"], 8, 16, (8, 16), 1, 2, 4, 16, 1, 2).to(torch.float16).save_pretrained(tmp_path)
    loaded = load_base(str(tmp_path))
    assert {loaded.unet.dtype, loaded.text_encoder.dtype, loaded.vae.dtype} == {torch.float32}
    assert pipeline.unet.dtype == torch.float32


def test_default_sizes_are_those_of_the_specification():
    pipeline = build_pipeline(vocabulary())
    unet = pipeline.unet
    assert sum(parameter.numel() for parameter in unet.parameters()) == pytest.approx(10.9e6, rel=0.01)
    assert sum(name.endswith("attn2") for name, _ in unet.named_modules()) == 7
    assert {module.heads for name, module in unet.named_modules() if name.endswith("attn2")} == {4}
    assert pipeline.vae_scale_factor * unet.config.sample_size == 64
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert len(SPRITES) < len(pipeline.tokenizer) == pipeline.text_encoder.get_input_embeddings().num_embeddings


def test_missing_and_damaged_folders_are_refused(pipeline, tmp_path):
    with pytest.raises(CheckpointError, match=r"no model_index\.json"):
        load_base(str(tmp_path))
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_base(str(tmp_path))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"layers": 0}, "layers is 0; give at least 1"),
        ({"text_layers": -1}, "text_layers is -1; give at least 1"),
        ({"length": 2}, "length is 2; give at least 3"),
        ({"channels": []}, r"channels=\[\]: give numbers"),
        ({"channels": [64, 80]}, r"channels=\[64, 80\]: give numbers that groups=32 and heads=4 divide"),
        ({"channels": [64, 96], "heads": 5}, "and heads=5 divide"),
        ({"text_width": 130}, "text_width=130: give a number that text_heads=4 divides"),
    ],
)
def test_sizes_that_make_no_pipeline_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        build_pipeline(["a", "dog"], **sizes)
