"""LESS ViT: places and wavelengths, any input, the contract with timm, and what it refuses."""

import math

import numpy as np
import pytest
import timm
import timm.optim
import torch
from torch import nn

from vision_lowrank.adapters import LoRA, count_parameters, inject, merge
from vision_lowrank.errors import ConfigError, DataError
from vision_lowrank.models import LessViT
from vision_lowrank.models.layers.embeddings import (
    field_mask,
    grid_coordinates,
    position_wavelength_embedding,
    spatial_rotation,
    spectral_rotation,
)

WAVELENGTHS = torch.tensor([443.0, 560.0, 665.0, 842.0, 1610.0])


def tiny(**options):
    torch.manual_seed(0)
    settings = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 4}
    model = LessViT(**(settings | options)).double().eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=1.0 if parameter.numel() == 48 else 0.0, std=0.2)
    return model


def image(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_embedding_is_sines_of_metres_and_nanometres():
    wavelengths = torch.tensor([[500.0, 900.0], [600.0, 2000.0]])
    coordinates = grid_coordinates(wavelengths, torch.tensor([10.0, 2.5]), rows=3, columns=2, patch_size=4)
    spectral, spatial = position_wavelength_embedding(coordinates, 16)
    assert not spectral[:, 0].any()
    assert not spatial[:, :, 0].any()
    for b, (gsd, nanometres) in enumerate(zip((10.0, 2.5), wavelengths.tolist(), strict=True)):
        for c, value in enumerate(nanometres):
            angles = [value / 10000 ** (k / 8) for k in range(8)]
            expected = [math.sin(a) / 2 for a in angles] + [math.cos(a) / 2 for a in angles]
            assert spectral[b, 1 + c, 0].tolist() == pytest.approx(expected, abs=1e-4)
        for row in range(3):
            for column in range(2):
                expected = []
                for index in (column, row):
                    angles = [index * 4 * gsd / 10000 ** (k / 4) for k in range(4)]
                    expected += [math.sin(a) / 2 for a in angles] + [math.cos(a) / 2 for a in angles]
                assert spatial[b, 0, 1 + row * 2 + column].tolist() == pytest.approx(expected, abs=1e-4)
    _, in_patches = position_wavelength_embedding(coordinates, 16, unit=4)
    halved = grid_coordinates(wavelengths, torch.tensor([2.5, 0.625]), rows=3, columns=2, patch_size=4)
    assert torch.equal(in_patches, position_wavelength_embedding(halved, 16)[1])


def test_rotations_turn_by_wavelength_and_by_place():
    coordinates = grid_coordinates(torch.tensor([[400.0, 1000.0]]), torch.tensor([1.0]), 2, 4, 3)
    sine, cosine = spectral_rotation(coordinates, 4, (400.0, 2400.0))
    for c, place in enumerate((-1.0, -0.4)):
        angles = [2 * math.pi * place / 100 ** (k / 2) for k in range(2)] * 2
        assert sine[0, 0, 1 + c].tolist() == pytest.approx([math.sin(a) for a in angles], abs=1e-6)
        assert cosine[0, 0, 1 + c].tolist() == pytest.approx([math.cos(a) for a in angles], abs=1e-6)
    assert sine[0, 0, 0].tolist() == [0] * 4
    assert cosine[0, 0, 0].tolist() == [1] * 4
    sine, _ = spatial_rotation(coordinates, 8)
    for n in range(8):
        row, column = (n // 4 + 0.5) / 2 * 2 - 1, (n % 4 + 0.5) / 4 * 2 - 1
        angles = [2 * math.pi * place / 100 ** (k / 2) for place in (row, column) for k in range(2)] * 2
        assert sine[0, 0, 1 + n].tolist() == pytest.approx([math.sin(a) for a in angles], abs=1e-6)


def test_field_reaches_so_many_metres():
    coordinates = grid_coordinates(torch.ones(2, 1), torch.tensor([10.0, 20.0]), rows=3, columns=5, patch_size=16)
    mask = field_mask(coordinates.metres, 320.0)
    for b, gsd in enumerate((10, 20)):
        for i in range(15):
            for j in range(15):
                distance = math.hypot(i // 5 - j // 5, i % 5 - j % 5) * 16 * gsd
                assert bool(mask[b, 0, 1 + i, 1 + j]) == (distance <= 320)
    assert mask[:, 0, 0].all()
    assert mask[:, 0, :, 0].all()
    # places in float32: patches of 1.2 m, 50 of which are further than 60 m by rounding, the 51st in truth
    metres = grid_coordinates(torch.ones(1, 1), torch.tensor([0.6]), rows=1, columns=60, patch_size=2).metres
    assert (metres[0, 50, 1] - metres[0, 0, 1]).item() != 60
    for start in range(9):
        assert field_mask(metres, 60.0)[0, 0, 1 + start, 1 + start + 50]
        assert not field_mask(metres, 60.0)[0, 0, 1 + start, 1 + start + 51]


@pytest.mark.parametrize(
    "options",
    [{}, {"embedding": "rope", "rank": 2}, {"field_radius": 20.0}, {"attention": "additive"},
     {"attention": "full", "embedding": "rope", "field_radius": 20.0}],
)  # fmt: skip
def test_samples_of_a_batch_do_not_meet_and_padding_changes_nothing(options):
    model = tiny(global_pool="avg", **options)
    x, y = image(1, 5, 24, 16), image(1, 3, 24, 16)
    alone = [model(x, WAVELENGTHS, 2.0), model(y, WAVELENGTHS[1:4] + 20, 5.0)]
    batch = torch.cat([x, torch.cat([y, torch.tensor([99.0, math.nan]).view(1, 2, 1, 1).expand(1, 2, 24, 16)], 1)])
    wavelengths = torch.stack([WAVELENGTHS, torch.tensor([580.0, 685.0, 862.0, 1.0, math.nan])])
    present = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    together = model(batch, wavelengths, torch.tensor([2.0, 5.0]), present=present)
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-10, rtol=0)


@pytest.mark.parametrize("embedding", ["sincos", "rope"])
def test_order_of_channels_is_of_no_account_and_their_wavelength_is(embedding):
    model = tiny(embedding=embedding)
    x, order = image(2, 5, 16, 16), torch.tensor([3, 0, 4, 1, 2])
    before = model(x, WAVELENGTHS, 10.0)
    torch.testing.assert_close(model(x[:, order], WAVELENGTHS[order], 10.0), before)
    assert (model(x, WAVELENGTHS[order], 10.0) - before).abs().max() > 1e-5


@pytest.mark.parametrize(("height", "width"), [(8, 8), (40, 24), (21, 30)])
@pytest.mark.parametrize("channels", [1, 5])
def test_any_size_and_number_of_channels(height, width, channels):
    model = tiny()
    x = image(2, channels, height, width)
    tokens = model.forward_features(x, WAVELENGTHS[:channels], 3.0)
    rows, columns = math.ceil(height / 8), math.ceil(width / 8)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (0, rows * 8 - height), (0, columns * 8 - width)), mode="edge")
    expected = model.forward_features(torch.from_numpy(padded), WAVELENGTHS[:channels], 3.0)
    assert torch.equal(tokens, expected)
    pixels = padded[1, channels - 1, (rows - 1) * 8 :, :8].reshape(-1)
    embedded = model.patch_embed["optical"](torch.from_numpy(pixels))
    found = model.patches(x, WAVELENGTHS[:channels], 3.0).pixels[1, channels - 1, (rows - 1) * columns]
    torch.testing.assert_close(model.patch_embed["optical"](found), embedded)


