"""Low-rank attention against a plain implementation that spells the definition out."""

import copy
import itertools

import pytest
import torch
from torch import nn

from vision_lowrank.adapters import GatedLoRA, LoRA, inject
from vision_lowrank.adapters.peft_methods import inject_peft
from vision_lowrank.errors import ConfigError
from vision_lowrank.models.layers import kronecker_attention
from vision_lowrank.models.layers.embeddings import rotate
from vision_lowrank.models.layers.joint_attention import JointAttention
from vision_lowrank.models.layers.kronecker_attention import (
    Context,
    LessAttention,
    LowRankAttention,
    contraction_order,
    kronecker_projection,
)

CHANNELS, POSITIONS, WIDTH, HEADS, A = 5, 7, 48, 3, 4
S = WIDTH // HEADS // A


def plain_pool(pool, x, mask=None):
    """Single-query attention with its own keys and values, (B, M, L, E) -> (B, M, E)."""
    heads = pool.num_heads
    query = pool.q(x[:, :, :1]).unflatten(-1, (heads, -1))
    key, value = pool.kv(x).chunk(2, dim=-1)
    key, value = key.unflatten(-1, (heads, -1)), value.unflatten(-1, (heads, -1))
    scores = torch.einsum("bmqhe,bmlhe->bmhl", query, key) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return pool.proj(torch.einsum("bmhl,bmlhe->bmhe", scores.softmax(-1), value).flatten(2))


def plain_branch(branch, x, mask, rotation):
    """One attention a rank and head, in loops: (B, r, h, L, e)."""
    heads, rank = branch.num_heads, branch.rank
    q, k = branch.qk(x).chunk(2, dim=-1)
    q, k = (part.unflatten(-1, (heads, rank, -1)) for part in (q, k))
    v = branch.v(x).unflatten(-1, (heads, -1, q.shape[-1]))
    out = []
    for r, h in itertools.product(range(rank), range(heads)):
        query, key = q[:, :, h, r], k[:, :, h, r]
        if rotation is not None:
            query, key = (rotate(part[:, None], rotation)[:, 0] for part in (query, key))
        scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        out.append(scores.softmax(-1) @ v[:, :, h, 0 if branch.shared_values else r])
    return torch.stack(out, 1).unflatten(1, (rank, heads))


def plain(attention, x, context):
    """The whole attention of a LESS block with the Kronecker products materialised rank by rank."""
    pool, inner = attention.low_dim_pool, attention.attn
    present = None if context.present is None else context.present[:, None, None]
    channel, spatial = pool.channel_linear(x), pool.spatial_linear(x)
    x_c = channel[:, :, 0] + plain_pool(pool.channel_pool, pool.channel_norm(channel))
    x_s = spatial[:, 0] + plain_pool(pool.spatial_pool, pool.spatial_norm(spatial).transpose(1, 2), present)
    mask = None if context.present is None else context.present[:, None]
    xc = plain_branch(inner.channel_branch, attention.channel_norm(x_c), mask, context.spectral)
    field = None if context.field is None else context.field[:, 0]
    xs = plain_branch(inner.spatial_branch, attention.spatial_norm(x_s), field, context.spatial)
    product = torch.einsum("brhca,brhns->brcnhas", xc, xs).flatten(4)
    combined = product.sum(1) if inner.channel_branch.shared_values else product.mean(1)
    return inner.proj(combined)


def make_context(kind, batch):
    if kind == "none":
        return Context()
    field = torch.rand(batch, 1, POSITIONS, POSITIONS) > 0.4
    field |= torch.eye(POSITIONS, dtype=torch.bool)
    present = torch.rand(batch, CHANNELS) > 0.4
    present[:, 0] = True
    spectral, spatial = torch.randn(batch, 1, CHANNELS, A).double(), torch.randn(batch, 1, POSITIONS, S).double()
    return Context(field, present, (spectral.sin(), spectral.cos()), (spatial.sin(), spatial.cos()))


@pytest.mark.parametrize("rank", range(1, 9))
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", ["none", "masks and rotations"])
def test_attention_and_gradients_are_those_of_the_definition(rank, shared, kind):
    torch.manual_seed(rank)
    attention = LessAttention(WIDTH, HEADS, A, rank, shared).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.3)
    context = make_context(kind, 2)
    x = torch.randn(2, CHANNELS, POSITIONS, WIDTH, dtype=torch.float64, requires_grad=True)
    outputs = [attention(x, context), plain(attention, x, context)]
    torch.testing.assert_close(*outputs, atol=1e-10, rtol=1e-10)
    direction = torch.randn_like(outputs[0])
    parameters = [x, *attention.parameters()]
    # the bias of the pools' keys has no influence, which rounding blurs in the definition
    gradients = [torch.autograd.grad((y * direction).sum(), parameters) for y in outputs]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 5, 8])
