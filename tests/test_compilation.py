"""Compiled blocks compute what eager ones do, under the same names; `compile` reaches a training."""

import functools
import shutil

import pytest
import torch
from hydra import compose, initialize_config_dir
from stripes import write_stripes

from vision_lowrank.checkpoints import read_checkpoint
from vision_lowrank.compilation import compile_blocks
from vision_lowrank.errors import ConfigError
from vision_lowrank.models import HyperMAE, LessViT, LolaSpecViT
from vision_lowrank.training import train


class Counter:
    """A backend that counts graphs and runs them as they are; what cannot be one graph is an error."""

    def __init__(self, patch):
        self.graphs = 0
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend=self, fullgraph=True))

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture
def counter(monkeypatch):
    torch._dynamo.reset()
    return Counter(monkeypatch)


def lola():
    torch.manual_seed(0)
    return LolaSpecViT(4, 3, 5, (2, 4), (3, 3), 16, (2,), (2,))


def image():
    return torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(1))


def test_blocks_compute_what_they_did_under_the_same_names(counter):
    eager, compiled = lola().eval(), lola().eval()
    compile_blocks(compiled)
    torch.testing.assert_close(compiled(image()), eager(image()))
    # the stem, and two blocks that drop their branches at other rates
    assert counter.graphs == 3
    assert compiled.state_dict().keys() == eager.state_dict().keys()
    compiled(image()).sum().backward()
    eager(image()).sum().backward()
    for (name, found), expected in zip(compiled.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, msg=name)


def test_encoder_and_decoder_of_hyper_mae_are_compiled(counter):
    model = HyperMAE(LessViT(0, 2, 32, 2, 2, radar=False), 16, 1, 2)
    patches = model.encoder.patches(torch.randn(2, 6, 8, 8), [500, 550, 600, 650, 700, 750], 10.0)
    noise = model.draw_noise(patches, "optical")
    expected = model.reconstruct(patches, "optical", noise).loss
    compile_blocks(model)
    torch.testing.assert_close(model.reconstruct(patches, "optical", noise).loss, expected)
    # one for the two blocks of the encoder, which are alike
    assert counter.graphs == 2


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ConfigError, match="compile=true compiles blocks of LoLA-SpecViT, LESS ViT and Hyper-MAE"):
        compile_blocks(torch.nn.Linear(2, 2))


def test_a_compiled_training_learns_the_same(repository, tmp_path, counter):
    card = write_stripes(tmp_path, 12, 12)
    found = {}
    for choice in ("false", "true"):
        with initialize_config_dir(str(repository / "configs"), version_base="1.3"):
            config = compose(
                "train",
                [
                    "experiment=own_scene", f"data.card={card}", f"data.root={tmp_path}", "baselines=null",
                    f"runs_root={tmp_path / choice}", "data.patch_size=5", "data.components=4", "data.batch_size=16",
                    "data.split.train=0.3", "data.split.validation=0.2", "trainer.max_epochs=2",
                    "trainer.precision=32-true", "+model.dim=16", "+model.num_heads=[2]", "+model.depths=[1]",
                    "+model.stem_channels=[2,4]", "+model.stem_depths=[3,3]", f"compile={choice}",
                ],
            )  # fmt: skip
        assert counter.graphs == 0
        train(config)
        (path,) = (tmp_path / choice).glob("*/*/checkpoints/last.ckpt")
        found[choice] = read_checkpoint(path)
    assert counter.graphs > 0
    assert found["true"]["state_dict"].keys() == found["false"]["state_dict"].keys()
    for name, value in found["false"]["state_dict"].items():
        torch.testing.assert_close(found["true"]["state_dict"][name], value, msg=name)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch compiles for CPUs by g++")
def test_the_compiler_itself_computes_the_same():
    torch._dynamo.reset()
    eager, compiled = lola().eval(), lola().eval()
    compile_blocks(compiled)
    with torch.inference_mode():
        for size in (1, 2, 3):
            torch.testing.assert_close(compiled(image()[:size]), eager(image()[:size]), rtol=1e-4, atol=1e-5)
