"""Properties that hold for any size: splits, patches, tiles, windows, patches of tokens, masks."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vision_lowrank.data.augmentation import SYMMETRIES, apply_symmetries
from vision_lowrank.data.patches import EpochShuffle, PatchDataset, allocate_cube, gather_windows, reflect_border
from vision_lowrank.data.scene import IGNORE
from vision_lowrank.data.splits import Split, block_split, file_split, random_split
from vision_lowrank.data.tile_module import MixedBatches
from vision_lowrank.data.tiles import SceneTiles
from vision_lowrank.data.windows import SceneWindowModule
from vision_lowrank.errors import ConfigError, SplitError
from vision_lowrank.models.hyper_mae import HyperMAE
from vision_lowrank.models.less_vit import LessViT, assemble

few = settings(max_examples=25, deadline=None)


@st.composite
def label_maps(draw):
    """Maps of three classes and unlabelled pixels, int64."""
    height, width = draw(st.integers(8, 20)), draw(st.integers(8, 20))
    generator = np.random.default_rng(draw(st.integers(0, 9999)))
    shares = generator.dirichlet([1, 1, 1, 1])
    return generator.choice([IGNORE, 0, 1, 2], (height, width), p=shares)


@few
@given(labels=label_maps(), seed=st.integers(0, 99), train=st.floats(0.05, 0.5), validation=st.floats(0.05, 0.4))
def test_a_split_is_a_partition_and_comes_back_from_its_file(tmp_path_factory, labels, seed, train, validation):
    try:
        split = random_split(labels, 3, train, validation, seed=seed)
    except SplitError:
        return
    split.check(labels)
    pixels = np.concatenate([split.train, split.validation, split.test])
    assert np.array_equal(np.sort(pixels), np.flatnonzero(labels != IGNORE))
    path = tmp_path_factory.mktemp("split") / "split.npz"
    split.save(path)
    assert Split.load(path).digest() == split.digest()
    assert random_split(labels, 3, train, validation, seed=seed).digest() == split.digest()


@few
@given(labels=label_maps(), seed=st.integers(0, 99), block=st.integers(2, 6), guard=st.integers(0, 4))
def test_blocks_never_touch(labels, seed, block, guard):
    try:
        split = block_split(
            labels, 3, guard, seed, block, train_pixels=20, validation_pixels=8, shared_classes=1,
            validation_classes=1, test_pixels=5,
        )  # fmt: skip
    except SplitError:
        assume(False)
    split.check(labels)
    for first, second in itertools.combinations(split.subsets().values(), 2):
        a, b = (np.stack(np.divmod(part, labels.shape[1]), axis=1) for part in (first, second))
        distance = np.abs(a[:, None] - b[None]).max(axis=2).min()
        assert distance > guard


@few
@given(labels=label_maps(), seed=st.integers(0, 99))
def test_published_training_pixels_are_kept_and_the_rest_tested(labels, seed):
    generator = np.random.default_rng(seed)
    published = np.where(generator.random(labels.shape) < 0.4, labels, IGNORE)
    try:
        split = file_split(labels, published, None, 0.3, seed, "published.mat")
    except SplitError:
        return
    given_pixels = np.flatnonzero(published != IGNORE)
    assert np.array_equal(np.sort(np.concatenate([split.train, split.validation])), given_pixels)
    assert np.array_equal(split.test, np.flatnonzero((labels != IGNORE) & (published == IGNORE)))


@few
@given(
    height=st.integers(3, 12), width=st.integers(3, 12), channels=st.integers(1, 4), radius=st.integers(0, 3),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_a_patch_is_a_window_of_the_mirrored_image(height, width, channels, radius, seed):
    size = 2 * radius + 1
    assume(size <= min(height, width))
    image = np.random.default_rng(seed).normal(size=(channels, height, width)).astype(np.float32)
    cube, inside = allocate_cube(channels, height, width, size)
    inside[:] = image
    dataset = PatchDataset(reflect_border(cube, size), size, np.arange(height * width))
    padded = np.pad(image, ((0, 0), (radius, radius), (radius, radius)), mode="reflect")
    patches = dataset.__getitems__(range(height * width))["image"].numpy()
    for pixel in np.random.default_rng(seed).integers(0, height * width, 5):
        row, column = divmod(int(pixel), width)
        assert np.array_equal(patches[pixel], padded[:, row : row + size, column : column + size])


@few
@given(length=st.integers(1, 40), seed=st.integers(0, 9), epochs=st.integers(1, 3))
def test_an_epoch_meets_every_sample_once(length, seed, epochs):
    sampler = EpochShuffle(length, seed)
    orders = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(length))
        sampler.set_epoch(epoch)
        assert list(sampler) == orders[-1]


@few
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4), size=st.integers(1, 6), processes=st.integers(1, 3),
    seed=st.integers(0, 9), epoch=st.integers(0, 5),
)  # fmt: skip
def test_processes_share_the_batches_of_an_epoch(lengths, size, processes, seed, epoch):
    try:
        samplers = [MixedBatches(lengths, size, seed, rank, processes) for rank in range(processes)]
    except ConfigError:
        assume(False)
    shares = []
    for sampler in samplers:
        sampler.set_epoch(epoch)
        shares.append(list(sampler))
    assert len({len(share) for share in shares}) == 1
    places = [place for share in shares for batch in share for place in batch]
    assert len(set(places)) == len(places)
    for batch in itertools.chain(*shares):
        (source,) = {number for number, _ in batch}
        whole = min(size, lengths[source])
        assert whole // processes <= len(batch) <= -(-whole // processes)
        assert all(0 <= position < lengths[source] for _, position in batch)


@few
@given(
    size=st.integers(1, 6), ratio=st.integers(1, 4), stride=st.integers(1, 6), seed=st.integers(0, 99),
    validation=st.sampled_from([0, 0.2, 0.4]), test=st.sampled_from([0, 0.2, 0.4]),
)  # fmt: skip
def test_no_pixel_serves_two_subsets_of_tiles(card, size, ratio, stride, seed, validation, test):
    source = SceneTiles(str(card), str(card.parent), size, stride, size * ratio, validation, test, seed)
    try:
        source.setup()
    except ConfigError:
        assume(False)
    owners = np.full(source.scene.valid.shape, -1)
    for number, name in enumerate(("train", "validation", "test")):
        for index in getattr(source, name):
            tile = source.read(int(index))
            row, column = source._places[index]
            assert np.array_equal(tile, source.scene.image[:, row : row + size, column : column + size])
            window = owners[row : row + size, column : column + size]
            assert set(np.unique(window)) <= {-1, number}
            window[:] = number
    assert sorted(np.concatenate([source.train, source.validation, source.test])) == list(range(len(source)))


@few
@given(size=st.integers(1, 7), stride=st.integers(1, 7), classes=st.integers(1, 3), seed=st.integers(0, 99))
def test_predictions_of_windows_come_together_as_the_map_they_were_cut_from(card, size, stride, classes, seed):
    assume(stride <= size)
    split = {"kind": "random", "train": 0.2, "validation": 0.1}
    module = SceneWindowModule(str(card), str(card.parent), size, stride, split, 8, 8, seed)
    module.setup()
    scores = torch.from_numpy(np.random.default_rng(seed).random((classes, *module.cube.shape[1:])).astype(np.float32))
    windows = gather_windows(scores, module._grid(stride), size).numpy()
    border = size - 1
    inside = (slice(border, -border or None),) * 2
    expected = scores.numpy()[:, *inside].reshape(classes, -1).T
    assert np.allclose(module.assemble(windows), expected, atol=1e-6)


@pytest.fixture(scope="module")
def encoders():
    """One small LESS ViT for each size of patch."""
    torch.manual_seed(0)
    return {
        size: LessViT(patch_size=size, embed_dim=16, depth=1, num_heads=2, radar=False).eval() for size in (1, 2, 3, 4)
    }


@few
@given(
    patch_size=st.integers(1, 4), height=st.integers(1, 13), width=st.integers(1, 13), channels=st.integers(1, 5),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_patches_of_tokens_come_together_as_the_image(encoders, patch_size, height, width, channels, seed):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(2, channels, height, width, generator=generator)
    wavelengths = torch.linspace(450, 900, channels).expand(2, -1)
    patches = encoders[patch_size].patches(image, wavelengths, torch.tensor([10.0, 10.0]))
    whole = assemble(patches.pixels, patches.rows)
    assert whole.shape[-2] - height < patch_size
    assert torch.equal(whole[..., :height, :width], image)


@few
@given(
    patch_size=st.integers(1, 3), side=st.integers(2, 4), channels=st.integers(2, 6),
    ratio=st.sampled_from([0.25, 0.5, 0.75]), channel_ratio=st.sampled_from([0.25, 0.5, 0.75]), seed=st.integers(0, 99),
)  # fmt: skip
def test_masks_hide_their_share_and_nothing_hidden_is_seen(
    encoders, patch_size, side, channels, ratio, channel_ratio, seed
):
    torch.manual_seed(seed)
    model = HyperMAE(
        encoders[patch_size], decoder_dim=8, decoder_depth=1, decoder_heads=1, mask_ratio=ratio,
        channel_mask_ratio=channel_ratio,
    ).eval()  # fmt: skip
    pixels = side * patch_size
    image = torch.randn(2, channels, pixels, pixels)
    wavelengths = torch.linspace(450, 900, channels).expand(2, -1)
    patches = model.encoder.patches(image, wavelengths, torch.tensor([10.0, 10.0]))
    noise = model.draw_noise(patches, "optical")
    assume(int(channels * (1 - channel_ratio)) >= 1 and int(side**2 * (1 - ratio)) >= 1)
    with torch.no_grad():
        found = model.reconstruct(patches, "optical", noise)
        assert found.hidden_channels.sum(1).tolist() == [channels - int(channels * (1 - channel_ratio))] * 2
        assert found.hidden_positions.sum(1).tolist() == [side**2 - int(side**2 * (1 - ratio))] * 2
        hidden = found.hidden_channels[:, :, None] | found.hidden_positions[:, None]
        spoiled = image.clone()
        spoiled[assemble(hidden[..., None].expand_as(patches.pixels), side)] = 1e3
        other = model.reconstruct(
            model.encoder.patches(spoiled, wavelengths, torch.tensor([10.0, 10.0])), "optical", noise
        )
    assert torch.equal(other.prediction, found.prediction)


@few
@given(count=st.integers(1, 6), side=st.integers(1, 5), seed=st.integers(0, 99))
def test_every_symmetry_has_an_inverse_among_them(count, side, seed):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(count, 2, side, side, generator=generator)
    chosen = torch.randint(SYMMETRIES, (count,), generator=generator)
    turned = apply_symmetries(image, chosen)
    back = [apply_symmetries(turned, torch.full((count,), index)) for index in range(SYMMETRIES)]
    for number in range(count):
        assert any(torch.equal(candidate[number], image[number]) for candidate in back)
