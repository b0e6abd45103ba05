"""Adapter files: ours in peft, peft's in ours, and every way in which a file can be wrong."""

import copy
import json
import shutil
import threading

import lightning
import peft
import pytest
import timm
import torch
from adapter_zoo import VOLUME, make_toy, perturb
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from vision_lowrank import __version__, adapters
from vision_lowrank.adapters import NOLA, FlyLoRA, GatedLoRA, LoRA, export_lora, inject, load_adapter, save_adapter
from vision_lowrank.adapters.peft_layout import lora_from_config
from vision_lowrank.errors import AdapterError


@pytest.fixture
def toy():
    return make_toy()


ATTENTION_AND_MLP = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]


def make_vit():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5).eval()
    nn.init.normal_(model.head.weight, std=0.2)
    return model


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def cases(toy):
    """Model, input, targets (linear, fused qkv, 1-D to 3-D convolutions) by name."""
    return {
        "vit": (make_vit(), IMAGES, [*ATTENTION_AND_MLP, "patch_embed.proj"]),
        "toy": (toy, VOLUME, ["stem", "mix.0", "proj", "mlp.0", "mlp.2"]),
    }


@pytest.mark.parametrize("case", ["vit", "toy"])
@pytest.mark.parametrize("rslora", [False, True])
def test_ours_in_peft(case, rslora, cases, tmp_path):
    base, x, targets = cases[case]
    ours = copy.deepcopy(base)
    inject(ours, targets[:2], LoRA(4, 6, dropout=0.1, rslora=rslora), train="head")
    inject(ours, targets[2:-1], LoRA(3, 6, dropout=0.1, rslora=rslora))
    inject(ours, targets[-1], LoRA(3, 5, dropout=0.1, rslora=rslora))
    perturb(ours)
    expected = ours(x)
    assert not torch.allclose(expected, base(x), atol=1e-2)
    adapters.set_strength(ours, 0.5)
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(theirs(x), expected)
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path)
    assert torch.equal(again(x), expected)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in ours.parameters()]


