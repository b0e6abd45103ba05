"""Low-rank interpolation: the posterior mean of a Gaussian process over wavelength, means over the ground."""

import copy

import pytest
import torch

from vision_lowrank.models.layers.embeddings import grid_coordinates, sincos
from vision_lowrank.models.layers.low_rank_interpolation import LowRankInterpolation

WAVELENGTHS = torch.tensor([[443.0, 560.0, 665.0, 842.0, 1610.0], [2190.0, 400.0, 900.0, 910.0, 5500.0]])
CHANNELS = torch.tensor([[0, 1, 3], [1, 2, 4]])
POSITIONS = torch.tensor([[0, 4, 5, 7], [2, 3, 8, 11]])


def test_hidden_tokens_are_posterior_means_and_means_by_inverse_distance():
    torch.manual_seed(0)
    layer = LowRankInterpolation(3).double()
    torch.nn.init.constant_(layer.log_noise, -1.0)
    # three rows of four patches of 2 x 2 pixels; the pixels of the second image are larger
    whole = grid_coordinates(WAVELENGTHS, torch.tensor([10.0, 30.0]), 3, 4, 2)
    tokens = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    found = layer(tokens, whole, whole.keep(CHANNELS, POSITIONS))
    assert found.shape == (2, 6, 13, 6)
    for b, side in enumerate((20.0, 60.0)):
        loadings = layer.loadings(sincos(WAVELENGTHS[b], 128).double())
        # the covariance of all channels, which the layer never builds
        covariance, kept = loadings @ loadings.T, CHANNELS[b]
        noisy = covariance[kept][:, kept] + torch.tensor(-1.0).exp() * torch.eye(3, dtype=torch.float64)
        posterior = covariance[:, kept] @ torch.linalg.inv(noisy)
        for n in range(12):
            rows, columns = n // 4 - POSITIONS[b] // 4, n % 4 - POSITIONS[b] % 4
            away = side * (rows**2 + columns**2).double().sqrt()
            nearness = away**-3 if away.all() else (away == 0).double()
            around = torch.einsum("n,cne->ce", nearness / nearness.sum(), tokens[b, :, 1:])
            torch.testing.assert_close(found[b, 1:, 1 + n], posterior @ around[1:], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found[b, 0, 1 + n], around[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[b, 1:, 0], posterior @ tokens[b, 1:, 0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[b, 0, 0], tokens[b, 0, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_single_precision_rounded(dtype):
    torch.manual_seed(0)
    half = LowRankInterpolation(3).to(dtype)
    torch.nn.init.constant_(half.log_noise, -1.0)
    single = copy.deepcopy(half).float()
    whole = grid_coordinates(WAVELENGTHS, torch.tensor([10.0, 30.0]), 3, 4, 2)
    tokens = torch.randn(2, 4, 5, 6).to(dtype)
    found = half(tokens, whole, whole.keep(CHANNELS, POSITIONS))
    assert found.dtype == dtype
    expected = single(tokens.float(), whole, whole.keep(CHANNELS, POSITIONS))
    # the loadings alone are of half precision
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
    # a class token of both axes is a copy
    assert torch.equal(found[:, 0, 0], tokens[:, 0, 0])
    found.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in half.parameters())


def test_channels_of_any_number_learn_one_another():
    # two factors over the wavelength, of which every channel is a mixture
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    layer = LowRankInterpolation(4)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.01)

    def errors(count):
        wavelengths = torch.sort(400 + 2000 * torch.rand(64, count, generator=generator)).values
        shapes = torch.stack([(wavelengths / 300).sin(), (wavelengths / 700).cos()], 1)
        spectra = torch.einsum("bfc,bfn->bcn", shapes, torch.randn(64, 2, 5, generator=generator))
        seen = wavelengths[:, ::2]
        weights = layer.spectral_weights(wavelengths, seen)
        return ((weights @ spectra[:, ::2] - spectra)[:, 1::2]).square().mean() / spectra.square().mean()

    before = errors(20).item()
    for _ in range(300):
        optimiser.zero_grad()
        errors(20).backward()
        optimiser.step()
    with torch.no_grad():
        assert errors(20) < 0.1 * before
        # as many channels as were never trained on
        assert errors(33) < 0.1 * before
