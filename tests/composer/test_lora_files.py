"""Layouts of LoRA files: what is read equals deltas computed here, by diffusers or by peft."""

import copy
import json
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vision_lowrank.composer.lora_files import LoraFileError, LoraWeights, LowRank, check_fits, read_lora, write_lora

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

WIDTH = 16
RANK = 3


def tiny_unet(**options):
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
        **options,
    )


def tiny_text_encoder():
    torch.manual_seed(1)
    config = transformers.CLIPTextConfig(
        vocab_size=50,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        projection_dim=WIDTH,
    )
    return transformers.CLIPTextModel(config).eval()


@pytest.fixture(scope="module")
def unet():
    return tiny_unet().eval()


@pytest.fixture(scope="module")
def text_encoder():
    return tiny_text_encoder()


def layers_of(model, only=""):
    """Weights' shapes of linear layers and convolutions, by module name."""
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and only in name
    }


def random_factors(layers, seed=0, rank=RANK):
    """Returns down and up in a file's shape, by module name."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, (outputs, *inputs) in layers.items():
        down = torch.randn(rank, *inputs, generator=generator)
        up = torch.randn(outputs, rank, *(1 for _ in inputs[1:]), generator=generator)
        factors[name] = (down, up)
    return factors


def dense(factors, scale):
    """What the factors, in a file's shape, change in the weights."""
    return {
        name: scale * torch.einsum("or,r...->o...", up.flatten(1).double(), down.double())
        for name, (down, up) in factors.items()
    }


def assert_dense(changes, expected):
    assert set(changes) == set(expected)
    for name, change in changes.items():
        assert change.up.ndim == 2
        assert change.shape == tuple(expected[name].shape)
        product = change.scale * change.up.double() @ change.down.double().flatten(1)
        torch.testing.assert_close(product.view(change.shape), expected[name].double(), rtol=1e-6, atol=1e-6, msg=name)


def tokens():
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(4, WIDTH, generator=generator) for name in ("<ai1>", "<ai2>")}


@pytest.mark.parametrize(("down", "up"), [("_lora.down", "_lora.up"), (".lora_down", ".lora_up")])
@pytest.mark.parametrize("wrapped", [True, False])
def test_mix_of_show(tmp_path, unet, text_encoder, down, up, wrapped):
    of_unet, of_text = random_factors(layers_of(unet, "attentions")), random_factors(layers_of(text_encoder), 1)
    content = {"new_concept_embedding": tokens(), "unet": {}, "text_encoder": {}}
    for component, prefix, factors in (("unet", "", of_unet), ("text_encoder", "text_model.", of_text)):
        for name, (first, second) in factors.items():
            content[component][f"{prefix}{name}{down}.weight"] = first
            content[component][f"{prefix}{name}{up}.weight"] = second
    torch.save({"params": content} if wrapped else content, tmp_path / "cat.pth")
    lora = read_lora(tmp_path / "cat.pth")
    assert any(name.endswith("proj_in") and len(shape) == 4 for name, shape in layers_of(unet).items())
    assert_dense(lora.unet, dense(of_unet, 1.0))
    assert_dense(lora.text_encoder, dense(of_text, 1.0))
    assert lora.tokens.keys() == {"<ai1>", "<ai2>"}
    assert all(torch.equal(lora.tokens[name], value) for name, value in tokens().items())
    assert not lora.text_encoder_2
    assert not lora.tokens_2
    check_fits(lora, unet, text_encoder)