@pytest.mark.parametrize("case", ["vit", "toy"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"modules_to_save": ["head"]},
        {"rank_pattern": {"qkv": 7, "^stem": 3}, "alpha_pattern": {r"blocks\.0\.mlp\.fc1": 3, "mlp.0": 2.5}},
        {"use_rslora": True, "modules_to_save": ["head"], "lora_dropout": 0.2, "init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_peft_in_ours(case, settings, cases, tmp_path):
    base, x, targets = cases[case]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **settings)
    theirs = perturb(peft.get_peft_model(copy.deepcopy(base), config)).eval()
    expected = theirs(x)
    theirs.save_pretrained(tmp_path)
    load_adapter(base, tmp_path, name="from_peft")
    assert torch.equal(base(x), expected)
    # and back again, from the settings that were read
    save_adapter(base, tmp_path / "again", name="from_peft")
    again = peft.PeftModel.from_pretrained(
        cases[case][0].__class__() if case == "toy" else make_vit(), tmp_path / "again"
    )
    if case == "vit":
        assert torch.equal(again.eval()(x), expected)


def test_layout_is_that_of_peft(tmp_path, toy):
    inject(toy, ["stem", "mlp.0"], LoRA(2, 4), train="head")
    save_adapter(toy, tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}
    assert shapes == {
        "base_model.model.stem.lora_A.weight": (2, 1, 3, 3, 3),
        "base_model.model.stem.lora_B.weight": (4, 2, 1, 1, 1),
        "base_model.model.mlp.0.lora_A.weight": (2, 6),
        "base_model.model.mlp.0.lora_B.weight": (10, 2),
        "base_model.model.head.weight": (3, 6),
        "base_model.model.head.bias": (3,),
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 4)
    assert (config["target_modules"], config["modules_to_save"]) == (["stem", "mlp.0"], ["head"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


class Ambiguous(nn.Module):
    """The path of one layer is the end of another's."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.inner = nn.Sequential(nn.Linear(4, 4))
        self.inner.add_module("proj", nn.Linear(4, 4))

    def forward(self, x):
        return self.proj(self.inner(x))


@pytest.mark.parametrize("ranks", [{"proj": 2}, {"proj": 2, "inner.proj": 3, "inner.0": 3}])
def test_ambiguous_paths_in_peft(ranks, tmp_path):
    base = Ambiguous()
    ours = copy.deepcopy(base)
    for path, rank in ranks.items():
        inject(ours, lambda name, _, path=path: name == path, LoRA(rank, 5))
    perturb(ours)
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    x = torch.randn(3, 4)
    assert torch.equal(theirs(x), ours(x))
    assert sum("lora_A" in name for name, _ in theirs.named_parameters()) == len(ranks)


class LikeNames(nn.Module):
    """A module to train, `head`, whose name ends another's."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.pre_head = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.pre_head(self.fc(x)))


@pytest.mark.parametrize("targets", [["fc"], ["fc", "pre_head"]])
def test_trained_module_that_peft_would_confuse_is_not_written_for_it(targets, tmp_path):
    base = LikeNames()
    ours = copy.deepcopy(base)
    inject(ours, targets, LoRA(2, 4), train="head")
    perturb(ours)
    save_adapter(ours, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "VISION_LOWRANK"
    load_adapter(base, tmp_path)
    x = torch.randn(3, 4)
    assert torch.equal(base(x), ours(x))
    with pytest.raises(AdapterError, match="would take 'pre_head' for 'head'"):
        export_lora(ours, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_modules_that_peft_trained_by_the_ends_of_their_names(tmp_path):
    base = LikeNames()
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["fc"], modules_to_save=["head"])
    )
    perturb(theirs)
    theirs.save_pretrained(tmp_path)
    load_adapter(base, tmp_path)
    x = torch.randn(3, 4)
    assert torch.equal(base(x), theirs(x))


def test_head_of_another_adapter_is_not_overwritten(toy, tmp_path):
    base = copy.deepcopy(toy)
    inject(toy, "mlp.0", LoRA(2, 4), train="head")
    perturb(toy)
    save_adapter(toy, tmp_path / "first")
    with torch.no_grad():
        toy.head.bias += 1
    save_adapter(toy, tmp_path / "second")
    load_adapter(base, tmp_path / "first", "first")
    load_adapter(base, tmp_path / "first", "again")
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(AdapterError, match="other values of module 'head'"):
        load_adapter(base, tmp_path / "second", "second")
    assert all(torch.equal(tensor, before[key]) for key, tensor in base.state_dict().items())


def test_names_of_a_compiled_model_are_those_of_the_model(toy, tmp_path):
    base = copy.deepcopy(toy)
    inject(toy, "mlp.0", LoRA(2, 4), train="head")
    perturb(toy)
    save_adapter(torch.compile(toy), tmp_path)
    load_adapter(base, tmp_path)
    assert torch.equal(base(VOLUME), toy(VOLUME))


def test_a_compiled_model_takes_the_files_of_a_plain_one(toy, tmp_path):
    base = torch.compile(copy.deepcopy(toy), backend="eager")
    assert torch.equal(base(VOLUME), toy(VOLUME))
    inject(toy, ["mlp.0", "stem"], LoRA(2, 4), train="head")
    perturb(toy)
    save_adapter(toy, tmp_path)
    assert sorted(load_adapter(base, tmp_path)) == ["mlp.0", "stem"]
    assert torch.equal(base(VOLUME), toy(VOLUME))


def test_layers_with_and_without_rslora_in_one_file(tmp_path):
    base = make_toy()
    ours = copy.deepcopy(base)
    inject(ours, "mlp.0", LoRA(3, 5, rslora=True))
    inject(ours, ["mlp.2", "proj"], LoRA(3, 5))
    perturb(ours)
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(theirs(VOLUME), ours(VOLUME))


@pytest.mark.parametrize(
    ("make", "shape", "method", "kinds"),
    [
        (lambda: nn.Linear(6, 8), (2, 6), GatedLoRA(3, 6, gate_rank=2), "GatedLoRA"),
        (lambda: nn.Linear(6, 8), (2, 6), GatedLoRA(3, 6, gate_rank=None), "GatedLoRA"),
        (lambda: nn.Conv2d(6, 8, 3, groups=2), (2, 6, 5, 5), LoRA(3, 6), "LoRA"),
        (lambda: nn.Conv1d(6, 8, 3, dilation=2), (2, 6, 9), LoRA(3, 6, rslora=True), "LoRA"),
    ],
)
def test_what_peft_cannot_compute_has_its_own_type(make, shape, method, kinds, tmp_path):
    base = nn.Sequential(make(), nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(shape)
    base(x)
    model = copy.deepcopy(base)
    inject(model, "0", method, train="2")
    perturb(model)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "VISION_LOWRANK"
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "vision_lowrank": __version__, "method": kinds}
        assert all(key.startswith("base_model.model.") for key in file.keys())  # noqa: SIM118
    load_adapter(base, tmp_path)
    assert torch.equal(base(x), model(x))
    assert base[0].methods == {"default": method}


def test_peft_file_for_grouped_convolution_is_refused(tmp_path):
    base = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="ignores groups"):
        load_adapter(base, tmp_path)


def test_two_names_are_two_files_and_heads_go_with_their_name(toy, tmp_path):
    base = copy.deepcopy(toy)
    inject(toy, "mlp.0", LoRA(2, 4), name="a", train="head")
    inject(toy, "mlp.0", LoRA(3, 4), name="b")
    perturb(toy)
    save_adapter(toy, tmp_path / "a", "a")
    save_adapter(toy, tmp_path / "b", "b")
    assert len(load_file(tmp_path / "b" / "adapter_model.safetensors")) == 2
    for name in ("a", "b"):
        load_adapter(base, tmp_path / name, name)
    assert torch.equal(base(VOLUME), toy(VOLUME))
    with pytest.raises(AdapterError, match="no adapter 'c'"):
        save_adapter(toy, tmp_path / "c", "c")


def test_frozen_for_inference_the_head_is_still_saved(toy, tmp_path):
    inject(toy, "mlp.0", LoRA(2, 4), train="head")
    toy.requires_grad_(False)
    save_adapter(toy, tmp_path)
    assert "base_model.model.head.weight" in load_file(tmp_path / "adapter_model.safetensors")


@pytest.fixture
def saved(toy, tmp_path):
    """A folder with an adapter of the toy's `mlp` and its head, and the toy without adapters."""
    plain = copy.deepcopy(toy)
    inject(toy, ["mlp.0", "mlp.2"], LoRA(2, 4), train="head")
    save_adapter(toy, tmp_path / "adapter")
    return tmp_path / "adapter", plain


def edit(**changes):
    def apply(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return apply


def tensors(change):
    def apply(folder):
        path = folder / "adapter_model.safetensors"
        content = load_file(path)
        change(content)
        save_file(content, path)

    return apply


A0 = "base_model.model.mlp.0.lora_A.weight"


def own(**settings):
    """Edit of the settings of one layer of ours."""
    return edit(peft_type="VISION_LOWRANK", layers={"mlp.0": settings})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), r"adapter_config.json does not exist: give the folder"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), r"safetensors does not exist; pickled"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json is not valid JSON"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "holds a list, not settings"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x80\x04codecs"), "is damaged"),
        (
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(
                (folder / "adapter_model.safetensors").read_bytes()[:-20]
            ),
            "is damaged",
        ),
        (edit(peft_type="LOHA"), "peft_type='LOHA'; this reads LORA"),
        (edit(use_dora=True), "use_dora=True is not plain LoRA"),
        (edit(init_lora_weights="pissa_niter_4"), "changed the base weights"),
        (edit(r=3), r"lora_A.weight has shape \(2, 6\), the model and adapter_config.json ask for \(3, 6\)"),
        (edit(modules_to_save=None), "head.* is neither part of"),
        (edit(peft_type="VISION_LOWRANK"), "holds no adapted layer"),
        (edit(peft_type="VISION_LOWRANK", layers={"mlp.0": {"method": "Magic"}}), "unknown adapter method 'Magic'"),
        (edit(peft_type="VISION_LOWRANK", layers={"mlp.0": {"method": "LoRA", "r": 3}}), "do not belong to adapter"),
        (tensors(lambda t: t.pop(A0)), r"key base_model.model.mlp.0.lora_B.weight is neither"),
        (tensors(lambda t: t.pop(A0.replace("A.", "B."))), r"key base_model.model.mlp.0.lora_B.weight is missing"),
        (tensors(lambda t: t.pop("base_model.model.head.bias")), "head.bias is missing"),
        (tensors(lambda t: t.update({"x": t.pop(A0)})), "key 'x' does not start with"),
        (tensors(lambda t: t.update({A0.replace("mlp.0", "deep"): t.pop(A0)})), "deep.lora_A.weight is for a layer"),
        (tensors(lambda t: t.update({"base_model.model.head.weight": torch.ones(9, 6)})), r"shape \(9, 6\).*classes"),
    ],
)
def test_bad_files(saved, damage, message):
    folder, plain = saved
    damage(folder)
    keys = set(plain.state_dict())
    with pytest.raises(AdapterError, match=message) as error:
        load_adapter(plain, folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value) or "method" in str(error.value)
    assert set(plain.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in plain.parameters())