def test_radar_has_an_embedding_of_its_own_and_may_come_alone():
    model = tiny()
    x, radar = image(2, 5, 16, 16), image(2, 2, 16, 16)
    codes = torch.tensor([5500.0, 5700.0])
    both = model.forward_features(x, WAVELENGTHS, 10.0, radar, codes)
    assert both.shape == (2, 8, 5, 48)
    alone = model.forward_features(None, None, 10.0, radar, codes)
    assert torch.equal(model.forward_features(x[:, :0], [], 10.0, radar, codes), alone)
    as_optical = model.forward_features(radar, codes, 10.0)
    assert (alone - as_optical).abs().max() > 1e-2
    assert (model(x, WAVELENGTHS, 10.0, radar, codes) - model(x, WAVELENGTHS, 10.0)).abs().max() > 1e-4
    with pytest.raises(ConfigError, match="build it with radar=True"):
        tiny(radar=False)(x, WAVELENGTHS, 10.0, radar, codes)


def test_kept_tokens_are_computed_as_if_the_others_were_not_there():
    model = tiny(field_radius=30.0, embedding="rope", channel_dim_per_head=4)
    x, radar = image(2, 5, 24, 24), image(2, 2, 24, 24)
    patches = model.patches(x, WAVELENGTHS, 2.0, radar, [5500.0, 5700.0])
    channels, positions = torch.tensor([[0, 3, 6], [1, 2, 4]]), torch.tensor([[0, 4], [5, 8]])
    tokens = model.encode(patches, channels, positions)
    embedded = model.embed(patches)
    rows, columns = (torch.cat([torch.zeros(2, 1, dtype=torch.long), 1 + index], 1) for index in (channels, positions))
    for b in range(2):
        start = embedded[b][rows[b]][:, columns[b]][None]
        kept = patches.coordinates.keep(channels, positions)
        context = model.context(
            type(kept)(*(part[b : b + 1] for part in (kept.wavelengths, kept.metres, kept.relative)))
        )
        for block in model.blocks:
            start = block(start, context)
        torch.testing.assert_close(tokens[b], model.norm(start)[0])


