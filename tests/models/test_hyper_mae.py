"""Hyper-MAE: what is hidden, what counts, and that the decoder knows what it is asked for."""

import pytest
import torch

from vision_lowrank.errors import ConfigError
from vision_lowrank.models import HyperMAE, LessViT
from vision_lowrank.models.hyper_mae import Noise
from vision_lowrank.models.less_vit import assemble

WAVELENGTHS = torch.tensor([443.0, 560.0, 665.0, 842.0, 1610.0, 2190.0])
RADAR = torch.tensor([5500.0, 5700.0])


def tiny(embedding="sincos", **options):
    torch.manual_seed(0)
    encoder = LessViT(patch_size=4, embed_dim=48, depth=2, num_heads=3, embedding=embedding).double()
    settings = {"decoder_dim": 32, "decoder_depth": 2, "decoder_heads": 2, "channel_mask_ratio": 0.5}
    return HyperMAE(encoder, **(settings | options)).double().eval()


def make(model, batch=2, size=16, present=None, radar=False):
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(batch, 6, size, size, dtype=torch.float64, generator=generator)
    if not radar:
        return model.encoder.patches(image, WAVELENGTHS, 10.0, present=present)
    other = torch.randn(batch, 2, size, size, dtype=torch.float64, generator=generator)
    return model.encoder.patches(image, WAVELENGTHS, 10.0, other, RADAR)


def test_the_smallest_noise_is_kept_sample_by_sample():
    model = tiny()
    patches = make(model)
    noise = model.draw_noise(patches, "multi", torch.Generator().manual_seed(3))
    again = model.draw_noise(patches, "multi", torch.Generator().manual_seed(3))
    assert torch.equal(noise.channels, again.channels)
    result = model.reconstruct(patches, "multi", noise)
    for b in range(2):
        kept = set(noise.channels[b].argsort()[:3].tolist())
        assert set(torch.nonzero(~result.hidden_channels[b]).flatten().tolist()) == kept
        kept = set(noise.positions[b].argsort()[:4].tolist())
        assert set(torch.nonzero(~result.hidden_positions[b]).flatten().tolist()) == kept
    assert not torch.equal(result.hidden_positions[0], result.hidden_positions[1])


def test_what_is_hidden_has_no_influence():
    model = tiny()
    patches = make(model)
    noise = model.draw_noise(patches, "multi", torch.Generator().manual_seed(3))
    before = model.reconstruct(patches, "multi", noise)
    hidden = before.hidden_channels[:, :, None, None] | before.hidden_positions[:, None, :, None]
    patches.pixels[hidden.expand_as(patches.pixels)] = 77
    assert torch.equal(model.reconstruct(patches, "multi", noise).prediction, before.prediction)


@pytest.mark.parametrize("normalise", [True, False])
def test_loss_is_the_mean_over_what_is_hidden_and_valid(normalise):
    model = tiny(normalise_targets=normalise, variance_floor=0.01)
    patches = make(model)
    valid = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(5)) > 0.3
    valid[0, 3] = False
    result = model.reconstruct(patches, "multi", model.draw_noise(patches, "multi"), valid)
    sums, counts = {"position": 0.0, "channel": 0.0}, {"position": 0, "channel": 0}
    for b in range(2):
        for c in range(6):
            for n in range(16):
                pixels, seen = patches.pixels[b, c, n], valid[b, n]
                target = pixels
                if normalise and seen.any():
                    some = pixels[seen]
                    variance = some.var() if len(some) > 1 else torch.tensor(0.0)
                    target = (pixels - some.mean()) / (variance + 0.01).sqrt()
                error = (result.prediction[b, c, n] - target).square()[seen]
                for kind, hidden in (
                    ("position", result.hidden_positions[b, n]),
                    ("channel", result.hidden_channels[b, c]),
                ):
                    if hidden:
                        sums[kind] += float(error.sum())
                        counts[kind] += int(seen.sum())
    assert float(result.position_loss) == pytest.approx(sums["position"] / counts["position"])
    assert float(result.channel_loss) == pytest.approx(sums["channel"] / counts["channel"])
    assert float(result.loss) == pytest.approx(float(result.position_loss + result.channel_loss))


