"""docs/adapter_examples.md: every block runs, and trains what it says."""

import copy
import re
from pathlib import Path

import peft
import pytest
import timm
import torch

from vision_lowrank import adapters
from vision_lowrank.adapters.peft_methods import PEFT_METHODS

REPOSITORY = Path(__file__).resolve().parents[1]
SPRITES = REPOSITORY / "vision_lowrank" / "assets" / "sprites" / "pipeline"
GUIDE = (REPOSITORY / "docs" / "adapter_examples.md").read_text(encoding="utf-8")
# examples are of a user in the repository's folder; here files are written elsewhere
GUIDE = GUIDE.replace("vision_lowrank/assets/sprites/pipeline", SPRITES.as_posix())
SETUP, *BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def space(monkeypatch, tmp_path):
    """What the first block defines, with a small random ViT and three batches; files go into a temporary folder."""

    def create(name, pretrained, num_classes):
        torch.manual_seed(0)
        sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3}
        return timm.models.vision_transformer.VisionTransformer(num_classes=num_classes, **sizes)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timm, "create_model", create)
    space = {"loader": [(IMAGES, torch.arange(6))] * 3}
    exec(SETUP, space)
    space["models"] = []
    train = space["train"]
    space["train"] = lambda model, *rest, **hooks: space["models"].append(train(model, *rest, **hooks)) or model
    return space


@pytest.mark.parametrize("block", BLOCKS, ids=[str(number) for number in range(len(BLOCKS))])
def test_an_example_runs_and_trains(block, space):
    base = copy.deepcopy(space["base"])
    exec(block, space)
    # what examples begin with is left alone
    assert all(torch.equal(first, second) for first, second in zip(
        base.state_dict().values(), space["base"].state_dict().values(), strict=True
    ))  # fmt: skip
    expected = base.eval()(IMAGES)
    for model in space["models"]:
        found = model.eval()(IMAGES)
        assert found.isfinite().all()
        assert not torch.allclose(found, expected, atol=1e-4)


def example(word):
    (block,) = (block for block in BLOCKS if word in block)
    return block


def test_files_of_examples_hold_what_was_trained(space, tmp_path):
    exec(example("type(method)"), space)
    exec(example("balance_ranks"), space)
    exec(example("PEFT_METHODS"), space)
    # LoRA and rsLoRA write one name: the second stays
    ours, of_peft = space["models"][1:7], space["models"][7:]
    for model, name in zip(ours, ("LoRA", "GatedLoRA", "Hydra", "NOLA", "LoRAXS", "FlyLoRA"), strict=True):
        again = copy.deepcopy(space["base"])
        adapters.load_adapter(again, tmp_path / name)
        torch.testing.assert_close(again.eval()(IMAGES), model(IMAGES), atol=1e-5, rtol=1e-4)
    for model, name in zip(of_peft, PEFT_METHODS, strict=True):
        again = peft.PeftModel.from_pretrained(copy.deepcopy(space["base"]), tmp_path / f"peft_{name}")
        torch.testing.assert_close(again.eval()(IMAGES), model(IMAGES), atol=1e-4, rtol=1e-3)


def test_cut_and_pruned_are_ordinary_loras(space, tmp_path):
    for word, ranks in (("truncate", lambda: {4}), ("prune", lambda: set(space["ranks"].values()))):
        exec(example(word), space)
        layers = [module for module in space["model"].modules() if isinstance(module, adapters.AdaptedLayer)]
        assert {type(layer.methods["default"]) for layer in layers} == {adapters.LoRA}
        assert {layer.methods["default"].rank for layer in layers} <= ranks()


def test_a_lora_of_a_denoiser_is_read_by_peft_and_changes_the_noise(space, tmp_path):
    exec(example("UNet2DConditionModel"), space)
    unet = space["unet"].eval()
    plain = type(unet).from_pretrained(SPRITES, subfolder="unet")
    inputs = space["latents"], torch.tensor([10, 500]), space["text"]
    with torch.no_grad():
        expected, before = unet(*inputs).sample, plain.eval()(*inputs).sample
        theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "sprite_lora").eval()
        torch.testing.assert_close(theirs(*inputs).sample, expected, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(before, expected, atol=1e-4)