def test_models_work_after_another_was_traced():
    # of a width that nothing else in this process has, so that nothing is remembered of it
    model = tiny(embed_dim=84).float()
    arguments = (image(2, 5, 16, 16).float(), WAVELENGTHS.expand(2, -1), torch.full((2,), 10.0))
    traced = torch.export.export(model, arguments).module()
    found = model(*arguments)
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, traced(*arguments))
    spectral, _ = position_wavelength_embedding(grid_coordinates(*arguments[1:], 1, 1, 8), 84)
    angles = [443.0 / 10000 ** (k / 42) for k in range(42)]
    expected = [math.sin(a) / 2 for a in angles] + [math.cos(a) / 2 for a in angles]
    assert spectral[0, 1, 0].tolist() == pytest.approx(expected, abs=1e-4)


def test_contract_with_timm():
    model = timm.create_model("less_vit_tiny", num_classes=3, patch_size=8).eval()
    x = torch.randn(2, 5, 16, 24)
    tokens = model.forward_features(x, WAVELENGTHS, 10.0)
    features = model.forward_head(tokens, pre_logits=True)
    assert torch.equal(features, tokens[:, 0, 0])
    torch.testing.assert_close(model(x, WAVELENGTHS, 10.0), features @ model.head.weight.T + model.head.bias)
    final, maps = model.forward_intermediates(x, WAVELENGTHS, 10.0, indices=[3, 11], norm=True)
    assert torch.equal(final, tokens)
    torch.testing.assert_close(maps[1], tokens[:, 0, 1:].transpose(1, 2).unflatten(2, (2, 3)))
    (grid,) = model.forward_intermediates(
        x, WAVELENGTHS, 10.0, indices=[3], norm=True, output_fmt="BCND", intermediates_only=True
    )
    assert torch.equal(maps[0].flatten(2).transpose(1, 2), grid[:, 0, 1:])
    early, maps = model.forward_intermediates(x, WAVELENGTHS, 10.0, indices=[1, 3], norm=True, stop_early=True)
    assert torch.equal(early[:, 0, 1:], maps[1].flatten(2).transpose(1, 2))
    del model.blocks[4:]
    assert torch.equal(early, model.forward_features(x, WAVELENGTHS, 10.0))
    features = early[:, 0, 0]
    assert features.shape[1] == model.head_hidden_size
    model.reset_classifier(0)
    assert torch.equal(model(x, WAVELENGTHS, 10.0), features)
    assert model.no_weight_decay() == {"cls_token", "channel_cls_token", "spatial_cls_token"}