def test_values_without_meaning_cannot_reach_the_loss():
    model = tiny(variance_floor=0.01)
    patches = make(model)
    valid = torch.ones(2, 16, 16, dtype=torch.bool)
    valid[:, 5] = False
    noise = Noise(torch.arange(6.0).repeat(2, 1), torch.arange(16.0).roll(8).repeat(2, 1))
    before = model.reconstruct(patches, "multi", noise, valid).loss
    patches.pixels[:, :, 5] = 1e6
    after = model.reconstruct(patches, "multi", noise, valid)
    assert bool(after.hidden_positions[0, 5])
    assert torch.equal(after.loss, before)
    # a flat patch does not blow up
    patches.pixels[:] = 3.0
    assert model.reconstruct(patches, "multi", noise, valid).loss < 10


def test_padding_channels_are_never_kept_and_never_count():
    model = tiny()
    present = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    patches = make(model, present=present)
    noise = Noise(torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.9, 0.8, 0.7, 0.6, 0.0, 0.0]]), torch.rand(2, 16))
    result = model.reconstruct(patches, "multi", noise)
    assert torch.nonzero(~result.hidden_channels[1]).flatten().tolist() == [1, 2, 3]
    patches.pixels[1, 4:] = 1e6
    assert torch.equal(model.reconstruct(patches, "multi", noise).loss, result.loss)
    # a sample with fewer channels than would be kept has all of them kept, and the others as many
    few = make(model, present=torch.tensor([[True] * 6, [True, False, False, False, True, False]]))
    hidden = model.reconstruct(few, "multi", noise).hidden_channels
    assert [torch.nonzero(~row).flatten().tolist() for row in hidden] == [[0, 1], [0, 4]]


def test_a_pass_over_radar_hides_none_of_it():
    model = tiny()
    patches = make(model, radar=True)
    result = model.reconstruct(patches, "radar", model.draw_noise(patches, "radar"))
    assert result.hidden_channels.tolist() == [[True] * 6 + [False] * 2] * 2


def test_the_decoder_gets_what_was_seen_and_a_token_for_each_way_of_being_hidden():
    # rotations leave the tokens as they are
    model = tiny("rope", decoder_channel_dim_per_head=4)
    patches = make(model)
    received = []
    model.decoder_blocks[0].register_forward_pre_hook(lambda module, args: received.append(args[0]))
    noise = model.draw_noise(patches, "multi", torch.Generator().manual_seed(3))
    result = model.reconstruct(patches, "multi", noise)
    for b in range(2):
        rows = [0, *(1 + torch.nonzero(~result.hidden_channels[b]).flatten()).tolist()]
        columns = [0, *(1 + torch.nonzero(~result.hidden_positions[b]).flatten()).tolist()]
        channels, positions = (torch.tensor([[one - 1 for one in kept[1:]]]) for kept in (rows, columns))
        alone = model.encoder.patches(patches_image(patches)[b : b + 1], WAVELENGTHS, 10.0)
        seen = model.decoder_embed(model.encoder.encode(alone, channels, positions))[0]
        for i in range(7):
            for j in range(17):
                if i in rows and j in columns:
                    expected = seen[rows.index(i), columns.index(j)]
                elif i == 0:
                    expected = model.decoder_channel_mask_token
                else:
                    expected = model.decoder_spatial_mask_token if j == 0 else model.decoder_mask_token
                torch.testing.assert_close(received[0][b, i, j], expected)


def patches_image(patches):
    return assemble(patches.pixels, 4)


def test_modalities_weigh_alike_and_an_unseen_one_is_all_hidden():
    model = tiny(normalise_targets=False)
    patches = make(model, radar=True)
    result = model.reconstruct(patches, "optical", model.draw_noise(patches, "optical"))
    assert result.hidden_channels[:, 6:].all()
    assert result.hidden_channels[:, :6].sum(1).tolist() == [3, 3]
    error = (result.prediction - patches.pixels).square().mean(-1)
    parts = [error[:, part].mean(1)[result.hidden_positions].mean() for part in (slice(0, 6), slice(6, 8))]
    torch.testing.assert_close(result.position_loss, torch.stack(parts).mean(), check_dtype=False)
    hidden = result.hidden_channels
    parts = [error.mean(2)[:, part][hidden[:, part]].mean() for part in (slice(0, 6), slice(6, 8))]
    torch.testing.assert_close(result.channel_loss, torch.stack(parts).mean(), check_dtype=False)
    with pytest.raises(ConfigError, match="the images have none"):
        model.draw_noise(make(model), "radar")