@pytest.mark.parametrize(("channels", "positions"), [(1, 1), (6, 4), (2, 17)])
@pytest.mark.parametrize("numbers", [1 << 21, 600])
def test_all_orders_of_contraction_agree(bias, rank, channels, positions, numbers, monkeypatch):
    # a folded weight of all positions at once, and of a few at a time
    monkeypatch.setattr(kronecker_attention, "FOLDED_NUMBERS", numbers)
    torch.manual_seed(0)
    x = torch.randn(2, rank, 3, channels, 2, dtype=torch.float64)
    y = torch.randn(2, rank, 3, positions, 4, dtype=torch.float64)
    weight, shift = torch.randn(24, 24, dtype=torch.float64), torch.randn(24, dtype=torch.float64) if bias else None
    expected = torch.einsum("ohas,brhca,brhns->bcno", weight.view(24, 3, 2, 4), x, y) + (0 if shift is None else shift)
    for order in ("product", "fold_channel", "fold_spatial"):
        found = kronecker_projection(x, y, weight, shift, order)
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


def test_the_order_follows_the_sizes():
    # few channels: fold them; many: fold positions; many ranks and few tokens: nothing is worth folding
    single = torch.float32
    assert contraction_order(3, 197, 384, 1, 4, 16, single) == "fold_channel"
    assert contraction_order(65, 197, 384, 1, 4, 16, single) == "fold_spatial"
    assert contraction_order(3, 197, 768, 8, 4, 16, single) == "product"
    # in half precision products are cheap and memory is not
    assert contraction_order(12, 17, 384, 1, 4, 16, single) == "fold_spatial"
    assert contraction_order(12, 17, 384, 1, 4, 16, torch.bfloat16) == "product"