def test_timm_makes_maps_of_some_blocks_of_it():
    model = timm.create_model("less_vit_tiny", features_only=True, patch_size=4, depth=5, out_indices=(1, -1)).eval()
    assert (model.feature_info.channels(), model.feature_info.reduction()) == ([192, 192], [4, 4])
    x, radar = torch.randn(2, 5, 8, 12), torch.randn(2, 2, 8, 12)
    found = model(x, WAVELENGTHS, gsd=10.0, radar=radar, radar_wavelengths=[5500.0, 5700.0])
    grids = model.model.forward_intermediates(
        *(x, WAVELENGTHS, 10.0, radar, [5500.0, 5700.0]), output_fmt="BCND", intermediates_only=True
    )
    for features, grid in zip(found, (grids[1], grids[4]), strict=True):
        assert torch.equal(features, grid[:, 0, 1:].mT.unflatten(2, (2, 3)))
    assert timm.create_model("less_vit_tiny", features_only=True, depth=5).feature_info.out_indices == (-3, -2, -1)


def test_rates_of_layers_are_those_of_a_timm_vit():
    def scales(model):
        optimiser = timm.optim.create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
        groups = {id(each): group["lr_scale"] for group in optimiser.param_groups for each in group["params"]}
        return {name: groups[id(each)] for name, each in model.named_parameters()}

    def layer(name):
        parts = name.split(".")
        stem = "cls_token" in parts[0] or parts[0] in ("patch_embed", "pos_embed")
        return "stem" if stem else ".".join(parts[: 2 if parts[0] == "blocks" else 1])

    found = []
    for name in ("less_vit_tiny", "vit_tiny_patch16_224"):
        by_layer = {}
        for parameter, scale in scales(timm.create_model(name, num_classes=3, depth=4)).items():
            by_layer.setdefault(layer(parameter), set()).add(scale)
        found.append(by_layer)
    assert found[0] == found[1]
    assert found[0] == {
        "stem": {2.0**-5}, "blocks.0": {2.0**-4}, "blocks.1": {2.0**-3}, "blocks.2": {2.0**-2}, "blocks.3": {2.0**-1},
        "norm": {2.0**-1}, "head": {1.0},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "millions"),
    [
        ("less_vit_small", {"channel_dim_per_head": 2}, 21.04), ("less_vit_small", {}, 18.35),
        ("less_vit_small", {"channel_dim_per_head": 2, "rank": 4}, 25.06), ("less_vit_small", {"rank": 4}, 19.42),
        ("less_vit_base", {"channel_dim_per_head": 2}, 83.20), ("less_vit_base", {}, 72.48),
        ("less_vit_base", {"rank": 4}, 76.74),
    ],
)  # fmt: skip
def test_parameter_counts_are_those_published(name, options, millions):
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    # the published counts are without the scales of residual branches
    counted = [parameter.numel() for name, parameter in model.named_parameters() if ".ls" not in name]
    assert sum(counted) / 1e6 == pytest.approx(millions, abs=0.006)


def test_sizes_and_channels_of_images_that_others_ask_for_are_passed_over():
    with torch.device("meta"):
        model = timm.create_model("less_vit_tiny", img_size=224, in_chans=13, depth=1)
    assert "img_size" not in model.settings
    assert "in_chans" not in model.settings


def test_saved_model_and_checkpointed_gradients_are_the_same(tmp_path):
    model = tiny(field_radius=25.0).float()
    model.save_pretrained(tmp_path)
    loaded = LessViT.from_pretrained(tmp_path)
    x = image(2, 5, 16, 16).float()
    assert torch.equal(loaded.eval()(x, WAVELENGTHS, 10.0), model(x, WAVELENGTHS, 10.0))
    loaded.set_grad_checkpointing()
    for each in (model, loaded):
        each.train()
        each(x, WAVELENGTHS, 10.0).square().sum().backward()
    for (name, one), other in zip(model.named_parameters(), loaded.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, msg=name)