# settings of peft that change what is computed, or the base; of its LoraConfig
MORE_THAN_LORA = {
    "alora_invocation_tokens": [1],
    "arrow_config": {},
    "bias": "lora_only",
    "fan_in_fan_out": True,
    "kasa_config": {},
    "layer_replication": [[0, 1]],
    "lora_bias": True,
    "monteclora_config": {},
    "target_parameters": ["mlp.0.weight"],
    "trainable_token_indices": [1],
    "use_bdlora": True,
    "use_dora": True,
    "use_qalora": True,
    "velora_config": {},
}


@pytest.mark.parametrize("key", MORE_THAN_LORA)
def test_settings_of_peft_that_are_not_plain_lora_are_refused(saved, key):
    test_bad_files(saved, edit(**{key: MORE_THAN_LORA[key]}), f"{key}=.* is not plain LoRA; load it with peft")


@pytest.mark.parametrize("start", ["corda", "loftq", "lora_ga", "olora", "pissa", "PiSSA_niter_2"])
def test_starts_of_peft_that_change_the_base_are_refused(saved, start):
    test_bad_files(saved, edit(init_lora_weights=start), f"init_lora_weights='{start}' changed the base weights")


@pytest.mark.parametrize("pattern", ["fc", "mlp.fc", "c", r"^mlp\.fc", r".*_fc", r"mlp.*", "ln", r"fc|ln"])
def test_patterns_are_those_of_peft(pattern):
    for path in ("fc", "mlp.fc", "mlp.pre_fc", "other.mlp.fc", "ln.fc", "mlp.ln"):
        found = lora_from_config({"r": 2, "lora_alpha": 4, "rank_pattern": {pattern: 3}}, path, "here")
        assert (found.rank == 3) == (peft.utils.other.get_pattern_key([pattern], path) == pattern), path


