"""A stem that remembers its patches gives what the same task without memory gives."""

import copy

import pytest
import torch

from vision_lowrank.adapters import LoRA, freeze_except, inject
from vision_lowrank.models.lola_specvit import LolaSpecViT
from vision_lowrank.tasks import frozen_stem
from vision_lowrank.tasks.frozen_stem import FrozenStemClassification, stem_memory
from vision_lowrank.tasks.scene_classification import SceneClassification

OPTIONS = {
    "class_counts": [5, 5, 5], "learning_rate": 0.01, "weight_decay": 0.0, "warmup": 0.1, "label_smoothing": 0.0,
    "balance": 0.0, "mixup": 0.0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh():
    stem_memory.cache_clear()


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"stem_channels": (2, 4), "stem_depths": (3, 3), "dim": 16, "depths": (1,), "num_heads": (2,)}
    return LolaSpecViT(4, 3, 5, **sizes, drop_rate=0, drop_path_rate=0)


@pytest.fixture
def computed(monkeypatch):
    """Sizes of the batches that stems compute."""
    sizes = []
    forward = frozen_stem.SpectralStem.forward

    def count(stem, x):
        sizes.append(len(x))
        return forward(stem, x)

    monkeypatch.setattr(frozen_stem.SpectralStem, "forward", count)
    return sizes


def patches(number, seed=0):
    return torch.randn(number, 4, 5, 5, generator=torch.Generator().manual_seed(seed))


def adapted(model):
    model = copy.deepcopy(model)
    inject(model, ["attn.qkv", "mlp.fc2"], LoRA(2, 4), train="head")
    return model


def test_logits_and_gradients_are_those_of_the_plain_task_and_a_patch_is_computed_once(model, computed):
    plain = SceneClassification(adapted(model), **OPTIONS).train()
    task = FrozenStemClassification(plain.model, **OPTIONS).train()
    image, label = patches(40), torch.arange(40) % 3
    for number in range(2):
        results = []
        for one in (plain, task):
            one.zero_grad()
            del computed[:]
            logits = one({"image": image})
            torch.nn.functional.cross_entropy(logits, label).backward()
            results.append((logits.detach(), [p.grad.clone() for p in one.parameters() if p.requires_grad]))
        torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-4)
        # 40 patches fill two chunks, the first time
        assert computed == ([32, 32] if number == 0 else [])
    # in another order, some twice, and new ones
    mixed = torch.cat([image[[7, 7, 3]], patches(2, seed=1)])
    torch.testing.assert_close(task({"image": mixed}), plain({"image": mixed}), atol=1e-5, rtol=1e-4)
    assert computed == [32, 5]
    assert len(stem_memory(frozen_stem._digest(task.model.stem))._features) == 42
    assert task.state_dict().keys() == plain.state_dict().keys()
    assert "forward" not in vars(task.model.stem)


def test_prediction_and_training_share_what_is_remembered(model, computed):
    task = FrozenStemClassification(adapted(model), **OPTIONS)
    with torch.inference_mode():
        predicted = task.eval()({"image": patches(8)})
    again = task.train()({"image": patches(8)})
    assert again.requires_grad
    again.sum().backward()
    assert len(computed) == 1
    torch.testing.assert_close(again.detach(), predicted.clone(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_feature_does_not_depend_on_who_asked_first(model, dtype):
    image = patches(80)
    stem = model.stem.eval()

    def recall(*orders):
        memory = frozen_stem.StemMemory()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            for order in orders:
                memory.recall(stem, image[order])
            return memory.recall(stem, image)

    first = recall(range(80))
    assert first.dtype == dtype
    assert torch.equal(first, recall([5], [79, 78, 77], list(range(40, 75))))


def test_formats_are_kept_apart(model):
    memory, stem = frozen_stem.StemMemory(), model.stem.eval()
    with torch.autocast("cpu", torch.bfloat16):
        memory.recall(stem, patches(3))
    with torch.no_grad():
        torch.testing.assert_close(memory.recall(stem, patches(3)), stem(patches(3)), atol=1e-6, rtol=1e-5)


def test_a_stem_that_is_trained_is_applied_anew(model, computed):
    whole = FrozenStemClassification(copy.deepcopy(model), **OPTIONS)
    inside = copy.deepcopy(model)
    inject(inside, ["stem.collapse"], LoRA(2, 4), train="head")
    for task in (whole, FrozenStemClassification(inside, **OPTIONS)):
        del computed[:]
        for _ in range(2):
            task({"image": patches(6)}).sum().backward()
        assert computed == [6, 6]
    assert whole.model.stem.collapse.weight.grad.abs().sum() > 0
    assert inside.stem.collapse.adapters["default"].lora_B.weight.grad.abs().sum() > 0


def test_other_weights_have_another_memory(model, computed):
    first, second = (copy.deepcopy(model) for _ in range(2))
    with torch.no_grad():
        second.stem.convolutions[1].running_mean += 1
    logits = []
    for one in (first, second):
        freeze_except(one, "head")
        logits.append(FrozenStemClassification(one, **OPTIONS).eval()({"image": patches(4)}))
        torch.testing.assert_close(logits[-1], one(patches(4)))
    assert not torch.allclose(*logits)


def test_a_full_memory_starts_anew(model, monkeypatch):
    monkeypatch.setattr(frozen_stem, "LIMIT", 3 * 16 * 25 * 4)
    memory, stem = frozen_stem.StemMemory(), model.stem.eval()
    for seed in range(4):
        found = memory.recall(stem, patches(4, seed))
        with torch.no_grad():
            torch.testing.assert_close(found, stem(patches(4, seed)), atol=1e-6, rtol=1e-5)
        assert len(memory._features) == 4
