"""The original LoLA-SpecViT against outputs that its authors' code gave."""

import json

import pytest
import torch
from safetensors.torch import load_file

from vision_lowrank.adapters import count_parameters
from vision_lowrank.errors import CheckpointError, ConfigError
from vision_lowrank.models import official

TINY = {
    "in_channels": 6,
    "num_classes": 3,
    "dim": 16,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": [3, 2],
    "spatial_size": 9,
    "mlp_ratio": 2.0,
    "r": 2,
    "lora_alpha": 4,
}


@pytest.fixture(params=["lola_a", "lola_c"])
def fixture(request, shared_path):
    """State dict, the other tensors, and the legend of a recorded run."""
    tensors = load_file(shared_path("golden", f"{request.param}.safetensors"))
    legend = json.loads(shared_path("golden", f"{request.param}.json").read_text())
    others = {name: tensors.pop(name) for name in list(tensors) if name.startswith(("input", "output", "mid."))}
    return tensors, others, legend


def test_output_and_intermediates(fixture):
    state, others, legend = fixture
    model = official.lola_specvit(state, legend["config"])
    assert not model.training
    with torch.inference_mode():
        torch.testing.assert_close(model(others["input"]), others["output"], atol=1e-5, rtol=0)
        mid = model.forward_intermediates(others["input"])
    assert set(mid) == {name for name in others if name.startswith("mid.")}
    for name, value in mid.items():
        scale = max(1.0, others[name].abs().max().item())
        assert (value - others[name]).abs().max() <= 1e-5 * scale, name


def test_parameters_are_those_of_the_original(fixture):
    state, _, legend = fixture
    model = official.lola_specvit(state, legend["config"])
    count = count_parameters(model)
    assert count.total == legend["params_total"]
    assert count.trainable == count.adapter == legend["params_trainable_after_freeze_all_but_lora"]
    fresh = official.build_lola_specvit(legend["config"])
    names = model.original_names()
    for name, buffer in fresh.named_buffers():
        if name.endswith("relative_position_index"):
            assert torch.equal(buffer, state[names[name]])
    trainable = {names[name] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == set(legend["trainable_names_after_freeze_all_but_lora"])


def kind(name):
    """The name without the numbers of level and block."""
    parts = name.split(".")
    return ".".join(parts[3:] if parts[0] == "levels" and parts[3:] else parts)


def test_every_kind_of_weight_matters(fixture):
    state, others, legend = fixture
    generator = torch.Generator().manual_seed(0)
    idle = ("num_batches_tracked", "relative_position_index")
    kinds = {kind(name): name for name in reversed(state) if not name.endswith(idle)}
    assert len(kinds) > 50
    model = official.lola_specvit(state, legend["config"])
    ours = {original: name for name, original in model.original_names().items()}
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.inference_mode():
        for name in kinds.values():
            tensor = tensors[ours[name]]
            before = tensor.clone()
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.add_(noise.abs() if name.endswith("running_var") else noise)
            change = (model(others["input"]) - others["output"]).abs().max()
            tensor.copy_(before)
            assert change > 1e-5, f"{name} changes the output by {change:g} only"
        torch.testing.assert_close(model(others["input"]), others["output"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("num_classes", "total", "trainable"),
    [(9, 254_639_541, 73_586_832), (16, 254_642_348, 73_586_944), (22, 254_644_754, 73_587_040)],
)
def test_full_size_counts(num_classes, total, trainable):
    with torch.device("meta"):
        model = official.build_lola_specvit({"num_classes": num_classes})
    count = count_parameters(model)
    assert (count.total, count.trainable) == (total, trainable)


def test_full_size_counts_by_kind():
    with torch.device("meta"):
        model = official.build_lola_specvit({"num_classes": 9})
    names = model.original_names()

    def size(*parts):
        return sum(p.numel() for name, p in model.named_parameters() if any(part in names[name] for part in parts))

    assert size("lora_down") == 941_568
    assert size("lora_up") == 1_202_832
    assert size("lora_gate") == size("lora_residual") == 35_721_216
    assert size(".linear.") == 35_799_849
    assert size(".mlp.1.w") == 142_985_088
    assert size("spectral_conv") == 260_640
    assert size("spectral_attention") == 1_152
    assert size("patch_embed") == 147_744
    assert size("relative_position_bias_table") == 58_812
    assert size("pos_embed") == 4_704
    blocks = [sum(p.numel() for p in level[0].parameters()) for level in model.levels]
    assert blocks == [801_796, 3_151_880, 12_496_912]
    assert [sum(p.numel() for p in level[-1].parameters()) for level in model.levels[:2]] == [352_608, 1_407_936]


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    model = official.build_lola_specvit(TINY)
    names = model.original_names()
    return {names[name]: tensor.clone() for name, tensor in model.state_dict().items() if name in names}


def test_random_start_is_that_of_the_original(tiny):
    assert tiny["levels.0.0.mlp.0.linear.bias"].abs().max() == 0
    assert tiny["levels.0.0.mlp.1.w1.bias"].abs().max() == 0
    for name in ("lora_up", "lora_down", "lora_gate", "lora_residual", "linear"):
        assert tiny[f"levels.1.0.mlp.0.{name}.weight"].std() == pytest.approx(0.02, rel=0.25)
    assert tiny["spectral_conv.0.bias"].abs().max() > 0


def test_trains_with_its_own_randomness_and_rebuilds_from_its_state(tiny):
    torch.manual_seed(0)
    model = official.build_lola_specvit(TINY)
    x = torch.randn(3, 6, 9, 9)
    assert not torch.equal(model(x), model(x))
    model(x).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    torch.manual_seed(0)
    fresh = official.build_lola_specvit(TINY).eval()
    assert torch.equal(official.lola_specvit(tiny, TINY)(x), fresh(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("norm.weight"), "lacks norm.weight: it is incomplete"),
        (lambda s: s.update(extra=torch.ones(1)), "holds unknown extra: take"),
        (
            lambda s: s.update({"head.linear.bias": torch.ones(4)}),
            r"head.linear.bias has shape \(4,\).*asks for \(3,\)",
        ),
        (lambda s: s.clear(), r"lacks pos_embed, .* and \d+ more"),
    ],
)
def test_wrong_state(tiny, change, message):
    change(tiny)
    with pytest.raises(CheckpointError, match=message):
        official.lola_specvit(tiny, TINY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 3}, "unknown setting rank"),
        ({"depths": [1, 1, 1]}, "differ in length"),
    ],
)
def test_wrong_configuration(tiny, change, message):
    with pytest.raises(ConfigError, match=message):
        official.lola_specvit(tiny, TINY | change)
    with pytest.raises(ConfigError, match="num_classes"):
        official.build_lola_specvit({})


def test_wrong_patch(tiny):
    with pytest.raises(ConfigError, match=r"\(1, 6, 8, 8\)"):
        official.lola_specvit(tiny, TINY)(torch.zeros(1, 6, 8, 8))