@pytest.mark.parametrize("classes", [7, 0])
@pytest.mark.parametrize("pool", [None, "avg"])
def test_a_model_with_another_head_is_saved_with_it(classes, pool, tmp_path):
    model = tiny().float()
    model.reset_classifier(classes, pool)
    model.save_pretrained(tmp_path)
    loaded = LessViT.from_pretrained(tmp_path, strict=True).eval()
    x = image(2, 5, 16, 16).float()
    assert loaded(x, WAVELENGTHS, 10.0).shape == (2, classes or 48)
    tokens = loaded.forward_features(x, WAVELENGTHS, 10.0)
    pooled = tokens[:, 0, 0] if pool is None else tokens[:, 1:, 1:].mean((1, 2))
    torch.testing.assert_close(loaded.forward_head(tokens, pre_logits=True), pooled)
    assert torch.equal(loaded(x, WAVELENGTHS, 10.0), model(x, WAVELENGTHS, 10.0))


def test_adapters_by_name_merge_exactly():
    model = tiny()
    x = image(2, 5, 16, 16)
    before = model(x, WAVELENGTHS, 10.0)
    paths = inject(model, ["qk", "v", "attn.proj", "kv", "mlp.fc1", "mlp.fc2"], LoRA(2, 4), train="head")
    assert len(paths) == 2 * (2 + 2 + 1 + 2 + 2)
    assert torch.equal(model(x, WAVELENGTHS, 10.0), before)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    adapted = model(x, WAVELENGTHS, 10.0)
    assert (adapted - before).abs().max() > 1e-3
    merge(model)
    torch.testing.assert_close(model(x, WAVELENGTHS, 10.0), adapted)
    assert count_parameters(model).head == 4 * 48 + 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 10.0), "image has 5 channels but no wavelengths"),
        (([500.0, 600.0], 10.0), r"wavelengths are \(2,\) for image of \(2, 5, 16, 16\)"),
        ((WAVELENGTHS / 1000, 10.0), "look like micrometres"),
        ((torch.stack([WAVELENGTHS, WAVELENGTHS / 1000]), 10.0), r"is 0\.443, beside 1610; it looks like micrometres"),
        ((-WAVELENGTHS, 10.0), r"band index 0 is -443"),
        ((WAVELENGTHS, 0.0), "gsd is"),
    ],
)
def test_wrong_wavelengths_and_pixel_sizes(arguments, message):
    with pytest.raises(DataError, match=message):
        tiny()(image(2, 5, 16, 16), *arguments)


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((2, 5, 16, 16), {"gsd": None}, "gsd is None; give the size of a pixel in metres"),
        ((2, 5, 16, 16), {"gsd": torch.ones(3)}, r"gsd is of shape \(3,\); give .* one for all 2 images or \(batch,\)"),
        ((2, 5, 16, 16), {"gsd": torch.ones(2, 1)}, r"gsd is of shape \(2, 1\)"),
        ((2, 5, 16, 16), {"gsd": [10.0, 10.0, 10.0]}, r"gsd is of shape \(3,\)"),
        ((0, 5, 16, 16), {}, r"channels of the batch are \(0, 5, 16, 16\); give at least one image"),
        ((2, 0, 16, 16), {"wavelengths": []}, r"channels of the batch are \(2, 0, 16, 16\)"),
        ((2, 5, 0, 16), {}, r"channels of the batch are \(2, 5, 0, 16\)"),
        ((2, 5, 16, 16), {"present": torch.ones(2, 5)}, r"present is torch\.float32; give bool"),
        ((2, 5, 16, 16), {"present": torch.tensor([[True] * 5, [False] * 5])}, r"present leaves images \[1\]"),
        ((2, 5, 16, 24), {"radar": (1, 2, 16, 24)}, r"image \(2, 5, 16, 24\), radar \(1, 2, 16, 24\): give both"),
        ((2, 5, 16, 24), {"radar": (2, 2, 8, 24)}, r"radar \(2, 2, 8, 24\): give both"),
        ((2, 5, 16, 24), {"radar": (2, 2, 16, 16)}, "give both of one batch, height and width"),
    ],
)
def test_batches_that_cannot_be_read(shape, arguments, message):
    if "radar" in arguments:
        arguments = {"radar": image(*arguments["radar"]), "radar_wavelengths": [5500.0, 5700.0]}
    with pytest.raises(DataError, match=message):
        tiny()(image(*shape), **({"wavelengths": WAVELENGTHS, "gsd": 10.0} | arguments))