@pytest.mark.parametrize("text_prefix", ["lora_te_text_model_", "lora_te1_text_model_", "lora_te2_text_model_"])
@pytest.mark.parametrize("alpha", [None, 1.5])
def test_kohya_names_of_every_layer(tmp_path, unet, text_encoder, text_prefix, alpha):
    content, expected = {}, {}
    for prefix, model, seed in (("lora_unet_", unet, 0), (text_prefix, text_encoder, 1)):
        factors = random_factors(layers_of(model), seed)
        expected[prefix] = dense(factors, 1.0 if alpha is None else alpha / RANK)
        for name, (down, up) in factors.items():
            flat = prefix + name.replace(".", "_")
            content |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
            if alpha is not None:
                content[f"{flat}.alpha"] = torch.tensor(alpha)
    save_file(content, tmp_path / "kohya.safetensors")
    # settings of another LoRA in the same folder are not this file's
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 99}))
    lora = read_lora(tmp_path / "kohya.safetensors")
    assert lora.unet.keys() >= {
        *("conv_in", "conv_out", "time_embedding.linear_1", "down_blocks.0.downsamplers.0.conv"),
        *(f"up_blocks.0.resnets.1.{layer}" for layer in ("conv1", "time_emb_proj", "conv2", "conv_shortcut")),
    }
    assert_dense(lora.unet, expected["lora_unet_"])
    second = text_prefix.startswith("lora_te2")
    assert_dense(lora.text_encoder_2 if second else lora.text_encoder, expected[text_prefix])
    assert not (lora.text_encoder if second else lora.text_encoder_2)


def test_kohya_file_of_a_single_projection(tmp_path):
    name = "lora_te_text_model_encoder_layers_1_self_attn_q_proj"
    down, up = torch.randn(4, WIDTH), torch.randn(WIDTH, 4)
    content = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}
    torch.save(content, tmp_path / "part.ckpt")
    lora = read_lora(tmp_path / "part.ckpt")
    assert_dense(lora.text_encoder, {"encoder.layers.1.self_attn.q_proj": 0.5 * up @ down})
    assert not lora.unet


SDXL_NAMES = {
    "input_blocks_4_1_proj_in": "down_blocks.1.attentions.0.proj_in",
    "input_blocks_5_1_transformer_blocks_1_attn2_to_k": "down_blocks.1.attentions.1.transformer_blocks.1.attn2.to_k",
    "input_blocks_8_1_transformer_blocks_9_ff_net_0_proj": (
        "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj"
    ),
    "middle_block_1_transformer_blocks_3_attn1_to_out_0": "mid_block.attentions.0.transformer_blocks.3.attn1.to_out.0",
    "output_blocks_0_1_transformer_blocks_0_attn2_to_v": "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v",
    "output_blocks_5_1_transformer_blocks_1_ff_net_2": "up_blocks.1.attentions.2.transformer_blocks.1.ff.net.2",
    "input_blocks_2_0_emb_layers_1": "down_blocks.0.resnets.1.time_emb_proj",
    "middle_block_2_emb_layers_1": "mid_block.resnets.1.time_emb_proj",
    "output_blocks_8_0_skip_connection": "up_blocks.2.resnets.2.conv_shortcut",
    "input_blocks_0_0": "conv_in",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_8_0_out_layers_3": "down_blocks.2.resnets.1.conv2",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_6_0_op": "down_blocks.1.downsamplers.0.conv",
    "middle_block_0_in_layers_2": "mid_block.resnets.0.conv1",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_5_2_conv": "up_blocks.1.upsamplers.0.conv",
    "output_blocks_7_0_out_layers_3": "up_blocks.2.resnets.1.conv2",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
}


@pytest.fixture(scope="module")
def sdxl_unet():
    """SDXL's UNet without memory for its weights."""
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=2048,
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


def test_kohya_names_of_sdxl(tmp_path, sdxl_unet, text_encoder):
    content, expected = {}, {}
    for flat, name in SDXL_NAMES.items():
        pair = random_factors({name: sdxl_unet.get_submodule(name).weight.shape}, rank=2)
        expected |= dense(pair, 0.5)
        content[f"lora_unet_{flat}.lora_down.weight"], content[f"lora_unet_{flat}.lora_up.weight"] = pair[name]
        content[f"lora_unet_{flat}.alpha"] = torch.tensor(1.0)
    save_file(content, tmp_path / "xl.safetensors")
    lora = read_lora(tmp_path / "xl.safetensors")
    assert_dense(lora.unet, expected)
    check_fits(lora, sdxl_unet, text_encoder)

    theirs, alphas = diffusers.StableDiffusionXLPipeline.lora_state_dict(
        str(tmp_path / "xl.safetensors"), unet_config=sdxl_unet.config
    )
    assert len(alphas) == len(lora.unet)
    save_file(theirs, tmp_path / "theirs.safetensors")
    assert set(read_lora(tmp_path / "theirs.safetensors").unet) == set(lora.unet)