HUGE = 10**13  # numbers that no machine has room for


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit(r=HUGE), rf"has shape \(2, 6\), the model and adapter_config.json ask for \({HUGE}, 6\)"),
        (edit(rank_pattern={r"mlp\.2": HUGE}), rf"has shape \(2, 10\), .* ask for \({HUGE}, 10\)"),
        (edit(r=10**18), r"no tensor can be as large as LoRA\(rank=1000000000000000000"),
        (edit(lora_alpha=10**400), "alpha=1000.*: give a finite number"),
        (edit(lora_alpha="8"), "alpha='8': give a finite number"),
        (edit(lora_dropout="x"), "LoRA dropout='x': give a probability"),
        (edit(lora_dropout=None), "LoRA dropout=None: give a probability"),
        (edit(use_rslora="no"), "LoRA rslora='no': give True or False"),
        (edit(rank_pattern={"(": 3}), r"pattern .* of rank_pattern or alpha_pattern is none \(missing \)"),
        (edit(alpha_pattern=[1]), r"alpha_pattern=\[1\] is no mapping of patterns"),
        (edit(modules_to_save="head"), "modules_to_save='head' in adapter_config.json is no list of names"),
        (edit(modules_to_save=[5]), r"modules_to_save=\[5\] in adapter_config.json is no list of names"),
        (edit(peft_type="VISION_LOWRANK", layers=[1]), r"layers=\[1\] is no mapping of layers"),
        (
            edit(peft_type="VISION_LOWRANK", layers={"mlp.0": [1]}),
            r"settings \[1\] of an adapter method: give a mapping",
        ),
        (own(method=["LoRA"]), r"unknown adapter method \['LoRA'\]"),
        (own(method="NOLA", rank=11, alpha=1, terms=1), "NOLA rank=11 .* a file may ask for 10, the larger side"),
        (own(method="NOLA", rank=2, alpha=1, terms=HUGE), "is neither part of"),
        (own(method="Hydra", rank=2, scale=1, dropout=[]), r"Hydra dropout=\[\]: give a probability"),
        (tensors(lambda t: t.update({A0: t[A0].int()})), "lora_A.weight holds torch.int32, the model torch.float32"),
        (
            tensors(lambda t: t[A0].view(-1)[3:4].fill_(float("nan"))),
            "lora_A.weight holds NaN: its training",
        ),
        (tensors(lambda t: t["base_model.model.head.bias"].fill_(float("nan"))), "head.bias holds NaN"),
        (lambda folder: (folder / "adapter_config.json").write_text("[" * 10**5), "is not valid JSON"),
        (lambda folder: (folder / "adapter_config.json").write_text('{"r": ' + "9" * 5000 + "}"), "is not valid JSON"),
        (own(method="DyLoRA", rank=2, alpha=1, frozen="no"), "DyLoRA frozen='no': give True or False"),
    ],
)
def test_settings_are_compared_before_anything_is_made_of_them(saved, damage, message):
    test_bad_files(saved, damage, message)


