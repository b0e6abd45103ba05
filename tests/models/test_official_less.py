"""The original LESS ViT and Hyper-MAE against outputs that their authors' code gave."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from vision_lowrank.errors import CheckpointError, ConfigError, DataError
from vision_lowrank.models import official


@pytest.fixture
def load(shared_path):
    """Function that returns state dict, the other tensors and the specification of a recorded run."""

    def read(name):
        tensors = load_file(shared_path("golden", f"{name}.safetensors"))
        state = {key[3:]: tensors.pop(key) for key in list(tensors) if key.startswith("sd.")}
        return state, tensors, json.loads(shared_path("golden", f"{name}.json").read_text())

    return read


def close(found, expected, what=""):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0, msg=lambda text: f"{what}: {text}")


def watch(module, keep):
    """Lists what a submodule puts out."""
    module.register_forward_hook(lambda _module, _inputs, output: keep.append(output))
    return keep


def test_bare_attention(load):
    state, others, spec = load("less_attn_r4")
    attention = official.kronecker_attention(state, spec)
    channel = watch(attention.attention.channel_branch, [])
    spatial = watch(attention.attention.spatial_branch, [])
    with torch.inference_mode():
        close(attention(others["in.x_c"], others["in.x_s"], others["in.mask"]), others["out.y"])
        close(attention(others["in.x_c"], others["in.x_s"]), others["out.y_nomask"])
    close(channel[0], others["mid.channel_branch"])
    close(spatial[0], others["mid.spatial_branch"])


@pytest.mark.parametrize("name", ["less_a", "less_a_paper_r2", "less_b"])
def test_tokens_and_intermediates(load, name):
    state, others, spec = load(name)
    encoder = official.less_vit(state, spec)
    assert not encoder.training
    periods = sum(value.numel() for key, value in state.items() if "periods" in key)
    assert sum(parameter.numel() for parameter in encoder.parameters()) + periods == spec["n_params"]
    first = encoder.model.blocks[0]
    seen = {
        "mid.block0.attn": watch(first.attn, []),
        "mid.block0.channel_branch": watch(first.attn.attn.channel_branch, []),
        "mid.block0.spatial_branch": watch(first.attn.attn.spatial_branch, []),
        "mid.block0.pool_xc": watch(first.attn.channel_norm, []),
        "mid.block0.pool_xs": watch(first.attn.spatial_norm, []),
        "mid.patch_embed": watch(encoder.model.patch_embed["optical"], []),
    }
    seen |= {f"mid.block{index}.out": watch(block, []) for index, block in enumerate(encoder.model.blocks)}
    image, wavelengths = others["in.optical"], others["in.optical_channel_wv"]
    gsd = spec["spatial_resolution"]
    with torch.inference_mode():
        close(encoder.forward_tokens(image, wavelengths, gsd), others["out.tokens"])
        for key, found in seen.items():
            expected = others[key]
            if key.startswith("mid.block0.pool"):
                norm = first.attn.channel_norm if key.endswith("xc") else first.attn.spatial_norm
                expected = torch.nn.functional.layer_norm(expected, expected.shape[-1:], norm.weight, norm.bias, 1e-6)
            close(found[0], expected, key)
        if "in.radar" in others:
            radar = (others["in.radar"], others["in.radar_channel_wv"])
            close(encoder.forward_tokens(image, wavelengths, gsd, *radar), others["out.multi_tokens"])
            close(encoder.forward_tokens(None, None, gsd, *radar), others["out.radar_tokens"])


@pytest.mark.parametrize("name", ["less_mae", "less_mae_paper_multi"])
def test_masked_autoencoder(load, name):
    state, others, spec = load(name)
    model = official.hyper_mae(state, spec)
    noise = [others[f"in.noise{index}"] for index in range(2 * len(model.passes))]
    made = []
    reconstruct = model.model.reconstruct
    model.model.reconstruct = lambda *arguments: made.append(reconstruct(*arguments)) or made[-1]
    image, wavelengths, gsd = others["in.optical"], others["in.optical_channel_wv"], spec["spatial_resolution"]
    loss = model.loss(image, wavelengths, gsd, noise, radar=others.get("in.radar"))
    close(loss, others["out.loss"])
    for seen, result in zip(model.passes, made, strict=True):
        close(result.prediction, others[f"out.{seen}_recon"])
        close(result.target, others["out.target"])
        assert torch.equal(result.hidden_channels, others[f"out.{seen}_channel_mask"].bool())
        assert torch.equal(result.hidden_positions, others[f"out.{seen}_pos_mask"].bool())
    loss.backward()
    ours = {official.less._rename(key): key for key in state}
    for key, parameter in model.model.named_parameters():
        norm = 0.0 if parameter.grad is None else parameter.grad.norm().item()
        expected = spec["grad_norms"].get(ours[key])
        if expected is not None:
            assert norm == pytest.approx(expected, rel=1e-3, abs=1e-5), key
        stored = others.get(f"out.grad.{ours[key]}")
        if stored is not None:
            close(parameter.grad.flatten(), stored.flatten(), key)


def test_radar_has_the_wavelengths_of_the_original_and_an_image_needs_its_own(load):
    state, others, spec = load("less_a")
    encoder = official.less_vit(state, spec)
    radar = others["in.radar"]
    with torch.inference_mode():
        close(encoder.forward_tokens(None, None, spec["spatial_resolution"], radar), others["out.radar_tokens"])
    with pytest.raises(DataError, match=r"image channels .* come without wavelengths"):
        encoder.forward_tokens(others["in.optical"], None, 10, radar)
    with pytest.raises(DataError, match=r"image channels \(2, 6, 32, 32\) have wavelengths \(5,\); give as many"):
        encoder.forward_tokens(others["in.optical"], torch.arange(400.0, 900.0, 100.0), 10)
    with pytest.raises(DataError, match="neither an image nor radar"):
        encoder.forward_tokens(None, None, 10)
    state, others, spec = load("less_b")
    with pytest.raises(DataError, match=r"radar channels .* come without wavelengths"):
        official.less_vit(state, spec).forward_tokens(None, None, 10, radar)


def test_scales_that_the_original_lacks_are_1(load):
    state, others, spec = load("less_a")
    image = others["in.optical"], others["in.optical_channel_wv"], spec["spatial_resolution"]
    ones = {key: torch.ones_like(value) if ".ls" in key else value for key, value in state.items()}
    bare = {key: value for key, value in state.items() if ".ls" not in key}
    assert len(bare) == len(state) - 6
    config = spec["config"] | {"init_values": None}
    with torch.inference_mode():
        expected = official.less_vit(ones, spec).forward_tokens(*image)
        assert torch.equal(official.less_vit(bare, spec | {"config": config}).forward_tokens(*image), expected)


def test_periods_of_another_base_are_refused(load):
    state, _, spec = load("less_b")
    name = next(key for key in state if "periods_hw" in key)
    with pytest.raises(CheckpointError, match="holds other periods than powers of 100"):
        official.less_vit(state | {name: state[name] * 1.5}, spec)


def test_decoder_is_as_wide_inside_as_the_encoder(load):
    state, _, spec = load("less_mae")
    narrow = {}
    for key, value in state.items():
        if ".mlp.fc1." in key:
            value = value[: len(value) // 2]
        narrow[key] = value[:, : value.shape[1] // 2] if key.endswith(".mlp.fc2.weight") else value
    model = official.hyper_mae(narrow, spec | {"config": spec["config"] | {"mlp_ratio": 2.0}}).model
    assert torch.equal(model.decoder_blocks[0].mlp.fc1.weight, state["decoder.decoder_blocks.0.mlp.fc1.weight"][:64])


def test_what_does_not_fit_is_refused(load):
    state, _, spec = load("less_a")
    with pytest.raises(ConfigError, match="code is 'new'; it can be paper or succ"):
        official.less_vit(state, spec | {"code": "new"})
    with pytest.raises(ConfigError, match="lacks depth"):
        official.less_vit(state, spec | {"config": {key: 1 for key in spec["config"] if key != "depth"}})
    state.pop("norm.weight")
    with pytest.raises(CheckpointError, match=re.compile(r"not of this configuration.*norm\.weight", re.DOTALL)):
        official.less_vit(state, spec)
    state, others, spec = load("less_mae")
    for name in ("mask_ratio", "channel_mask_ratio"):
        with pytest.raises(ConfigError, match=f"the specification lacks {name}; take it from the same run"):
            official.hyper_mae(state, {key: value for key, value in spec.items() if key != name})
    name = "decoder_channel_embed_dims_per_head"
    config = {key: value for key, value in spec["config"].items() if key != name}
    with pytest.raises(ConfigError, match=f"configuration lacks {name}"):
        official.hyper_mae(state, spec | {"config": config})
    with pytest.raises(ConfigError, match="modal is 'infrared'; it can be optical, radar, multi, or None"):
        official.hyper_mae(state, spec | {"modal": "infrared"})
    with pytest.raises(ConfigError, match="1 noise tensors; this model takes 2 for each of optical"):
        official.hyper_mae(state, spec).loss(
            others["in.optical"], torch.tensor(spec["wavelengths"]), 10, [torch.rand(2, 6)]
        )