@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_old_diffusers(tmp_path, unet, text_encoder, prefix):
    of_unet = random_factors(layers_of(unet, ".to_"))
    of_text = random_factors(layers_of(text_encoder, "self_attn"), 1)
    content = {}
    for name, (down, up) in of_unet.items():
        attention, _, projection = name.removesuffix(".0").rpartition(".")
        stem = f"{prefix}{attention}.processor.{projection}_lora"
        content |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
    old_names = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
    for name, (down, up) in of_text.items():
        attention, _, projection = name.rpartition(".")
        # the two spellings of different releases
        spelled = f"{name}.lora_linear_layer" if ".0." in name else f"{attention}.{old_names[projection]}_lora"
        stem = f"text_encoder.text_model.{spelled}"
        content |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
    torch.save(content, tmp_path / "pytorch_lora_weights.bin")
    lora = read_lora(tmp_path)
    assert_dense(lora.unet, dense(of_unet, 1.0))
    assert_dense(lora.text_encoder, dense(of_text, 1.0))


def adapted(model, options):
    """Returns a copy of a model with peft's LoRA of random weights, and the deltas that peft computes."""
    torch.manual_seed(2)
    targets = ["to_k", "to_out.0", "proj_in", "conv1", "conv_in", "q_proj", "fc1"]
    settings = {"r": 4, "lora_alpha": 2, "target_modules": targets, **options}
    model = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings))
    deltas = {}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            nn.init.normal_(module.lora_B["default"].weight)
            deltas[name.removeprefix("base_model.model.")] = module.get_delta_weight("default").detach()
    return model, deltas


# settings by component, since peft warns of patterns that match nothing
PEFT_OPTIONS = {
    "plain": {},
    "rslora": {"unet": {"use_rslora": True}, "text_encoder": {"use_rslora": True}},
    "patterns": {
        "unet": {"rank_pattern": {"attn2.to_k": 2, "conv1": 3}, "alpha_pattern": {"attn2.to_out.0": 7}},
        "text_encoder": {"rank_pattern": {"fc1": 1}, "alpha_pattern": {r"^encoder.layers.1.*fc1": 3}},
    },
}


@pytest.mark.parametrize("case", PEFT_OPTIONS)
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
@pytest.mark.parametrize("file", ["", "adapter_model.safetensors"])
def test_folder_of_peft(tmp_path, request, case, component, file):
    model, expected = adapted(request.getfixturevalue(component), PEFT_OPTIONS[case].get(component, {}))
    model.save_pretrained(tmp_path)
    assert_dense(getattr(read_lora(tmp_path / file), component), expected)


