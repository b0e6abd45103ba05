"""Prompts against diffusers' own encoding, with LoRAs merged into copies and tokens added to the vocabulary."""

import copy
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from composer_zoo import make_encoder, make_tokenizer
from torch import nn

from vision_lowrank.composer.lora_files import LoraWeights, LowRank
from vision_lowrank.composer.text import encode
from vision_lowrank.errors import ConfigError

WIDTH, SECOND_WIDTH = 16, 24


def make_pipeline(xl):
    tokenizer = make_tokenizer()
    parts = {
        "vae": None, "unet": None, "scheduler": diffusers.DDIMScheduler(), "tokenizer": tokenizer,
        "text_encoder": make_encoder(tokenizer, WIDTH, transformers.CLIPTextModel),
    }  # fmt: skip
    if xl:
        second = make_tokenizer()
        second.pad_token = "!"
        parts |= {
            "tokenizer_2": second,
            "text_encoder_2": make_encoder(second, SECOND_WIDTH, transformers.CLIPTextModelWithProjection),
        }
        return diffusers.StableDiffusionXLPipeline(**parts)
    return diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


@pytest.fixture(params=[False, True], ids=["sd", "xl"])
def pipeline(request):
    return make_pipeline(request.param)


def hooks(pipeline):
    """Number of hooks on layers and embeddings; transformers itself keeps some on whole blocks."""
    model = pipeline.text_encoder
    return sum(
        len(module._forward_hooks) for module in model.modules() if isinstance(module, (nn.Linear, nn.Embedding))
    )


def make_lora(seed, rows=1, token="<ai1>", second=True):
    """A LoRA of a query projection and a feed-forward layer in each encoder, with one token."""
    generator = torch.Generator().manual_seed(seed)

    def factors(width, out):
        return LowRank(
            torch.randn(2, width, generator=generator), torch.randn(out, 2, generator=generator) * 0.1, scale=0.7
        )

    changes = [
        {"encoder.layers.0.self_attn.q_proj": factors(width, width), "encoder.layers.1.mlp.fc1": factors(width, 32)}
        for width in (WIDTH, SECOND_WIDTH)
    ]
    tokens = [{token: torch.randn(rows, width, generator=generator)} for width in (WIDTH, SECOND_WIDTH)]
    if not second:
        return LoraWeights(text_encoder=changes[0], tokens=tokens[0])
    return LoraWeights(text_encoder=changes[0], text_encoder_2=changes[1], tokens=tokens[0], tokens_2=tokens[1])


def merged(pipeline, loras, row=0):
    """A copy of a pipeline with LoRAs in its weights and tokens in its vocabularies."""
    result = copy.deepcopy(pipeline)
    for suffix in ("", "_2"):
        model = getattr(result, f"text_encoder{suffix}", None)
        if model is None:
            continue
        tokenizer = getattr(result, f"tokenizer{suffix}")
        for lora, strength in loras:
            for name, change in getattr(lora, f"text_encoder{suffix}").items():
                layer = dict(model.named_modules())[f"text_model.{name}" if suffix else name]
                layer.weight.data += strength * change.scale * change.up @ change.down
            for token, embedding in getattr(lora, f"tokens{suffix}").items():
                tokenizer.add_tokens(token)
                model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
                index = tokenizer.convert_tokens_to_ids(token)
                model.get_input_embeddings().weight.data[index] = embedding[row if len(embedding) > 1 else 0]
    return result


def expected(pipeline, prompt, negative):
    with torch.no_grad():
        out = pipeline.encode_prompt(
            prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt=negative
        )
    return out[0], out[1], torch.cat([out[3], out[2]]) if len(out) == 4 else None


def assert_same(found, positive, negative, pooled):
    torch.testing.assert_close(found.text.positive, positive)
    torch.testing.assert_close(found.text.negative, negative)
    if pooled is None:
        assert found.pooled is None
    else:
        torch.testing.assert_close(found.pooled, pooled)


def test_a_token_that_begins_another_is_not_read_in_it(pipeline):
    short, long = make_lora(1, token="sks"), make_lora(2, token="sksdog")
    loras = [(short, 1.0), (long, 1.0)]
    both = encode(pipeline, "a sksdog on sks", None, loras)
    assert both.tokens == [2, 4]
    # the tokenizer that knows both as words takes the longer one, too
    assert_same(both, *expected(merged(pipeline, loras), "a sksdog on sks", None))


