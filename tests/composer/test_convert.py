"""The command that turns any LoRA file into safetensors."""

import subprocess
import sys

import pytest
import torch

from vision_lowrank.composer.convert import main
from vision_lowrank.composer.lora_files import LoraFileError, read_lora

KEY = "mid_block.attentions.0.transformer_blocks.0.attn2"
TEXT = "encoder.layers.0.self_attn.q_proj"


@pytest.fixture
def source(tmp_path):
    """A Mix-of-Show file with layers of ranks 2 and 3 and two tokens."""
    torch.manual_seed(0)
    unet = {}
    for name, rank in (("to_k", 2), ("to_v", 2), ("to_out.0", 3)):
        unet[f"{KEY}.{name}.lora_down.weight"] = torch.randn(rank, 4)
        unet[f"{KEY}.{name}.lora_up.weight"] = torch.randn(6, rank)
    text = {
        f"text_model.{TEXT}_lora.down.weight": torch.randn(2, 5),
        f"text_model.{TEXT}_lora.up.weight": torch.randn(5, 2),
    }
    tokens = {"<ai1>": torch.randn(16, 5), "<ai2>": torch.randn(5)}
    path = tmp_path / "cat.pth"
    torch.save({"params": {"new_concept_embedding": tokens, "unet": unet, "text_encoder": text}}, path)
    return path


def test_converts_and_says_what_it_found(source, tmp_path, capsys):
    target = tmp_path / "new" / "cat.safetensors"
    main([str(source), str(target)])
    assert capsys.readouterr().out.splitlines() == [
        "unet: 3 layers, rank 2, 3, scale 1",
        "text_encoder: 1 layers, rank 2, scale 1",
        "token <ai1> of text_encoder: 16 x 5",
        "token <ai2> of text_encoder: 1 x 5",
        f"written: {target}",
    ]
    old = torch.load(source, weights_only=True)["params"]
    new = read_lora(target)
    assert set(new.unet) == {f"{KEY}.to_k", f"{KEY}.to_v", f"{KEY}.to_out.0"}
    for name, change in new.unet.items():
        expected = old["unet"][f"{name}.lora_up.weight"] @ old["unet"][f"{name}.lora_down.weight"]
        torch.testing.assert_close(change.scale * change.up @ change.down, expected)
    down, up = (old["text_encoder"][f"text_model.{TEXT}_lora.{part}.weight"] for part in ("down", "up"))
    change = new.text_encoder[TEXT]
    torch.testing.assert_close(change.scale * change.up @ change.down, up @ down)
    assert torch.equal(new.tokens["<ai1>"], old["new_concept_embedding"]["<ai1>"])
    assert torch.equal(new.tokens["<ai2>"], old["new_concept_embedding"]["<ai2>"][None])


def test_replaces_a_file_only_when_told(source, tmp_path):
    target = tmp_path / "cat.safetensors"
    target.write_bytes(b"precious")
    with pytest.raises(LoraFileError, match=r"cat.safetensors exists.*--force"):
        main([str(source), str(target)])
    assert target.read_bytes() == b"precious"
    main([str(source), str(target), "--force"])
    assert len(read_lora(target).unet) == 3


def test_wrong_paths(source, tmp_path):
    with pytest.raises(LoraFileError, match=r"dog.pth does not exist"):
        main([str(tmp_path / "dog.pth"), str(tmp_path / "dog.safetensors")])
    with pytest.raises(LoraFileError, match=r"ends in .safetensors"):
        main([str(source), str(tmp_path / "cat.bin")])
    assert [path.name for path in tmp_path.iterdir()] == ["cat.pth"]


def test_command_is_light_and_prints_errors_as_one_line(tmp_path):
    code = (
        "import runpy, sys\n"
        "try:\n    runpy.run_module('vision_lowrank.composer.convert', run_name='__main__')\n"
        "finally:\n    print(sorted({'diffusers', 'transformers', 'peft', 'lightning'} & set(sys.modules)))\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "none.pth"), str(tmp_path / "out.safetensors")]
    run = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stdout == "[]\n"
    assert run.stderr.startswith("error: ")
    assert run.stderr.count("\n") == 1
    assert "none.pth does not exist" in run.stderr