@pytest.mark.parametrize("case", PEFT_OPTIONS)
@pytest.mark.parametrize("old_names", [False, True])
def test_file_that_diffusers_writes(tmp_path, unet, text_encoder, case, old_names):
    arguments, expected = {}, {}
    for component, model in (("unet", unet), ("text_encoder", text_encoder)):
        model, expected[component] = adapted(model, PEFT_OPTIONS[case].get(component, {}))
        weights = {k.removeprefix("base_model.model."): v for k, v in peft.get_peft_model_state_dict(model).items()}
        if old_names:
            weights = diffusers.utils.convert_state_dict_to_diffusers(weights)
        arguments[f"{component}_lora_layers"] = weights
        arguments[f"{component}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, **arguments)
    lora = read_lora(tmp_path)
    assert_dense(lora.unet, expected["unet"])
    assert_dense(lora.text_encoder, expected["text_encoder"])


def own_lora(unet, text_encoder):
    """A LoRA with different ranks and scales in its layers, convolutions and tokens."""
    changes = {"unet": {}, "text_encoder": {}}
    for component, model in (("unet", unet), ("text_encoder", text_encoder)):
        for index, (name, shape) in enumerate(layers_of(model).items()):
            down, up = random_factors({name: shape}, index, rank=1 + index % 3)[name]
            # outputs as large as inputs, else roundings grow from layer to layer
            down = down / down[0].numel() ** 0.5
            changes[component][name] = LowRank(down, up.flatten(1), (0.25, 0.1, 1.0, 0.7)[index % 4])
    return LoraWeights(**changes, tokens=tokens(), tokens_2={"<ai1>": torch.ones(1, 5)})


def merged(model, changes):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, change in changes.items():
            weight = model.get_submodule(name).weight
            weight += torch.einsum("or,r...->o...", change.scale * change.up, change.down)
    return model


def pipeline_of(unet, text_encoder):
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=copy.deepcopy(text_encoder),
        tokenizer=None,
        unet=copy.deepcopy(unet),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images(pipeline):
    with torch.no_grad():
        text = pipeline.text_encoder(torch.tensor([[0, 5, 17, 3, 49, 2]]))[0]
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    output = pipeline(
        prompt_embeds=text,
        negative_prompt_embeds=torch.zeros_like(text),
        latents=latents,
        num_inference_steps=2,
        output_type="latent",
    )
    return text, output.images


def test_diffusers_computes_the_same_from_our_file(tmp_path, unet, text_encoder):
    lora = own_lora(unet, text_encoder)
    write_lora(lora, tmp_path / "own.safetensors")
    ours = images(pipeline_of(merged(unet, lora.unet), merged(text_encoder, lora.text_encoder)))
    pipeline = pipeline_of(unet, text_encoder)
    base = images(pipeline)
    pipeline.load_lora_weights(tmp_path, weight_name="own.safetensors", local_files_only=True)
    theirs = images(pipeline)
    for mine, his, without in zip(ours, theirs, base, strict=True):
        assert (his - without).abs().max() > 0.1
        torch.testing.assert_close(his, mine, rtol=1e-4, atol=1e-4)
    layers = [m for m in pipeline.unet.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(layers) == len(lora.unet)


def test_second_text_encoder_in_diffusers(tmp_path):
    config = tiny_text_encoder().config
    encoder = transformers.CLIPTextModelWithProjection(config).eval()
    layers = {name.removeprefix("text_model."): shape for name, shape in layers_of(encoder).items()}
    changes = {name: LowRank(down, up, 0.3) for name, (down, up) in random_factors(layers).items() if "encoder" in name}
    lora = LoraWeights(text_encoder_2=changes)
    check_fits(lora, tiny_unet(), tiny_text_encoder(), encoder)
    write_lora(lora, tmp_path / "second.safetensors")
    weights, _, metadata = diffusers.StableDiffusionXLPipeline.lora_state_dict(
        str(tmp_path / "second.safetensors"), return_lora_metadata=True
    )
    assert "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight" in weights
    full_names = {
        name: changes[short] for name in layers_of(encoder) if (short := name.removeprefix("text_model.")) in changes
    }
    ids = torch.tensor([[0, 5, 17, 3, 49, 2]])
    with torch.no_grad():
        expected = merged(encoder, full_names)(ids).text_embeds
        diffusers.StableDiffusionXLPipeline.load_lora_into_text_encoder(
            weights, None, encoder, prefix="text_encoder_2", metadata=metadata
        )
        torch.testing.assert_close(encoder(ids).text_embeds, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip(tmp_path, unet, text_encoder, dtype):
    lora = own_lora(unet, text_encoder)
    halved = {n: LowRank(c.down.to(dtype), c.up.to(dtype), c.scale) for n, c in lora.unet.items()}
    lora = LoraWeights(halved, lora.text_encoder, tokens=lora.tokens, tokens_2=lora.tokens_2)
    write_lora(lora, tmp_path / "deep" / "own.safetensors")
    again = read_lora(tmp_path / "deep" / "own.safetensors")
    for component in ("unet", "text_encoder", "text_encoder_2"):
        before, after = getattr(lora, component), getattr(again, component)
        assert before.keys() == after.keys()
        for name, change in before.items():
            assert torch.equal(change.down, after[name].down)
            assert torch.equal(change.up, after[name].up)
            assert after[name].down.dtype == change.down.dtype
            assert after[name].scale == pytest.approx(change.scale, rel=1e-15)
    for kind in ("tokens", "tokens_2"):
        before, after = getattr(lora, kind), getattr(again, kind)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[token], after[token]) for token in before)


def test_failed_writing_leaves_the_older_file(tmp_path):
    path = tmp_path / "own.safetensors"
    write_lora(LoraWeights(tokens=tokens()), path)
    before = path.read_bytes()
    with pytest.raises(LoraFileError, match="nothing to write"):
        write_lora(LoraWeights(), path)
    broken = LoraWeights(unet={"conv_in": LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0)}, tokens={"<a>": None})
    with pytest.raises(AttributeError):
        write_lora(broken, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(LoraFileError, match=r"ends in .safetensors"):
        write_lora(LoraWeights(tokens=tokens()), tmp_path / "own.pth")


KEY = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
GOOD = {f"{KEY}.lora_A.weight": torch.ones(2, 4), f"{KEY}.lora_B.weight": torch.ones(6, 2)}
FLAT = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
BAD = {
    "up is missing": ({f"{KEY}.lora_A.weight": torch.ones(2, 4)}, "has no up factor"),
    "down is missing": ({f"{KEY}.lora_B.weight": torch.ones(6, 2)}, "has no down factor"),
    "alpha alone": (GOOD | {"lora_unet_conv_in.alpha": torch.ones(())}, "conv_in.alpha has no down factor"),
    "ranks": (GOOD | {f"{KEY}.lora_B.weight": torch.ones(6, 3)}, r"\(2, 4\).*\(6, 3\).*the rank"),
    "rank 0": ({f"{KEY}.lora_A.weight": torch.ones(0, 4), f"{KEY}.lora_B.weight": torch.ones(6, 0)}, "the rank"),
    "nan": (GOOD | {f"{KEY}.lora_A.weight": torch.full((2, 4), torch.nan)}, "lora_A.weight has values that are not"),
    "inf": (GOOD | {f"{KEY}.lora_B.weight": torch.full((6, 2), torch.inf)}, "lora_B.weight has values that are not"),
    "inf alpha": (GOOD | {f"{KEY}.alpha": torch.tensor(torch.inf)}, "alpha has values that are not finite"),
    "two alphas": (GOOD | {f"{KEY}.alpha": torch.ones(2)}, "not one number"),
    "kernel of up": (GOOD | {f"{KEY}.lora_B.weight": torch.ones(6, 2, 3, 3)}, r"\(6, 2, 3, 3\); .* first factor"),
    "axes": (GOOD | {f"{KEY}.lora_A.weight": torch.ones(2, 4, 3)}, r"\(2, 4, 3\).*2D convolutions"),
    "third factor": (
        {
            "lora_unet_conv_in.lora_down.weight": torch.ones(2, 4, 1, 1),
            "lora_unet_conv_in.lora_mid.weight": torch.ones(2, 2, 3, 3),
            "lora_unet_conv_in.lora_up.weight": torch.ones(8, 2, 1, 1),
        },
        "conv_in.lora_mid.weight is a third factor .Tucker",
    ),
    "not a layer of SDXL": ({"lora_unet_output_blocks_2_2_proj.lora_down.weight": torch.ones(2, 4)}, "other arch"),
    "integers": (GOOD | {f"{KEY}.lora_A.weight": torch.ones(2, 4, dtype=torch.int8)}, "torch.int8.*floating point"),
    "unknown key": (GOOD | {"something": torch.ones(1)}, r"key something \(1 such\)"),
    "other architecture": (
        {"transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight": torch.ones(2, 4)},
        "other architectures are not read",
    ),
    "kohya of flux": ({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.ones(2, 4)}, "other arch"),
    "loha": ({f"{FLAT}.hada_w1_a": torch.ones(2, 4)}, "LoHa"),
    "dora": (GOOD | {f"{KEY}.lora_magnitude_vector": torch.ones(6)}, "DoRA"),
    "twice": (
        GOOD | {f"{FLAT}.lora_down.weight": torch.ones(2, 4), f"{FLAT}.lora_up.weight": torch.ones(6, 2)},
        "for the same layer",
    ),
    "whole model": ({"conv_in.weight": torch.ones(4, 4, 3, 3), "alphas": torch.ones(3)}, "conv_in.weight is a whole"),
    "empty": ({}, "holds no tensors"),
    "complex alpha": (GOOD | {f"{KEY}.alpha": torch.tensor(2 + 1j)}, "type torch.complex64, not one number"),
    "token without a name": (GOOD | {"lora_tokens.": torch.ones(2)}, "of a token with a name"),
    "token shape": (GOOD | {"lora_tokens.<a>": torch.ones(1, 2, 3)}, "embeddings are"),
    "token nan": (GOOD | {"lora_tokens.<a>": torch.full((2,), torch.nan)}, "<a> has values that are not finite"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_bad_files(tmp_path, case, suffix):
    content, message = BAD[case]
    path = tmp_path / f"bad{suffix}"
    if suffix == ".pth":
        torch.save(content, path)
    else:
        save_file(content, path)
    with pytest.raises(LoraFileError, match=message) as error:
        read_lora(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(2, 4).to_sparse(), torch.ones(2, 4, device="meta"), torch.ones(1).expand(2, 10**13)],
    ids=["sparse", "meta", "view"],
)
def test_pickled_tensors_that_the_file_does_not_hold(tmp_path, tensor):
    torch.save(GOOD | {f"{KEY}.lora_A.weight": tensor}, tmp_path / "bad.pth")
    with pytest.raises(LoraFileError, match=r"bad\.pth: .*lora_A\.weight is sparse, or a view of fewer numbers"):
        read_lora(tmp_path / "bad.pth")


def test_settings_nested_without_end(tmp_path):
    save_file(GOOD, tmp_path / "x.safetensors", {"lora_adapter_metadata": "[" * 10**5})
    with pytest.raises(LoraFileError, match="metadata lora_adapter_metadata is not valid JSON"):
        read_lora(tmp_path / "x.safetensors")


def test_merged_model_of_mix_of_show(tmp_path, unet, text_encoder):
    content = {
        "new_concept_embedding": tokens(),
        "unet": unet.state_dict(),
        "text_encoder": text_encoder.state_dict(),
    }
    torch.save({"params": content}, tmp_path / "combined_model_.pth")
    with pytest.raises(LoraFileError, match=r"is a whole weight.*combined_model"):
        read_lora(tmp_path / "combined_model_.pth")


class Malicious:
    ran = False

    def __reduce__(self):
        return (setattr, (Malicious, "ran", True))


def test_files_that_hold_code_are_not_run(tmp_path):
    for name, save in (
        ("code.pth", torch.save),
        ("code.ckpt", lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))),
    ):
        save({**GOOD, "x": Malicious()}, tmp_path / name)
        with pytest.raises(LoraFileError, match=f"{name}.*can run code"):
            read_lora(tmp_path / name)
    assert not Malicious.ran


