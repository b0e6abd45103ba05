import torch
from torch import nn

from vision_lowrank.tasks.masked_pretraining import MaskedPretraining


class Memory(nn.Module):
    """Keeps what it was shown; its map is a constant."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward_features(self, x):
        self.shown = x
        return self.weight * torch.ones(len(x), 3, 3, 2)


def make(pixels, values):
    task = MaskedPretraining(Memory(), 4, 0.1, 0.0, 0.0, masked_pixels=pixels, masked_values=values)
    task.log = lambda *args, **kwargs: None
    task.decoder(torch.zeros(1, 2))
    nn.init.zeros_(task.decoder.weight)
    nn.init.zeros_(task.decoder.bias)
    return task


def test_hidden_values_are_not_shown_and_their_share_is_as_asked():
    torch.manual_seed(0)
    task = make(0.3, 0.2)
    task.training_step({"image": torch.rand(64, 4, 9, 9) + 1}, 0)
    hidden = task.model.shown == 0
    whole = hidden.all(dim=1)
    assert abs(whole.float().mean() - (0.3 + 0.7 * 0.2**4)) < 0.03
    assert abs(hidden.float().mean() - (0.3 + 0.7 * 0.2)) < 0.03


def test_the_loss_counts_hidden_values_in_standardised_units():
    torch.manual_seed(0)
    task = make(0.5, 0.0)
    image = torch.randn(256, 4, 9, 9) * torch.tensor([1.0, 5.0, 20.0, 100.0]).view(1, 4, 1, 1)
    # predicting the mean, 0, costs the variance of a standardised value
    assert abs(task.training_step({"image": image}, 0).item() - 1) < 0.05
    nn.init.constant_(task.decoder.bias, 2.0)
    constant = torch.tensor([1.0, 5.0, 20.0, 100.0])
    expected = (1 + (2 / constant) ** 2).mean().item()
    assert abs(task.training_step({"image": image}, 0).item() - expected) < 0.1


def test_gradients_reach_model_and_decoder():
    torch.manual_seed(0)
    task = make(0.5, 0.1)
    nn.init.ones_(task.decoder.weight)
    task.training_step({"image": torch.randn(8, 4, 9, 9)}, 0).backward()
    assert task.model.weight.grad.abs() > 0
    assert task.decoder.bias.grad.abs().min() > 0