@pytest.mark.parametrize(
    ("method", "key", "shape"),
    [
        (NOLA(2, 4, terms=3), "nola_alpha", "(3,)"),
        (FlyLoRA(2, 4, active=1), "fly_A", "(2, 6)"),
    ],
)
def test_methods_that_draw_numbers_draw_none_for_a_file_of_other_shapes(toy, method, key, shape, tmp_path):
    plain = copy.deepcopy(toy)
    inject(toy, "mlp.0", method)
    save_adapter(toy, tmp_path)
    config = tmp_path / "adapter_config.json"
    text = config.read_text()
    config.write_text(
        text.replace('"terms": 3', f'"terms": {HUGE}').replace('"rank": 2', f'"rank": {HUGE}', key == "fly_A")
    )
    with pytest.raises(AdapterError) as error:
        load_adapter(plain, tmp_path)
    asked = f"({HUGE},)" if key == "nola_alpha" else f"({HUGE}, 6)"
    assert f"{key} has shape {shape}, the model and adapter_config.json ask for {asked}" in str(error.value)
    # and what fits is loaded to the last bit
    config.write_text(text)
    load_adapter(plain, tmp_path)
    assert torch.equal(plain(VOLUME), toy(VOLUME))


def test_missing_setting_is_named(saved):
    folder, plain = saved
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["lora_alpha"]
    path.write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="key 'lora_alpha' is missing"):
        load_adapter(plain, folder)


def test_interrupted_save_keeps_the_older_file(saved, toy, monkeypatch):
    folder, _ = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    torch.nn.init.ones_(toy.head.weight)

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vision_lowrank.adapters.files.save_file", fail)
    with pytest.raises(OSError, match="No space"):
        save_adapter(toy, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


class Lit(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, _):
        adapters.set_strength(self.model, 0.4)
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def test_lightning_checkpoint(toy, tmp_path):
    plain = copy.deepcopy(toy)
    inject(toy, ["mlp.0", "stem"], LoRA(2, 4), train="head")
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(VOLUME, torch.tensor([0, 2])), batch_size=2)
    options = {"accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(**options, enable_checkpointing=False, enable_model_summary=False)
    trainer.fit(Lit(toy), data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    inject(plain, ["mlp.0", "stem"], LoRA(2, 4), train="head")
    Lit(plain).load_state_dict(state)
    toy.eval()
    assert torch.equal(plain.eval()(VOLUME), toy(VOLUME))
    assert plain.stem.adapters["default"].strength.item() == pytest.approx(0.4)


def test_layers_that_cannot_be_copied_are_loaded(saved, toy):
    folder, plain = saved
    for layer in plain.modules():
        layer.lock = threading.Lock()
    load_adapter(plain, folder)
    assert torch.equal(plain(VOLUME), toy(VOLUME))
