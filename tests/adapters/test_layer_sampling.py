"""Outlier scores against loops, draws against exact probabilities."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from vision_lowrank.adapters.layer_sampling import LayerSampler, outlier_scores
from vision_lowrank.errors import AdapterError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(3, 5)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 5)) for _ in range(3)
        )
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


def test_scores_are_shares_of_weights_that_stand_out(net):
    batches = [torch.randn(2, 4, 3), torch.randn(3, 4, 3)]
    multiple = 1.9
    scores = outlier_scores(net, "blocks.*", batches, multiple)
    assert list(scores) == ["blocks.0", "blocks.1", "blocks.2"]
    with torch.no_grad():
        x = net.stem(torch.cat(batches)).flatten(0, 1)
        for path, block in zip(scores, net.blocks, strict=True):
            hidden = [block[0](x), block[:3](x)]
            entries = []
            for layer, seen in zip((block[1], block[3]), hidden, strict=True):
                for row in layer.weight.tolist():
                    for weight, feature in zip(row, seen.T, strict=True):
                        entries.append(abs(weight) * float(np.sqrt(np.mean(feature.numpy() ** 2))))
            expected = np.mean(np.array(entries) > multiple * np.mean(entries))
            assert 0 < expected < 1
            assert scores[path] == pytest.approx(expected)
            x = x + block(x)
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_blocks_are_drawn_as_often_as_their_scores_say(net):
    scores = {"blocks.0": 0.5, "blocks.1": 0.3, "blocks.2": 0.2, "stem": 0.0}
    sampler = LayerSampler(net, scores, count=2, period=1, seed=3)
    draws = [tuple(sampler(step)) for step in range(4000)]
    shares = list(scores.values())[:3]
    for first, second in itertools.combinations(range(3), 2):
        # either may come first, and the other is drawn among what is left
        exact = sum(shares[a] * shares[b] / (1 - shares[a]) for a, b in ((first, second), (second, first)))
        found = np.mean([draw == (f"blocks.{first}", f"blocks.{second}") for draw in draws])
        assert found == pytest.approx(exact, abs=0.03)


def test_only_drawn_blocks_and_the_rest_are_trained(net):
    net.blocks[1][1].bias.requires_grad_(False)
    sampler = LayerSampler(net, {f"blocks.{n}": 1.0 for n in range(3)}, count=1, period=2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    seen = []
    for _ in range(12):
        before = {name: value.detach().clone() for name, value in net.named_parameters()}
        seen.append(sampler.step())
        optimizer.zero_grad(set_to_none=False)
        net(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
        moved = {name for name, value in net.named_parameters() if not torch.equal(value, before[name])}
        places = {
            f"{seen[-1][0]}.{part}" for part in ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias")
        }
        allowed = places | {"stem.weight", "stem.bias", "head.weight", "head.bias"}
        assert moved <= allowed - {"blocks.1.1.bias"}
        assert {f"{seen[-1][0]}.3.bias", "stem.bias", "head.bias"} <= moved
    assert seen[0::2] == seen[1::2]
    assert len({tuple(blocks) for blocks in seen}) == 3


def test_a_resumed_run_draws_the_same_blocks(net):
    scores = {"blocks.0": 0.1, "blocks.1": 0.2, "blocks.2": 0.3}
    sampler = LayerSampler(net, scores, 2, period=3, seed=7)
    through = [sampler.step() for _ in range(20)]
    first = LayerSampler(Net(), scores, 2, period=3, seed=7)
    for _ in range(8):
        first.step()
    second = LayerSampler(Net(), scores, 2, period=3, seed=7)
    second.load_state_dict(first.state_dict())
    assert [second.step() for _ in range(12)] == through[8:]
    assert [LayerSampler(Net(), scores, 2, 3, seed=8)(step) for step in range(20)] != through
    with pytest.raises(AdapterError, match=r"period=3 \(here 4\)"):
        LayerSampler(Net(), scores, 2, period=4, seed=7).load_state_dict(first.state_dict())


def test_errors(net):
    with pytest.raises(AdapterError, match="2 have a score above 0"):
        LayerSampler(net, {"blocks.0": 1.0, "blocks.1": 0.5, "stem": 0.0}, count=3, period=1)
    with pytest.raises(AdapterError, match="finite numbers"):
        LayerSampler(net, {"blocks.0": float("nan"), "blocks.1": 1.0}, count=1, period=1)
    with pytest.raises(AdapterError, match="finite numbers"):
        LayerSampler(net, {"blocks.0": -1.0, "blocks.1": 1.0}, count=1, period=1)
    with pytest.raises(AdapterError, match="period=0"):
        LayerSampler(net, {"blocks.0": 1.0}, count=1, period=0)
    net.stem.requires_grad_(False)
    with pytest.raises(AdapterError, match="'stem' has no parameter"):
        LayerSampler(net, {"blocks.0": 1.0, "stem": 1.0}, count=1, period=1)
    with pytest.raises(AdapterError, match=r"'blocks.0.0' called no linear layer"):
        outlier_scores(net, "blocks.0.0", [torch.ones(1, 3)])
    with pytest.raises(AdapterError, match="called no linear layer"):
        outlier_scores(net, "blocks.*", [])
    with pytest.raises(AdapterError, match="eval"):
        outlier_scores(net.train(), "blocks.*", [torch.ones(1, 3)])
