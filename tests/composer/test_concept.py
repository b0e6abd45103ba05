"""What a concept's training changes, and that a LoRA file brings it back, by diffusers' own loader too."""

import copy

import pytest
import torch

from vision_lowrank.adapters import LoRA
from vision_lowrank.errors import AdapterError, ConfigError

pytest.importorskip("diffusers")

from vision_lowrank.composer.concept import taught, teach
from vision_lowrank.composer.lora_files import read_lora, write_lora
from vision_lowrank.composer.pipeline import build_pipeline
from vision_lowrank.composer.text import encode
from vision_lowrank.tasks.text_to_image import TextToImage

WORDS = ("<fox1>", "<fox2>")
UNET = ["attn2.to_k", "attn2.to_v", "attn2.to_out.0"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "proj_in"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]
OPTIONS = {"learning_rate": 1e-3, "weight_decay": 0.0, "warmup": 0.1, "cooldown": 0.2, "average": None}


@pytest.fixture
def base():
    torch.manual_seed(0)
    return build_pipeline(["a", "dog", "on", "grass"], 10, 16, (8, 16), 1, 2, 4, 16, 1, 2)


@pytest.fixture
def student(base):
    pipeline = copy.deepcopy(base)
    torch.manual_seed(1)
    teach(pipeline, WORDS, "dog", LoRA(rank=2, alpha=6), UNET, TEXT)
    return pipeline


def states(pipeline, *captions):
    with torch.no_grad():
        return TextToImage(pipeline, **OPTIONS).encode(captions)


def test_at_first_nothing_known_changes(base, student):
    assert torch.equal(states(student, "a dog on grass"), states(base, "a dog on grass"))
    noise, text = torch.randn(1, 12, 8, 8), torch.randn(1, 10, 16)
    with torch.no_grad():
        assert torch.equal(student.unet(noise, 5, text).sample, base.unet(noise, 5, text).sample)
    # the second word alone starts as a dog
    assert torch.equal(states(student, "a <fox2> on grass"), states(base, "a dog on grass"))
    assert not torch.allclose(states(student, "a <fox1> on grass"), states(base, "a dog on grass"))


def test_the_last_of_three_words_starts_as_what_is_known(base):
    pipeline = copy.deepcopy(base)
    teach(pipeline, ["<a>", "<b>", "<c>"], "dog", LoRA(rank=2, alpha=6), UNET, TEXT)
    known = states(base, "a dog on grass")
    alike = [torch.equal(states(pipeline, f"a {word} on grass"), known) for word in ("<a>", "<b>", "<c>")]
    assert alike == [False, False, True]


def test_only_the_concept_is_trained(student):
    names = [
        name for part in (student.unet, student.text_encoder)
        for name, parameter in part.named_parameters() if parameter.requires_grad
    ]  # fmt: skip
    assert [name for name in names if "lora_" not in name] == ["embeddings.token_embedding.rows"]
    # three layers in each of four cross-attentions, four in one layer of text, two factors each
    assert sum("lora_" in name for name in names) == (3 * 4 + 4) * 2
    task = TextToImage(student, **OPTIONS)
    loss = task.loss(torch.rand(1, 3, 16, 16), ["<fox1> <fox2> on grass"], torch.tensor([500]), torch.rand(1, 12, 8, 8))
    loss.backward()
    rows = student.text_encoder.get_input_embeddings().rows
    assert (rows.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("convolutions", [False, True])
def test_the_file_brings_the_concept_back(base, student, tmp_path, convolutions):
    if convolutions:
        student = copy.deepcopy(base)
        teach(student, WORDS, "dog", LoRA(rank=2, alpha=6), UNET + CONVOLUTIONS, TEXT)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for part in (student.unet, student.text_encoder):
            for parameter in part.parameters():
                if parameter.requires_grad:
                    # values that half precision holds exactly
                    parameter.copy_(torch.randn(parameter.shape, generator=generator).mul(0.2).half().float())
    write_lora(taught(student, WORDS), tmp_path / "fox.safetensors")
    lora = read_lora(tmp_path / "fox.safetensors")
    assert {(change.rank, change.scale) for change in lora.unet.values()} == {(2, 3.0)}
    for name in CONVOLUTIONS if convolutions else ():
        shapes = {change.down.shape[2:] for path, change in lora.unet.items() if path.endswith(name)}
        assert shapes == {(1, 1) if name in ("conv_shortcut", "proj_in") else (3, 3)}, name
    found = encode(base, "<fox1> <fox2> on grass", loras=[(lora, 1.0)])
    expected = states(student, "<fox1> <fox2> on grass")
    torch.testing.assert_close(found.text.positive, expected, rtol=1e-5, atol=1e-5)
    assert found.tokens == [1, 2]

    pytest.importorskip("peft")
    noise, text = torch.randn(1, 12, 8, 8), torch.randn(1, 10, 16)
    with torch.no_grad():
        before = base.unet(noise, 500, text).sample
        base.load_lora_weights(str(tmp_path), weight_name="fox.safetensors")
        after, wanted = base.unet(noise, 500, text).sample, student.unet(noise, 500, text).sample
    torch.testing.assert_close(after, wanted, rtol=1e-4, atol=1e-5)
    assert (after - before).abs().max() > 1e-3


def test_wrong_words_and_layers_are_refused(base, student):
    with pytest.raises(ConfigError, match="knows <fox1>, <fox2> already"):
        teach(student, WORDS, "dog", LoRA(2, 2), UNET, TEXT)
    with pytest.raises(ConfigError, match="'wolf' is 4 tokens"):
        teach(base, WORDS, "wolf", LoRA(2, 2), UNET, TEXT)
    with pytest.raises(AdapterError, match="to_z"):
        teach(base, WORDS, "dog", LoRA(2, 2), ["attn2.to_z"], TEXT)