@pytest.mark.parametrize("negative", [None, "", "bad, dog"])
def test_without_loras_it_is_the_pipelines_own_text(pipeline, negative):
    found = encode(pipeline, "a cat on a mat", negative)
    assert_same(found, *expected(pipeline, "a cat on a mat", negative))
    assert found.tokens == []


def test_loras_and_tokens_are_those_of_merged_weights(pipeline):
    before = copy.deepcopy(pipeline.text_encoder.state_dict())
    loras = [(make_lora(1), 1.0), (make_lora(2, token="<bo>"), 0.3)]
    prompt = "a <ai1> cat<bo>, on a mat"
    reference = merged(pipeline, loras)
    found = encode(pipeline, prompt, "bad", loras)
    assert_same(found, *expected(reference, prompt, "bad"))
    assert not torch.allclose(
        found.text.positive, encode(pipeline, prompt, "bad", [(lora, 0) for lora, _ in loras]).text.positive
    )
    # the encoders are left as they were
    assert all(torch.equal(value, before[name]) for name, value in pipeline.text_encoder.state_dict().items())
    assert hooks(pipeline) == 0
    ids = reference.tokenizer(prompt).input_ids
    wanted = [reference.tokenizer.convert_tokens_to_ids(token) for token in ("<ai1>", "<bo>")]
    assert found.tokens == [ids.index(index) for index in wanted]


def test_tokens_with_an_embedding_for_each_layer_are_so_many_passes(pipeline):
    loras = [(make_lora(1, rows=5), 1.0), (make_lora(2, token="<bo>"), 1.0)]
    found = encode(pipeline, "a <ai1><bo> on a mat", None, loras)
    assert len(found.text.positive) == 5
    for row in range(5):
        positive, negative, _ = expected(merged(pipeline, loras, row), "a <ai1><bo> on a mat", None)
        torch.testing.assert_close(found.text.positive[row : row + 1], positive)
    torch.testing.assert_close(found.text.negative, negative)


@pytest.mark.parametrize(
    ("subject", "tokens"),
    # c-at is one piece, "on" another; every occurrence counts
    [("cat", [2, 5]), ("cat on", [2, 3]), ("<ai1>", [6]), ("cat <ai1>", [5, 6]), (None, [6])],
)
def test_subjects_are_found_by_token(pipeline, subject, tokens):
    found = encode(pipeline, "a cat on a cat <ai1>", None, [(make_lora(1), 1.0)], subject)
    assert found.tokens == tokens


@pytest.mark.parametrize(
    ("prompt", "subject", "message"),
    [
        ("a <ai2> cat", None, "token <ai2> is in no LoRA given for it .their tokens: <ai1>"),
        ("a cat", "dog", "subject 'dog' is not in the prompt"),
        ("a cat", " ", "subject ' ' is not in the prompt"),
        ("a " * 19, None, "has 19 tokens; the text encoder takes 18"),
    ],
)
def test_wrong_prompts(pipeline, prompt, subject, message):
    with pytest.raises(ConfigError, match=message):
        encode(pipeline, prompt, None, [(make_lora(1), 1.0)], subject)


def test_a_token_that_two_loras_mean_differently(pipeline):
    one, other = (replace(make_lora(seed), files=(Path(f"{seed}.safetensors"),)) for seed in (1, 2))
    message = "token <ai1> is in 1.safetensors and 2.safetensors with other embeddings; give it one"
    for prompt, subject in (("a <ai1> cat", None), ("a cat", "<ai1>")):
        with pytest.raises(ConfigError, match=message):
            encode(pipeline, prompt, None, [(one, 1.0), (other, 1.0)], subject)
    # what is not named does no harm, nor does the same embedding twice
    encode(pipeline, "a cat", None, [(one, 1.0), (other, 1.0)])
    alike = replace(other, tokens=one.tokens, tokens_2=one.tokens_2)
    found = encode(pipeline, "a <ai1> cat", None, [(one, 1.0), (alike, 0.0)])
    assert torch.equal(found.text.positive, encode(pipeline, "a <ai1> cat", None, [(one, 1.0)]).text.positive)


def test_a_token_for_one_encoder_only_is_unknown_to_the_other():
    with pytest.raises(ConfigError, match="token <ai1> is in no LoRA"):
        encode(make_pipeline(xl=True), "a <ai1>", None, [(make_lora(1, second=False), 1.0)])


def test_hooks_go_after_an_error(pipeline, monkeypatch):
    monkeypatch.setattr(type(pipeline.text_encoder.final_layer_norm), "forward", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode(pipeline, "a <ai1>", None, [(make_lora(1), 1.0)])
    assert hooks(pipeline) == 0