def test_wrong_images_and_settings():
    model = tiny()
    with pytest.raises(ConfigError, match="output_fmt is 'NLC'; it can be NCHW or BCND"):
        model.forward_intermediates(image(2, 5, 16, 16), WAVELENGTHS, 10.0, output_fmt="NLC")
    with pytest.raises(ConfigError, match="neither image nor radar"):
        model(None, None, 10.0)
    with pytest.raises(DataError, match=r"torch\.int16"):
        model(torch.ones(1, 5, 16, 16, dtype=torch.int16), WAVELENGTHS, 10.0)
    with pytest.raises(DataError, match=r"present is \(1, 4\)"):
        model(image(1, 5, 16, 16), WAVELENGTHS, 10.0, present=torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(DataError, match="radar has 2 channels but no radar_wavelengths"):
        model(None, None, 10.0, image(1, 2, 16, 16))
    with pytest.raises(ConfigError, match="global_pool is 'max'; it can be token or avg"):
        tiny(global_pool="max")
    with pytest.raises(ConfigError, match="global_pool is 'max'; it can be token or avg"):
        model.reset_classifier(4, "max")
    for limits in ((500.0, 500.0), (2500.0, 400.0), (400.0,)):
        with pytest.raises(ConfigError, match=r"wavelength_range is \[.*\]; give two nanometres, the lesser first"):
            tiny(wavelength_range=limits)
    with pytest.raises(ConfigError, match="embedding is 'fourier'"):
        tiny(embedding="fourier")
    for options, message in (
        (
            {"embedding": "rope", "channel_dim_per_head": 1},
            "embedding=rope needs .* 1 and 16: change channel_dim_per_head",
        ),
        ({"embedding": "rope", "attention": "full", "embed_dim": 54}, "here 9 and 9: change embed_dim or num_heads"),
        ({"embedding": "rope", "attention": "full", "embed_dim": 27}, "here 5 and 4: change embed_dim or num_heads"),
        ({"attention": "additive", "channel_dim_per_head": 32}, "channel_dim_per_head is 32; a head has 16: give that"),
        ({"attention": "full", "embed_dim": 64}, "embed_dim is 64; give a multiple of num_heads, 3"),
        ({"embed_dim": 66, "channel_dim_per_head": 2}, "embed_dim is 66; embedding=sincos needs a multiple of 4"),
        # not even itself would a position see
        ({"field_radius": -5}, "field_radius is -5; give at least 0"),
        ({"num_classes": -1}, "num_classes is -1; give at least 0"),
        ({"drop_rate": 2.0}, "drop_rate is 2.0; give a share from 0 up to, but not, 1"),
        ({"attn_drop_rate": -0.1}, "attn_drop_rate is -0.1; give a share"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is 1.0; give a share"),
        ({"mlp_ratio": 0.01}, "mlp_ratio is 0.01; of a width of 48 that leaves nothing"),
        ({"mlp_ratio": -1.0}, "mlp_ratio is -1.0; of a width of 48 that leaves nothing"),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny(**options)
    # another precision than the model's is converted
    x = image(1, 5, 16, 16)
    torch.testing.assert_close(model(x.float(), WAVELENGTHS, 10.0), model(x, WAVELENGTHS, 10.0), atol=1e-4, rtol=0)
