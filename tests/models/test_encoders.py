"""Encoders against raw models, numpy and plain attention, on even and odd sizes, and what they refuse."""

import inspect

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import nn

from vision_lowrank.errors import CheckpointError, ConfigError, DataError
from vision_lowrank.instantiate import instantiate
from vision_lowrank.models import LessViT
from vision_lowrank.models.channel_vit import ChannelViT
from vision_lowrank.models.encoders import (
    BandStatistics,
    Encoder,
    LessEncoder,
    checked_image_features,
    checked_patch_features,
    checked_patch_maps,
)
from vision_lowrank.models.heads import LessSegmentation
from vision_lowrank.models.timm_encoder import TimmEncoder, average_matrix, select_matrix

# shuffled, as sensors may list them
WAVELENGTHS = torch.tensor([842.0, 443.0, 665.0, 492.0, 560.0])
METHODS = [method for method in vars(Encoder) if not method.startswith("_")]


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def less(**options):
    torch.manual_seed(0)
    return LessViT(**({"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "radar": False} | options))


def timm_encoder(name="test_vit", channels="select", **options):
    torch.manual_seed(0)
    encoder = TimmEncoder(name, channels, **options).eval()
    encoder.prepare(WAVELENGTHS.tolist())
    return encoder


@pytest.mark.parametrize("channels", [1, 5])
def test_less_features_are_means_of_tokens(channels):
    encoder = LessEncoder(less(num_classes=7).double()).eval()
    image = normal(2, channels, 20, 13).double()
    tokens = encoder.model.forward_features(image, WAVELENGTHS[:channels], 10.0).detach()
    features = encoder.forward_patch_features(image, WAVELENGTHS[:channels], 10.0).detach()
    assert features.shape == (2, 48, 3, 2)
    for row in range(3):
        for column in range(2):
            expected = sum(tokens[:, 1 + c, 1 + 2 * row + column] for c in range(channels)) / channels
            torch.testing.assert_close(features[:, :, row, column], expected, atol=1e-12, rtol=0)
    image_features = encoder.forward_image_features(image, WAVELENGTHS[:channels], torch.tensor([10.0, 10.0]))
    expected = tokens[:, 1:, 1:].flatten(1, 2).mean(1)
    torch.testing.assert_close(image_features.detach(), expected, atol=1e-12, rtol=0)


def test_less_features_do_not_depend_on_the_order_of_channels():
    encoder = LessEncoder(less().double()).eval()
    image, order = normal(2, 5, 16, 16).double(), [3, 0, 4, 2, 1]
    features = encoder.forward_patch_features(image, WAVELENGTHS, 10.0)
    shuffled = encoder.forward_patch_features(image[:, order], WAVELENGTHS[order], 10.0)
    torch.testing.assert_close(shuffled, features, atol=1e-12, rtol=0)
    wrong = encoder.forward_patch_features(image[:, order], WAVELENGTHS, 10.0)
    assert (wrong - features).abs().max() > 1e-3


def test_less_weights_come_from_their_folder_and_the_name_says_so(tmp_path):
    saved = less(num_classes=3)
    saved.save_pretrained(tmp_path)
    image = normal(1, 5, 16, 16)
    expected = saved.eval().forward_features(image, WAVELENGTHS, 10.0)[:, 1:, 1:].mean((1, 2))
    torch.manual_seed(9)
    configured = LessViT(patch_size=8, embed_dim=48, depth=2, num_heads=3, radar=False, drop_rate=0.1)
    for encoder in (LessEncoder(configured, str(tmp_path)), LessEncoder(weights=str(tmp_path))):
        found = encoder.eval().forward_image_features(image, WAVELENGTHS, 10.0)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        assert encoder.name == "less_vit 48 x 2 (pretrained)"
    assert configured.blocks[0].drop.p == 0.1
    assert LessEncoder(less()).name == "less_vit 48 x 2 (random)"


def test_less_refuses_weights_that_it_cannot_use(tmp_path):
    with pytest.raises(ConfigError, match="neither model nor weights"):
        LessEncoder()
    with pytest.raises(CheckpointError, match=r"no config\.json there; give a folder written by"):
        LessEncoder(less(), str(tmp_path))
    less().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"depth=2, rank=1, not 3, 2; set these, or model to null"):
        LessEncoder(less(depth=3, rank=2), str(tmp_path))
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    save_file({name: value for name, value in state.items() if name != "blocks.1.mlp.fc1.bias"}, file)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.mlp\.fc1\.bias"):
        LessEncoder(less(), str(tmp_path))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be loaded as LessViT"):
        LessEncoder(weights=str(tmp_path))
    LessSegmentation(less(), "linear", 2).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="cannot be loaded as LessViT"):
        LessEncoder(weights=str(tmp_path / "other"))


def test_band_statistics_are_those_of_numpy():
    encoder = BandStatistics(4)
    encoder.prepare([500.0, 600.0, 700.0])
    image = normal(2, 3, 10, 7)
    array = np.pad(image.numpy().astype(np.float64), ((0, 0), (0, 0), (0, 2), (0, 1)), mode="edge")
    features = checked_patch_features(encoder, image, WAVELENGTHS[:3], 10.0).numpy()
    assert features.shape == (2, 12, 3, 2)
    for row in range(3):
        for column in range(2):
            part = array[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].reshape(2, 3, 16)
            expected = np.concatenate([part.mean(2), part.std(2), part.min(2), part.max(2)], axis=1)
            np.testing.assert_allclose(features[:, :, row, column], expected, atol=1e-6)
    whole = image.numpy().reshape(2, 3, -1)
    expected = np.concatenate([whole.mean(2), whole.std(2), whole.min(2), whole.max(2)], axis=1)
    np.testing.assert_allclose(checked_image_features(encoder, image, WAVELENGTHS[:3], 10.0), expected, atol=1e-6)
    with pytest.raises(ConfigError, match=r"BandStatistics: .*\(2, 16\), not \(2, 12\)"):
        checked_image_features(encoder, normal(2, 4, 8, 8), WAVELENGTHS[:4], 10.0)
    with pytest.raises(ConfigError, match="patch_size is 0; give at least 1"):
        BandStatistics(0)


def test_select_takes_the_bands_of_each_sample_that_are_nearest():
    encoder, image = timm_encoder(), normal(2, 5, 32, 32)
    red, green, blue = 2, 4, 3
    torch.testing.assert_close(
        encoder.forward_patch_features(image, WAVELENGTHS, 10.0),
        encoder.model.forward_intermediates(image[:, [red, green, blue]], norm=True, intermediates_only=True)[-1],
    )
    both = torch.stack([WAVELENGTHS, WAVELENGTHS.flip(0)])
    chosen = torch.stack([image[0, [2, 4, 3]], image[1, [2, 0, 1]]])
    torch.testing.assert_close(
        encoder.forward_image_features(image, both, 10.0), encoder.model(chosen), atol=1e-5, rtol=1e-5
    )
    assert encoder.name == "test_vit (select, random)"


def test_select_refuses_bands_that_are_far_off():
    with pytest.raises(ConfigError, match="no band within 50 nm of 665, 492 nm; name other"):
        timm_encoder().prepare([550.0, 720.0, 400.0])
    assert select_matrix(torch.tensor([[615.0, 542.0]]), [665.0, 492.0]).tolist() == [[[1, 0], [0, 1]]]
    with pytest.raises(ConfigError, match="of 665, 560, 492 nm"):
        timm_encoder().forward_patch_features(normal(1, 5, 32, 32), WAVELENGTHS / 1000, 10.0)
    with pytest.raises(ConfigError, match="of 665 nm"):
        select_matrix(torch.tensor([[665.0, float("nan")]]), [665.0])
    with pytest.raises(DataError, match=r"wavelengths \(4,\) for images"):
        timm_encoder().forward_patch_features(normal(1, 5, 32, 32), WAVELENGTHS[:4], 10.0)
    with pytest.raises(ConfigError, match="select has 2 wavelengths; test_vit takes 3 channels"):
        timm_encoder(select=[665, 560])


def test_average_groups_neighbours_from_long_to_short():
    encoder, image = timm_encoder("test_convnext", "average"), normal(2, 5, 64, 64)
    # descending: 842 665 | 560 492 | 443
    expected = torch.stack([(image[:, 0] + image[:, 2]) / 2, (image[:, 4] + image[:, 3]) / 2, image[:, 1]], 1)
    torch.testing.assert_close(
        encoder.forward_image_features(image, WAVELENGTHS, 10.0), encoder.model(expected), atol=1e-5, rtol=1e-5
    )
    for bands in range(3, 12):
        matrix = average_matrix(torch.rand(2, bands, generator=torch.Generator().manual_seed(bands)), 3)
        sizes = (matrix > 0).sum(2)
        assert (sizes.max() - sizes.min()).item() <= 1
        torch.testing.assert_close(matrix.sum(2), torch.ones(2, 3))
        assert ((matrix > 0).sum(1) == 1).all()
    with pytest.raises(ConfigError, match="2 bands cannot be averaged in 3 groups"):
        encoder.prepare([500.0, 600.0])


def test_project_starts_as_average_and_learns():
    average, project = timm_encoder(channels="average"), timm_encoder(channels="project")
    image = normal(2, 5, 32, 32)
    features = project.forward_patch_features(image, WAVELENGTHS, 10.0)
    expected = average.forward_patch_features(image, WAVELENGTHS, 10.0)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    features.square().mean().backward()
    assert project.projection.weight.grad.abs().max() > 0
    with pytest.raises(ConfigError, match="projects 5 channels, not 4; call prepare"):
        project.forward_patch_features(image[:, :4], WAVELENGTHS[:4], 10.0)
    project.prepare([450.0, 550.0, 650.0])
    assert project.projection.weight[..., 0, 0].tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]
    with pytest.raises(ConfigError, match="projects none channels"):
        TimmEncoder("test_vit", "project").forward_patch_features(image, WAVELENGTHS, 10.0)