@pytest.mark.parametrize("method", [LoRA(2, 4), LoRA(2, 4, dropout=0.5), GatedLoRA(2, 4, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_adapters_on_folded_layers_take_part(method, training):
    torch.manual_seed(0)
    attention = LessAttention(WIDTH, HEADS, A, 2).double()
    targets = ["channel_linear", "spatial_linear", "q", "kv", "qk", "v", "proj"]
    inject(attention, targets, method, train=[])
    attention.train(training)
    for name, parameter in attention.named_parameters():
        if "adapters" in name:
            nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, CHANNELS, POSITIONS, WIDTH, dtype=torch.float64)
    torch.manual_seed(1)
    found = attention(x, Context())
    torch.manual_seed(1)
    expected = plain(attention, x, Context())
    if training and getattr(method, "dropout", 0):
        # the masks are drawn in another order; that adapters act at all is what can be said
        assert not torch.allclose(found, attention.eval()(x, Context()))
    else:
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", ["lora", "dora", "pissa", "olora", "vera", "lokr"])
def test_layers_that_peft_wraps_take_part(name):
    torch.manual_seed(0)
    attention = LessAttention(WIDTH, HEADS, A, 2)
    before = copy.deepcopy(attention).double()
    x = torch.randn(2, CHANNELS, POSITIONS, WIDTH, dtype=torch.float64)
    model = nn.ModuleDict({"attn": attention})
    adapted = inject_peft(model, name, ["channel_linear", "spatial_linear", "kv", "proj"], rank=2).double()
    torch.testing.assert_close(attention(x, Context()), before(x, Context()), atol=1e-6, rtol=1e-6)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    found = attention(x, Context())
    torch.testing.assert_close(found, plain(attention, x, Context()), atol=1e-10, rtol=1e-10)
    assert (found - before(x, Context())).abs().max() > 1e-2
    merged = adapted.merge_and_unload()["attn"]
    torch.testing.assert_close(merged(x, Context()), found, atol=1e-6, rtol=1e-6)


def test_hooks_see_the_inputs_of_folded_layers():
    attention = LessAttention(WIDTH, HEADS, A, 2).double()
    x = torch.randn(2, CHANNELS, POSITIONS, WIDTH, dtype=torch.float64)
    expected = attention(x, Context())
    seen = []
    layers = [layer for name, layer in attention.named_modules() if name.endswith(("_linear", "kv", "attn.proj"))]
    for layer in layers:
        layer.register_forward_hook(lambda layer, _inputs, _output: seen.append(layer))
    torch.testing.assert_close(attention(x, Context()), expected, atol=1e-10, rtol=1e-10)
    assert set(seen) == set(layers)


def test_dropped_weights_drop_the_values_with_their_bias():
    torch.manual_seed(0)
    pool = LessAttention(WIDTH, HEADS, A, dropout=0.5).low_dim_pool.channel_pool.double().train()
    nn.init.normal_(pool.kv.bias)
    x = torch.randn(2, 3, POSITIONS, HEADS * A, dtype=torch.float64)
    torch.manual_seed(2)
    found = pool(x)
    query = pool.q(x[:, :, 0]).unflatten(-1, (HEADS, -1))
    key, value = (part.unflatten(-1, (HEADS, -1)) for part in pool.kv(x).chunk(2, dim=-1))
    torch.manual_seed(2)
    weights = nn.functional.dropout((torch.einsum("bmhe,bmlhe->bmhl", query, key) / A**0.5).softmax(-1), 0.5)
    expected = pool.proj(torch.einsum("bmhl,bmlhe->bmhe", weights, value).flatten(2))
    torch.testing.assert_close(found, expected)


def test_joint_attention_sees_pairs_through_masks_and_rotations():
    torch.manual_seed(0)
    attention = JointAttention(WIDTH, HEADS).double()
    half = WIDTH // HEADS // 2
    masks = make_context("masks", 2)
    spectral, spatial = torch.randn(2, 1, CHANNELS, half).double(), torch.randn(2, 1, POSITIONS, half).double()
    context = Context(
        masks.field, masks.present, (spectral.sin(), spectral.cos()), (spatial.sin(), spatial.cos())
    )  # fmt: skip
    x = torch.randn(2, CHANNELS, POSITIONS, WIDTH, dtype=torch.float64)
    q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in attention.qkv(x).chunk(3, dim=-1))
    expected = torch.zeros_like(v)

    def turn(part, b, c, n):
        first, second = part.chunk(2)
        turned = [
            rotate(piece[None, None, None], (angle[0][b, 0, i][None, None, None], angle[1][b, 0, i][None, None, None]))
            for piece, angle, i in ((first, context.spectral, c), (second, context.spatial, n))
        ]
        return torch.cat([piece.flatten() for piece in turned])

    pairs = list(itertools.product(range(CHANNELS), range(POSITIONS)))
    for b, h in itertools.product(range(2), range(HEADS)):
        keys = torch.stack([turn(k[b, c, n, h], b, c, n) for c, n in pairs])
        for c, n in pairs:
            scores = keys @ turn(q[b, c, n, h], b, c, n) / (2 * half) ** 0.5
            seen = torch.tensor([context.present[b, d] and context.field[b, 0, n, m] for d, m in pairs])
            weights = scores.masked_fill(~seen, -torch.inf).softmax(0)
            expected[b, c, n, h] = weights @ v[b, :, :, h].flatten(0, 1)
    torch.testing.assert_close(attention(x, context), attention.proj(expected.flatten(3)))


def test_additive_attention_is_a_sum_over_the_axes():
    torch.manual_seed(0)
    attention = LessAttention(WIDTH, HEADS, A, additive=True).double()
    x = torch.randn(2, CHANNELS, POSITIONS, WIDTH, dtype=torch.float64)
    x_c, x_s = attention.low_dim_pool(x, Context())
    x_c, x_s = attention.channel_norm(x_c), attention.spatial_norm(x_s)
    inner = attention.attn
    channel = plain_branch(inner.channel_branch, x_c, None, None)[:, 0].transpose(1, 2).flatten(2)
    spatial = plain_branch(inner.spatial_branch, x_s, None, None)[:, 0].transpose(1, 2).flatten(2)
    expected = inner.channel_proj(channel)[:, :, None] + inner.spatial_proj(spatial)[:, None]
    torch.testing.assert_close(attention(x, Context()), expected)


def test_widths_must_make_up_the_whole():
    with pytest.raises(ConfigError, match="do not make up 48"):
        LowRankAttention(48, 12, 10, 3)
    with pytest.raises(ConfigError, match="channel_dim_per_head"):
        LessAttention(48, 3, 5)