@pytest.mark.parametrize("embedding", ["sincos", "rope"])
def test_the_decoder_knows_place_and_wavelength(embedding):
    # the original's decoder predicts the same for all masked positions of a channel, and for all masked channels
    model = tiny(embedding)
    patches = make(model)
    noise = model.draw_noise(patches, "multi", torch.Generator().manual_seed(3))
    result = model.reconstruct(patches, "multi", noise)
    for b in range(2):
        shown = int(torch.nonzero(~result.hidden_channels[b])[0])
        places = torch.nonzero(result.hidden_positions[b]).flatten()
        assert (result.prediction[b, shown, places[0]] - result.prediction[b, shown, places[1]]).abs().max() > 1e-12
        channels = torch.nonzero(result.hidden_channels[b]).flatten()
        place = int(torch.nonzero(~result.hidden_positions[b])[0])
        assert (result.prediction[b, channels[0], place] - result.prediction[b, channels[1], place]).abs().max() > 1e-12


def test_hidden_tokens_start_from_an_interpolation_of_those_seen():
    model = tiny(interpolation_rank=3)
    patches = make(model, radar=True)
    noise = model.draw_noise(patches, "multi", torch.Generator().manual_seed(3))
    given = []
    model.decoder_blocks[0].register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    result = model.reconstruct(patches, "multi", noise)
    channels, positions = (
        torch.stack([torch.nonzero(~row).flatten() for row in hidden])
        for hidden in (result.hidden_channels, result.hidden_positions)
    )
    tokens = model.decoder_embed(model.encoder.encode(patches, channels, positions))
    added = model.interpolation(tokens, patches.coordinates, patches.coordinates.keep(channels, positions))
    model.interpolation = None
    model.reconstruct(patches, "multi", noise)
    for b in range(2):
        rows, columns = (torch.cat([torch.zeros(1, dtype=int), index[b] + 1]) for index in (channels, positions))
        added[b, rows[:, None], columns] = 0
    torch.testing.assert_close(given[0], given[1] + added)


def test_patches_go_back_to_their_image():
    model = tiny()
    image = torch.randn(2, 6, 8, 12, dtype=torch.float64)
    patches = model.encoder.patches(image, WAVELENGTHS, 10.0)
    assert torch.equal(assemble(patches.pixels, patches.rows), image)


def test_masks_that_leave_nothing_and_ranks_of_nothing_are_refused():
    model = tiny(mask_ratio=0.95)
    patches = make(model)
    with pytest.raises(ConfigError, match="leave 0 of 16 positions and 3 of 6 channels visible"):
        model.reconstruct(patches, "multi", model.draw_noise(patches, "multi"))
    with pytest.raises(ConfigError, match="mask_ratio is 1"):
        tiny(mask_ratio=1)
    with pytest.raises(ConfigError, match="interpolation_rank is 0; give at least 1, or null"):
        tiny(interpolation_rank=0)
    # the root of a negative variance
    with pytest.raises(ConfigError, match="variance_floor is -1; give at least 0"):
        tiny(variance_floor=-1)
    with pytest.raises(ConfigError, match="decoder_depth is -2; give at least 0"):
        tiny(decoder_depth=-2)


@pytest.mark.parametrize(
    ("embedding", "options", "message"),
    [
        ("rope", {"decoder_dim": 64, "decoder_heads": 16},
         "embedding=rope .* here 4 and 1: change decoder_channel_dim_per_head$"),
        ("rope", {"decoder_dim": 48, "decoder_heads": 4, "decoder_channel_dim_per_head": 3},
         "embedding=rope .* here 3 and 4: change decoder_channel_dim_per_head$"),
        ("sincos", {"decoder_dim": 126, "decoder_heads": 6, "decoder_channel_dim_per_head": 3},
         "^decoder_dim is 126; embedding=sincos needs a multiple of 4$"),
    ],
)  # fmt: skip
def test_widths_of_the_decoder_that_its_embedding_cannot_have(embedding, options, message):
    with pytest.raises(ConfigError, match=message):
        tiny(embedding, **options)
    if embedding == "rope":
        # without places there is nothing to turn
        model = tiny(embedding, decoder_rotation=False, **options)
        patches = make(model)
        assert model.reconstruct(patches, "optical", model.draw_noise(patches, "optical")).loss.isfinite()