@pytest.mark.parametrize("name", ["bad.safetensors", "bad.pth"])
@pytest.mark.parametrize("cut", [0, 1, 9, 100, 300, -20])
def test_truncated_files(tmp_path, name, cut):
    path = tmp_path / name
    torch.save(GOOD, path) if name.endswith("pth") else save_file(GOOD, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(LoraFileError, match=f"{name} is damaged"):
        read_lora(path)


def test_paths_that_hold_no_lora(tmp_path):
    with pytest.raises(LoraFileError, match=r"none.safetensors does not exist"):
        read_lora(tmp_path / "none.safetensors")
    with pytest.raises(LoraFileError, match=r"is a folder without adapter_model.safetensors"):
        read_lora(tmp_path)
    (tmp_path / "cat.png").write_bytes(b"1")
    with pytest.raises(LoraFileError, match=r"'.png' are not read"):
        read_lora(tmp_path / "cat.png")
    torch.save([1.0], tmp_path / "list.pth")
    with pytest.raises(LoraFileError, match="holds a list"):
        read_lora(tmp_path / "list.pth")
    torch.save(GOOD | {1: "text"}, tmp_path / "text.pth")
    with pytest.raises(LoraFileError, match="1 is a str, not a tensor"):
        read_lora(tmp_path / "text.pth")


BAD_SETTINGS = {
    '{"peft_type": "LORA", "r": 5, "lora_alpha": 2}': "says rank 5 .* has rank 2",
    '{"r": 2, "lora_alpha": 2, "use_dora": true}': "use_dora=True",
    '{"r": 2, "lora_alpha": 2, "init_lora_weights": "pissa"}': "changed the base weights",
    '{"lora_alpha": 2}': "key 'r' is missing",
    '{"r": 2': "not valid JSON",
    "[1]": "holds a list",
}


@pytest.mark.parametrize("text", BAD_SETTINGS)
def test_bad_settings(tmp_path, text):
    save_file(GOOD, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(LoraFileError, match=BAD_SETTINGS[text]):
        read_lora(tmp_path)
    if text.startswith('{"') and text.endswith("}"):
        inside = json.dumps({f"unet.{key}": value for key, value in json.loads(text).items()})
        save_file(GOOD, tmp_path / "inside.safetensors", {"lora_adapter_metadata": inside})
        with pytest.raises(LoraFileError, match=BAD_SETTINGS[text]):
            read_lora(tmp_path / "inside.safetensors")


def test_alpha_in_the_file_comes_first(tmp_path):
    save_file(GOOD | {f"{KEY}.alpha": torch.tensor(3)}, tmp_path / "a.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 8}')
    assert read_lora(tmp_path / "a.safetensors").unet[KEY.removeprefix("unet.")].scale == 1.5
    save_file(GOOD, tmp_path / "b.safetensors")
    assert read_lora(tmp_path / "b.safetensors").unet[KEY.removeprefix("unet.")].scale == 4.0


def test_lora_of_another_base(unet, text_encoder):
    lora = own_lora(unet, text_encoder)
    fitting = LoraWeights(lora.unet, lora.text_encoder, tokens=lora.tokens)
    check_fits(fitting, unet, text_encoder)
    check_fits(fitting, pipeline_of(unet, text_encoder).unet.half(), text_encoder)
    with pytest.raises(LoraFileError, match=r"token <ai1> has embeddings of width 5.*None"):
        check_fits(lora, unet, text_encoder)
    shapes = {
        ("unet", "down_blocks.3.attentions.0.proj_in"): (8, 8, r"proj_in of unet with shape \(8, 8\).*no such layer"),
        ("unet", "conv_in"): (8, 4, r"conv_in of unet with shape \(8, 4\).*one of shape \(8, 4, 3, 3\)"),
        ("unet", "conv_norm_out"): (8, 8, r"conv_norm_out of unet with shape \(8, 8\).*one of shape \(8,\)"),
        ("text_encoder", "encoder.layers.0.self_attn.k_proj"): (16, 12, r"\(16, 12\).*one of shape \(16, 16\)"),
    }
    for (component, name), (outputs, inputs, message) in shapes.items():
        other = LoraWeights(**{component: {name: LowRank(torch.ones(1, inputs), torch.ones(outputs, 1), 1.0)}})
        with pytest.raises(LoraFileError, match=message):
            check_fits(other, unet, text_encoder)
    kernel = LoraWeights(unet={"conv_in": LowRank(torch.ones(1, 4, 5, 5), torch.ones(8, 1), 1.0)})
    with pytest.raises(LoraFileError, match=r"conv_in of unet with shape \(8, 4, 5, 5\), .* \(8, 4, 3, 3\)"):
        check_fits(kernel, unet, text_encoder)
    # files of other libraries have no kernel for a convolution of one position, or one for a linear layer
    projection, linear = "down_blocks.0.attentions.0.proj_in", "mid_block.resnets.0.time_emb_proj"
    single = {projection: lora.unet[projection], linear: lora.unet[linear]}
    single[projection] = replace(single[projection], down=single[projection].down.flatten(1))
    single[linear] = replace(single[linear], down=single[linear].down[..., None, None])
    check_fits(LoraWeights(single), unet, text_encoder)
    with pytest.raises(LoraFileError, match="text_encoder_2, which this base does not have"):
        check_fits(LoraWeights(text_encoder_2=lora.text_encoder), unet, text_encoder)
    with pytest.raises(LoraFileError, match="3 layers, this UNet has 4 cross-attention"):
        check_fits(LoraWeights(tokens={"<a>": torch.ones(3, WIDTH)}), unet, text_encoder)
