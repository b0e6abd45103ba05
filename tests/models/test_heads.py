"""Heads for segmentation against slow references, and whole models on images of any size."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from vision_lowrank.adapters.peft_methods import inject_peft
from vision_lowrank.errors import ConfigError, DataError
from vision_lowrank.models import LessViT
from vision_lowrank.models.heads import AttentiveChannelPool, LessSegmentation, LinearSegmentationHead, UPerNetHead

WAVELENGTHS = [443.0, 665.0, 842.0]


def model_of(head, channel_pool=False, classes=3, patch_size=8, depth=4):
    torch.manual_seed(0)
    encoder = LessViT(5, patch_size=patch_size, embed_dim=48, depth=depth, num_heads=3, channel_dim_per_head=4)
    return LessSegmentation(encoder, head, classes, channel_pool, decoder_dim=16).double()


def normal(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def slow_pool(pool, tokens, present):
    """One sample, position and head after the other, with keys and values spelt out."""
    batch, channels, positions, dim = tokens.shape
    heads = len(pool.query)
    out = torch.zeros(batch, positions, dim, dtype=tokens.dtype)
    for b in range(batch):
        seen = [c for c in range(channels) if present is None or present[b, c]]
        for n in range(positions):
            parts = []
            for h in range(heads):
                scores = torch.stack([tokens[b, c, n] @ pool.query[h] for c in seen]).exp()
                values = [tokens[b, c, n] @ pool.value[h] for c in seen]
                parts.append(sum(s * v for s, v in zip(scores, values, strict=True)) / scores.sum())
            out[b, n] = pool.proj.weight @ torch.cat(parts) + pool.proj.bias
    return out


@pytest.mark.parametrize("present", [None, [[True, False, True, True], [False, True, False, False]]])
def test_channel_pool_is_attention_at_each_position(present):
    torch.manual_seed(0)
    pool = AttentiveChannelPool(12, 3).double()
    nn.init.normal_(pool.query)
    mask = None if present is None else torch.tensor(present)
    tokens = normal(2, 4, 5, 12).requires_grad_()
    expected, actual = slow_pool(pool, tokens, mask), pool(tokens, mask)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    probe = normal(2, 5, 12, seed=2)
    inputs = [tokens, *pool.parameters()]
    wanted = torch.autograd.grad((expected * probe).sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad((actual * probe).sum(), inputs), wanted, atol=1e-11, rtol=0)


def test_key_projections_of_a_channel_pool_would_only_turn_its_query():
    torch.manual_seed(0)
    pool, attention = AttentiveChannelPool(12, 3).double(), nn.MultiheadAttention(12, 3, batch_first=True).double()
    nn.init.normal_(attention.in_proj_bias[:24])
    tokens, query = normal(1, 6, 1, 12), normal(1, 1, 12, seed=2)
    q, k, v = attention.in_proj_weight.unflatten(0, (3, 3, 4))
    turned = (q @ query[0, 0] + attention.in_proj_bias[:12].unflatten(0, (3, 4))) / 2
    pool.query.data = torch.einsum("he,hed->hd", turned, k).detach()
    pool.value.data = v.transpose(1, 2).detach()
    pool.proj.load_state_dict(attention.out_proj.state_dict())
    torch.testing.assert_close(pool(tokens), attention(query, tokens[:, :, 0], tokens[:, :, 0])[0])


def test_linear_head_classifies_each_pixel_of_a_patch_by_itself():
    torch.manual_seed(0)
    head = LinearSegmentationHead(6, 3, 4).double()
    x = normal(2, 6, 2, 5)
    logits = head(x)
    weight = head.classifier.weight.detach().reshape(3, 4, 4, 6)
    bias = head.classifier.bias.detach().reshape(3, 4, 4)
    assert logits.shape == (2, 3, 8, 20)
    for row in range(8):
        for column in range(20):
            place = (slice(None), row % 4, column % 4)
            expected = x[:, :, row // 4, column // 4] @ weight[place].T + bias[place]
            torch.testing.assert_close(logits[:, :, row, column], expected)
    marked = x.clone()
    marked[0, :, 1, 3] += 1
    changed = (head(marked) != logits).nonzero()
    assert changed.amin(0).tolist() == [0, 0, 4, 12]
    assert changed.amax(0).tolist() == [0, 2, 7, 15]


def test_pyramid_has_four_scales_of_four_maps():
    torch.manual_seed(0)
    head = UPerNetHead([8, 12, 5, 6], 2, 8, decoder_dim=16).double()
    seen = []
    head.decoder.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0][2:]))
    maps = [normal(2, dim, 5, 6, seed=dim) for dim in (8, 12, 5, 6)]
    assert head(maps).shape == (2, 2, 40, 48)
    assert [tuple(level.shape[1:]) for level in seen] == [(2, 20, 24), (6, 10, 12), (5, 5, 6), (6, 3, 3)]
    weight, bias = head.two.weight.detach(), head.two.bias.detach()
    for i in range(10):
        for j in range(12):
            expected = maps[1][:, :, i // 2, j // 2] @ weight[:, :, i % 2, j % 2] + bias
            torch.testing.assert_close(seen[1][:, :, i, j], expected)
    assert torch.equal(seen[2], maps[2])
    # an odd side is halved in windows that overlap, each centred on what it stands for
    for i, rows in enumerate((slice(0, 2), slice(1, 4), slice(3, 5))):
        for j in range(3):
            assert torch.equal(seen[3][:, :, i, j], maps[3][:, :, rows, 2 * j : 2 * j + 2].amax((2, 3)))


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_upernet_of_every_size_sees_what_is_near(size):
    torch.manual_seed(0)
    encoder = timm.create_model(f"less_vit_{size}", depth=4, radar=False)
    model = LessSegmentation(encoder, "upernet", 3, decoder_dim=32).train()
    with torch.no_grad():
        assert model(torch.randn(1, 2, 40, 56), [560.0, 842.0], 10.0).shape == (1, 3, 40, 56)
    maps = [torch.randn(1, encoder.num_features, 6, 8, requires_grad=True) for _ in range(4)]
    logits = model.head(maps)
    for row, column in ((0, 0), (2, 5), (5, 7), (4, 0)):
        pixel = logits[0, :, 16 * row + 8, 16 * column + 8].square().sum()
        for level, gradient in enumerate(torch.autograd.grad(pixel, maps, retain_graph=True)):
            strength = gradient.square().sum(1)[0]
            assert strength[row, column] > 0
            near = strength[max(0, row - 2) : row + 3, max(0, column - 2) : column + 3]
            # the coarsest level goes through pools over all of it, too
            bound = 0.9 if level < 3 else 1.2 * near.numel() / strength.numel()
            assert near.sum() / strength.sum() > bound, (level, row, column)


@pytest.mark.parametrize("sides", [(1, 1), (3, 4)])
def test_upernet_trains_on_one_image_as_on_many(sides):
    torch.manual_seed(0)
    head = UPerNetHead([12] * 4, 3, 8, decoder_dim=16).double().train()
    maps = [normal(2, 12, *sides, seed=seed) for seed in range(4)]
    both = head(maps)
    alone = head([x[:1] for x in maps])
    assert torch.isfinite(both).all()
    torch.testing.assert_close(alone[0], both[0])
    assert (both[0] - both[1]).abs().max() > 1e-3
    both.square().sum().backward()
    assert not any(isinstance(part, nn.BatchNorm2d) for part in head.modules())
    without = [name for name, parameter in head.named_parameters() if not parameter.grad.any()]
    assert not without


@pytest.mark.parametrize("head", ["linear", "upernet"])
@pytest.mark.parametrize("channel_pool", [False, True])
def test_logits_come_from_the_maps_of_the_encoder(head, channel_pool):
    model = model_of(head, channel_pool).eval()
    image = normal(2, 3, 16, 24)
    logits = model(image, WAVELENGTHS, 10.0)
    assert isinstance(model.encoder.head, nn.Identity)
    indices = [3] if head == "linear" else [0, 1, 2, 3]
    final, found = model.encoder.forward_intermediates(
        image, WAVELENGTHS, 10.0, indices=indices, norm=True, output_fmt="BCND"
    )
    assert torch.equal(found[-1], final)
    maps = []
    for level, tokens in enumerate(found):
        rows = model.channel_pools[level](tokens[:, 1:, 1:]) if channel_pool else tokens[:, 0, 1:]
        x = torch.zeros(2, 48, 2, 3, dtype=torch.float64)
        for i in range(2):
            for j in range(3):
                x[:, :, i, j] = rows[:, 3 * i + j]
        maps.append(x)
    torch.testing.assert_close(logits, model.head(maps[0] if head == "linear" else maps))
    assert logits.shape == (2, 3, 16, 24)


@pytest.mark.parametrize(("depth", "indices"), [(4, [0, 1, 2, 3]), (6, [0, 2, 3, 5]), (12, [2, 5, 8, 11])])
def test_upernet_takes_maps_at_each_quarter_of_the_depth(depth, indices):
    assert model_of("upernet", depth=depth).indices == indices


@pytest.mark.parametrize("head", ["linear", "upernet"])
@pytest.mark.parametrize("channel_pool", [False, True])
def test_channels_that_pad_a_batch_change_nothing(head, channel_pool):
    model = model_of(head, channel_pool).train()
    image = normal(2, 3, 16, 24)
    present = torch.tensor([[True, True, True], [True, True, False]])
    logits = model(image, WAVELENGTHS, 10.0, present=present)
    torch.testing.assert_close(logits[:1], model(image[:1], WAVELENGTHS, 10.0))
    torch.testing.assert_close(logits[1:], model(image[1:, :2], WAVELENGTHS[:2], 10.0))
    image[1, 2] = 99
    assert torch.equal(model(image, WAVELENGTHS, 10.0, present=present), logits)


@pytest.mark.parametrize("head", ["linear", "upernet"])
@pytest.mark.parametrize("channel_pool", [False, True])
def test_an_image_of_any_size_is_one_continued_to_whole_patches(head, channel_pool):
    model = model_of(head, channel_pool, patch_size=16).eval()
    image = normal(2, 3, 40, 56)
    logits = model(image, WAVELENGTHS, 10.0)
    assert logits.shape == (2, 3, 40, 56)
    continued = torch.from_numpy(np.pad(image.numpy(), ((0, 0), (0, 0), (0, 8), (0, 8)), mode="edge"))
    torch.testing.assert_close(logits, model(continued, WAVELENGTHS, 10.0)[:, :, :40, :56])
    assert model(image[:, :, :1, :5], WAVELENGTHS, 10.0).shape == (2, 3, 1, 5)


@pytest.mark.parametrize("channel_pool", [False, True])
def test_radar_beside_an_image_and_alone(channel_pool):
    model = model_of("linear", channel_pool).eval()
    image, radar = normal(1, 3, 10, 20), normal(1, 2, 10, 20, seed=2)
    arguments = {"radar": radar, "radar_wavelengths": [5500.0, 5700.0]}
    both, alone = model(image, WAVELENGTHS, 10.0, **arguments), model(None, None, 10.0, **arguments)
    assert both.shape == alone.shape == (1, 3, 10, 20)
    assert (both - model(image, WAVELENGTHS, 10.0)).abs().max() > 1e-4
    assert (both - alone).abs().max() > 1e-4


@pytest.mark.parametrize("head", ["linear", "upernet"])
@pytest.mark.parametrize("channel_pool", [False, True])
def test_overfits_two_regions(head, channel_pool):
    model = model_of(head, channel_pool, classes=2).float().train()
    # the border lies within patches
    label = torch.zeros(1, 24, 32, dtype=torch.int64)
    label[:, :, 13:] = 1
    image = torch.randn(1, 3, 24, 32, generator=torch.Generator().manual_seed(1)) * 0.3 + label[:, None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(60):
        logits = model(image, WAVELENGTHS, 10.0)
        loss = nn.functional.cross_entropy(logits, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.4
    assert losses[-1] < 0.1
    assert (logits.argmax(1) == label).float().mean() > 0.97


@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_new_classifier_keeps_the_rest_and_is_saved(head, tmp_path):
    model = model_of(head).eval()
    image = normal(1, 3, 8, 16)
    before = {name: value.clone() for name, value in model.state_dict().items() if "classifier" not in name}
    old = model.get_classifier()
    model.reset_classifier(7)
    model.double()
    assert model.get_classifier() is model.head.classifier is not old
    assert model.num_classes == 7
    logits = model(image, WAVELENGTHS, 10.0)
    assert logits.shape == (1, 7, 8, 16)
    model.save_pretrained(tmp_path)
    assert torch.equal(
        type(model).from_pretrained(tmp_path, strict=True).double().eval()(image, WAVELENGTHS, 10.0), logits
    )
    after = model.state_dict()
    assert before.keys() == {name for name in after if "classifier" not in name}
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_adapters_of_peft_beside_a_trained_head_and_pools(head):
    model = model_of(head, channel_pool=True).eval()
    image = normal(1, 3, 8, 16)
    before = model(image, WAVELENGTHS, 10.0)
    adapted = inject_peft(model, "dora", ["attn.proj", "kv"], rank=2, train=["head", "channel_pools"])
    torch.testing.assert_close(adapted(image, WAVELENGTHS, 10.0), before)
    adapted(image, WAVELENGTHS, 10.0).square().sum().backward()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    # with B at zero, A gets no gradient but zeros
    assert all(p.grad is not None and (p.grad.any() or "lora_A" in name) for name, p in trained.items())
    assert {name.split(".")[2] for name in trained} == {"encoder", "head", "channel_pools"}


@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_bfloat16_is_near_float32(head):
    model = model_of(head, channel_pool=True).float().train()
    image = normal(2, 3, 16, 24).float()
    exact = model(image, WAVELENGTHS, 10.0)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(image, WAVELENGTHS, 10.0)
    assert (rounded.float() - exact).norm() < 0.03 * exact.norm()
    rounded.float().square().mean().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_no_decay_for_queries_and_class_tokens():
    model = model_of("upernet", channel_pool=True)
    queries = {f"channel_pools.{index}.query" for index in range(4)}
    tokens = {f"encoder.{name}" for name in ("cls_token", "channel_cls_token", "spatial_cls_token")}
    assert model.no_weight_decay() == queries | tokens <= {name for name, _ in model.named_parameters()}


def test_refusals():
    with pytest.raises(ConfigError, match="12 is no multiple of its 5 heads"):
        AttentiveChannelPool(12, 5)
    with pytest.raises(ConfigError, match="given 3 widths"):
        UPerNetHead([8, 8, 8], 2, 8)
    for width in (20, 0, -8):
        with pytest.raises(ConfigError, match=f"decoder_dim is {width}; give a multiple of 8"):
            UPerNetHead([8] * 4, 2, 8, decoder_dim=width)
    with pytest.raises(ConfigError, match="at least 1"):
        LinearSegmentationHead(8, 0, 8)
    with pytest.raises(ConfigError, match="can be linear or upernet"):
        model_of("fpn")
    with pytest.raises(ConfigError, match="has 3 blocks"):
        model_of("upernet", depth=3)
    model = model_of("linear")
    with pytest.raises(ConfigError, match="neither image nor radar"):
        model(None, None, 10.0)
    with pytest.raises(DataError, match="no wavelengths"):
        model(normal(1, 3, 8, 8), None, 10.0)