def test_timm_images_of_odd_sizes_are_continued_and_resized_to_the_patches_asked_for():
    encoder, image = timm_encoder(), normal(2, 5, 33, 20)
    rows, columns = np.minimum(np.arange(48), 32), np.minimum(np.arange(32), 19)
    padded = image[:, [2, 4, 3]][:, :, rows][..., columns]
    features = checked_patch_features(encoder, image, WAVELENGTHS, 10.0)
    assert features.shape == (2, 64, 3, 2)
    taken = {"norm": True, "intermediates_only": True}
    torch.testing.assert_close(features, encoder.model.forward_intermediates(padded, **taken)[-1])
    small = timm_encoder(patch_size=4)
    features = checked_patch_features(small, image, WAVELENGTHS, 10.0)
    padded = image[:, [2, 4, 3]][:, :, np.minimum(np.arange(36), 32)]
    resized = F.interpolate(padded, scale_factor=4, mode="bicubic", antialias=True)
    torch.testing.assert_close(features, small.model.forward_intermediates(resized, **taken)[-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet", "test_resnet", "test_vit"])
def test_timm_image_features_are_what_the_classifier_reads_or_the_mean(name):
    encoder, image = timm_encoder(name), normal(1, 5, 64, 64)
    features = checked_image_features(encoder, image, WAVELENGTHS, 10.0)
    patches = checked_patch_features(encoder, image, WAVELENGTHS, 10.0)
    classifier = encoder.model(image[:, [2, 4, 3]])
    expected = classifier if name != "test_efficientnet" else patches.mean((2, 3))
    assert classifier.shape[1] == (256 if name == "test_efficientnet" else encoder.dim)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


def test_timm_models_of_one_size_take_only_what_patches_make_of_it():
    encoder = timm_encoder("test_vit_relpos", patch_size=4)
    assert checked_patch_features(encoder, normal(1, 5, 38, 40), WAVELENGTHS, 10.0).shape == (1, 96, 10, 10)
    with pytest.raises(ConfigError, match=r"takes images of \(160, 160\) only, not \(128, 160\); .* makes 10 rows"):
        encoder.forward_patch_features(normal(1, 5, 32, 40), WAVELENGTHS, 10.0)


def test_timm_weights_come_from_a_file_whole(tmp_path):
    torch.manual_seed(5)
    trained = timm.create_model("test_vit", num_classes=10).eval()
    file = tmp_path / "trained.safetensors"
    save_file(trained.state_dict(), file)
    encoder, image = timm_encoder(weights=str(file)), normal(1, 5, 160, 160)
    features = encoder.forward_image_features(image, WAVELENGTHS, 10.0)
    expected = trained.forward_head(trained.forward_features(image[:, [2, 4, 3]]), pre_logits=True)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    assert encoder.name == "test_vit (select, trained.safetensors)"
    save_file({name: value for name, value in trained.state_dict().items() if name != "norm.weight"}, file)
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        TimmEncoder("test_vit", "select", weights=str(file))
    with pytest.raises(CheckpointError, match="absent"):
        TimmEncoder("test_vit", "select", weights=str(tmp_path / "absent.pt"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("test_vitt", "select"), "'test_vitt', which timm does not have"),
        (("less_vit_tiny", "select"), "no map of features by timm's contract"),
        (("test_vit", "tile"), "channels is 'tile'; it can be select, average or project"),
        (("test_vit", "select", True, "w.pt"), "pretrained=true and weights w.pt are both given"),
        (("test_vit", "select", False, None, (665.0, 560.0, 492.0), 0), "patch_size is 0; give at least 1"),
    ],
)
def test_timm_refuses(arguments, message):
    with pytest.raises(ConfigError, match=message):
        TimmEncoder(*arguments)


def channel_vit(**options):
    torch.manual_seed(0)
    settings = {"patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3, "grid_size": 2}
    encoder = ChannelViT(**(settings | options)).double().eval()
    encoder.prepare([500.0, 600.0, 700.0])
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.4)
    return encoder


def slow_channel_vit(encoder, image):
    """One sample: tokens one by one, attention as softmax of all products, head by head."""

    def norm(x, layer):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt() * (
            layer.weight
        ) + layer.bias

    kernel = encoder.patch_embed.weight.flatten(1)
    tokens = [encoder.cls_token]
    for c, channel in enumerate(image):
        for n, (i, j) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
            patch = kernel @ channel[i : i + 4, j : j + 4].flatten() + encoder.patch_embed.bias
            tokens.append(patch + encoder.pos_embed[0, n] + encoder.channel_embed[c])
    x = torch.stack(tokens)
    for block in encoder.blocks:
        query, key, value = (norm(x, block.norm1) @ block.attn.qkv.weight.T + block.attn.qkv.bias).chunk(3, 1)
        heads = []
        for h in range(3):
            part = slice(4 * h, 4 * h + 4)
            weights = (query[:, part] @ key[:, part].T / 2).exp()
            heads.append(weights / weights.sum(1, keepdim=True) @ value[:, part])
        x = x + torch.cat(heads, 1) @ block.attn.proj.weight.T + block.attn.proj.bias
        hidden = norm(x, block.norm2) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        x = x + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    return norm(x, encoder.norm)


def test_channel_vit_is_plain_attention_over_channels_and_patches():
    encoder, image = channel_vit(), normal(2, 3, 8, 8).double()
    features = checked_patch_features(encoder, image, WAVELENGTHS[:3], 10.0)
    image_features = checked_image_features(encoder, image, WAVELENGTHS[:3], 10.0)
    for sample in range(2):
        expected = slow_channel_vit(encoder, image[sample])
        torch.testing.assert_close(image_features[sample], expected[0], atol=1e-10, rtol=0)
        for n, (i, j) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
            mean = (expected[1 + n] + expected[5 + n] + expected[9 + n]) / 3
            torch.testing.assert_close(features[sample, :, i, j], mean, atol=1e-10, rtol=0)


def test_channel_vit_knows_channels_by_index():
    with pytest.raises(ConfigError, match="embed_dim is 14; give a multiple of num_heads, 3"):
        ChannelViT(embed_dim=14)
    for name in ("patch_size", "embed_dim", "num_heads", "grid_size"):
        with pytest.raises(ConfigError, match=f"{name} is 0; give at least 1"):
            ChannelViT(**{name: 0})
    encoder, image = channel_vit(), normal(1, 3, 6, 11).double()
    features = checked_patch_features(encoder, image, WAVELENGTHS[:3], 10.0)
    assert features.shape == (1, 12, 2, 3)
    with pytest.raises(ConfigError, match=r"built for 3 channels, .* have 2; call prepare"):
        encoder.forward_patch_features(image[:, :2], WAVELENGTHS[:2], 10.0)
    with pytest.raises(ConfigError, match="built for 0 channels"):
        ChannelViT(4, 12, 1, 3).forward_image_features(image.float(), WAVELENGTHS[:3], 10.0)
    order = [2, 0, 1]
    shuffled = encoder.forward_patch_features(image[:, order], WAVELENGTHS[:3], 10.0)
    assert (shuffled - features).abs().max() > 1e-2
    encoder.channel_embed.data = encoder.channel_embed.data[order]
    again = encoder.forward_patch_features(image[:, order], WAVELENGTHS[:3], 10.0)
    torch.testing.assert_close(again, features, atol=1e-10, rtol=0)
    encoder.prepare([500.0, 600.0])
    assert checked_patch_features(encoder, image[:, :2], WAVELENGTHS[:2], 10.0).shape == (1, 12, 2, 3)


@pytest.mark.parametrize("optical", [0, 5])
def test_less_reads_the_last_channels_as_radar(optical):
    encoder = LessEncoder(less(radar=True, depth=4)).eval()
    image, codes = normal(2, optical + 2, 20, 13), torch.tensor([5500.0, 5700.0])
    encoder.prepare_radar(2)
    wavelengths = torch.cat([WAVELENGTHS[:optical], codes]).expand(2, -1)
    features = encoder.forward_patch_features(image, wavelengths, 10.0)
    seen = (image[:, :optical], WAVELENGTHS) if optical else (None, None)
    expected = encoder.model.forward_features(*seen, 10.0, image[:, optical:], codes)[:, 1:, 1:].mean(1)
    torch.testing.assert_close(features.flatten(2).mT, expected)
    torch.testing.assert_close(checked_patch_maps(encoder, image, wavelengths, 10.0)[-1], features)
    encoder.radar = 0
    assert (encoder.forward_patch_features(image, wavelengths, 10.0) - features).abs().max() > 1e-3
    with pytest.raises(ConfigError, match=r"less_vit 48 x 2 \(random\) reads no radar; build it with model"):
        LessEncoder(less()).prepare_radar(2)


@pytest.mark.parametrize("depth", [4, 6])
def test_maps_of_less_are_tokens_after_each_quarter_of_the_blocks(depth):
    encoder = LessEncoder(less(depth=depth)).eval()
    image = normal(2, 5, 20, 13)
    maps = checked_patch_maps(encoder, image, WAVELENGTHS, 10.0)
    after = []
    hooks = [block.register_forward_hook(lambda *given: after.append(given[2])) for block in encoder.model.blocks]
    features = encoder.forward_patch_features(image, WAVELENGTHS, 10.0)
    for hook in hooks:
        hook.remove()
    for found, index in zip(maps, {4: (0, 1, 2, 3), 6: (0, 2, 3, 5)}[depth], strict=True):
        expected = encoder.model.norm(after[index])[:, 1:, 1:].mean(1)
        torch.testing.assert_close(found.flatten(2).mT, expected)
    torch.testing.assert_close(maps[-1], features)


def test_maps_of_channel_vit_and_timm_end_in_their_features():
    encoder, image = channel_vit(depth=8), normal(2, 3, 6, 11).double()
    maps = checked_patch_maps(encoder, image, WAVELENGTHS[:3], 10.0)
    torch.testing.assert_close(maps[-1], encoder.forward_patch_features(image, WAVELENGTHS[:3], 10.0))
    # with the blocks after the sixth out, the third map is the last
    encoder.blocks = encoder.blocks[:6]
    torch.testing.assert_close(maps[2], encoder.forward_patch_features(image, WAVELENGTHS[:3], 10.0))

    vit, image = timm_encoder("test_vit"), normal(2, 5, 32, 48)
    maps = checked_patch_maps(vit, image, WAVELENGTHS, 10.0)
    torch.testing.assert_close(maps[-1], vit.forward_patch_features(image, WAVELENGTHS, 10.0))
    assert (maps[0] - maps[1]).abs().max() > 1e-3
    with pytest.raises(ConfigError, match=r"has no four maps of one size .*head=linear"):
        checked_patch_maps(timm_encoder("test_resnet"), image, WAVELENGTHS, 10.0)


def test_who_has_no_four_maps_is_named():
    statistics = BandStatistics(4)
    with pytest.raises(ConfigError, match=r"BandStatistics has no forward_patch_maps, .*head=linear"):
        checked_patch_maps(statistics, normal(2, 1, 12, 12), WAVELENGTHS[:1], 10.0)
    with pytest.raises(ConfigError, match="has 2 blocks; UPerNet takes maps from four, use head=linear"):
        checked_patch_maps(LessEncoder(less()), normal(2, 1, 12, 12), WAVELENGTHS[:1], 10.0)
    statistics.forward_patch_maps = lambda image, wavelengths, gsd: [image] * 3
    with pytest.raises(ConfigError, match="returns 3 maps, not four"):
        checked_patch_maps(statistics, normal(2, 1, 12, 12), WAVELENGTHS[:1], 10.0)


def test_an_encoder_of_the_wrong_shape_is_named():
    encoder = BandStatistics(4)
    encoder.prepare([500.0])
    encoder.patch_size = 8
    encoder.forward_patch_features = lambda image, wavelengths, gsd: torch.zeros(2, 4, 3, 3)
    with pytest.raises(ConfigError, match=r"BandStatistics: .*\(2, 1, 12, 12\) are \(2, 4, 3, 3\), not \(2"):
        checked_patch_features(encoder, normal(2, 1, 12, 12), WAVELENGTHS[:1], 10.0)


@pytest.mark.parametrize("kind", [LessEncoder, ChannelViT, TimmEncoder, BandStatistics])
def test_encoders_follow_the_protocol(kind):
    assert len(METHODS) == 3
    for method in METHODS:
        assert inspect.signature(getattr(kind, method)) == inspect.signature(getattr(Encoder, method))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("less_vit_tiny", ("less_vit_tiny (random)", 192, 8)),
        ("less_vit_small", ("less_vit_small (random)", 384, 16)),
        ("less_vit_base", ("less_vit_base (random)", 768, 16)),
        ("channel_vit_tiny", ("channel_vit 192 x 12 (random)", 192, 8)),
        ("timm_vit_small", ("vit_small_patch16_224 (select, random)", 384, 16)),
        ("band_statistics", ("band_statistics", 20, 8)),
    ],
)
def test_configurations_build_encoders(repository, name, expected):
    with torch.device("meta"):
        encoder = instantiate(OmegaConf.load(repository / "configs" / "model" / f"{name}.yaml"))
    if name in ("channel_vit_tiny", "band_statistics"):
        encoder.prepare(WAVELENGTHS.tolist())
    assert (encoder.name, encoder.dim, encoder.patch_size) == expected
