"""docs/adapters.md: its examples run, and the functions, files and options that it names are there."""

import copy
import importlib
import pkgutil
import re
from pathlib import Path

import peft
import pytest
import timm
import torch
import yaml

from vision_lowrank import adapters
from vision_lowrank.adapters.peft_methods import PEFT_METHODS

REPOSITORY = Path(__file__).resolve().parents[1]
GUIDE = (REPOSITORY / "docs" / "adapters.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
PROSE = re.sub(r"```.*?```", "", GUIDE, flags=re.DOTALL)


@pytest.fixture
def vit(monkeypatch, tmp_path):
    """Lets the examples build a small random ViT of the same layers, and write into a temporary folder."""
    monkeypatch.chdir(tmp_path)

    def create(name, pretrained, num_classes):
        assert (name, pretrained) == ("vit_small_patch16_224", True)
        torch.manual_seed(0)
        sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3}
        return timm.models.vision_transformer.VisionTransformer(num_classes=num_classes, **sizes)

    monkeypatch.setattr(timm, "create_model", create)
    return create


def test_the_examples_run_and_their_files_hold_what_was_trained(vit, tmp_path):
    base = vit("vit_small_patch16_224", True, 10)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    space = {"loader": [(images, torch.arange(8))] * 3}
    first, second, third = BLOCKS
    exec(first, space)
    merged = space["model"]
    assert not any(isinstance(module, adapters.AdaptedLayer) for module in merged.modules())
    assert not torch.equal(merged.blocks[0].attn.qkv.weight, base.blocks[0].attn.qkv.weight)
    # the keys' rows are left alone
    assert torch.equal(merged.blocks[0].attn.qkv.weight[48:96], base.blocks[0].attn.qkv.weight[48:96])
    again = copy.deepcopy(base)
    adapters.load_adapter(again, tmp_path / "flowers")
    torch.testing.assert_close(again.eval()(images), merged(images), atol=1e-5, rtol=1e-4)
    of_peft = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "flowers_lora").eval()
    torch.testing.assert_close(of_peft(images), merged(images), atol=1e-5, rtol=1e-4)

    space["model"] = copy.deepcopy(base)
    exec(second, space)
    assert type(space["model"]) is type(base)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "flowers_dora").eval()
    torch.testing.assert_close(loaded(images), space["model"].eval()(images), atol=1e-5, rtol=1e-4)
    exec(third, space)


def test_every_function_and_file_of_the_guide_is_there():
    packages = [adapters, importlib.import_module("vision_lowrank.tasks.adapter_training")]
    modules = [
        importlib.import_module(f"vision_lowrank.adapters.{item.name}")
        for item in pkgutil.iter_modules(adapters.__path__)
    ]
    known = {name for module in [*packages, *modules] for name in vars(module)}
    calls = set(re.findall(r"`(?:\w+\.)?(\w+)\(", PROSE)) - {"train", "step"}
    assert len(calls) > 15
    # of peft, and of PyTorch's modules
    assert calls - known == set()
    files = re.findall(r"`([\w/]+\.py)`", PROSE)
    assert len(files) > 10
    for name in files:
        assert any((REPOSITORY / "vision_lowrank" / place / name).exists() for place in ("", "adapters")), name


def test_the_tables_name_every_method_of_peft_and_every_configuration():
    named = set(re.findall(r"`(\w+)`", PROSE))
    assert set(PEFT_METHODS) <= named
    configurations = {path.stem for path in (REPOSITORY / "configs" / "adapter").glob("[a-z]*.yaml")} - {"sprite_lora"}
    assert configurations <= named


def test_the_comparisons_commands_name_configurations_that_exist():
    commands = re.findall(r"experiment=adapter_comparison .*adapter=(\S+)", GUIDE)
    names = [name for command in commands for name in command.split(",")]
    assert len(names) == len(set(names)) > 20
    for name in names:
        text = (REPOSITORY / "configs" / "adapter" / f"{name}.yaml").read_text(encoding="utf-8")
        assert yaml.safe_load(text)["name"] == name
