"""Parameters in one tensor: an optimiser of it does what one of the parameters does."""

import copy

import pytest
import torch
from torch import nn

from ibpcore.training.flat import check_joined, clip_gradients, flattened, separate
from ibpcore.training.state import TrainState

NETWORKS = {
    "several": lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(108, 5)),
    "channels last": lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(108, 5)).to(
        memory_format=torch.channels_last
    ),
    "a single one": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 5, bias=False)),
    "a single one of 45 numbers": lambda: nn.Conv2d(1, 5, 3, bias=False),
}


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [100])
    return TrainState(model, optimizer, schedule, torch.zeros(1))


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(count):
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        model(images).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_state_of_one_entry_a_parameter_is_gone_on_with(name):
    """As files of older versions have it; also where there is one parameter, as there is now."""
    torch.manual_seed(0)
    plain = NETWORKS[name]()
    before = torch.optim.Adam(plain.parameters(), 0.01, fused=True)
    stepped(plain, before, 3)
    model = copy.deepcopy(plain)
    state = state_of(model, torch.optim.Adam(flattened(model), 0.01, fused=True))
    state._load_optimizer(copy.deepcopy(before.state_dict()))
    for other, optimizer in ((plain, before), (model, state.optimizer)):
        stepped(other, optimizer, 2)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("steps", [0, 3])
def test_a_state_of_this_version_is_loaded_as_it_is(steps):
    model = NETWORKS["several"]()
    optimizer = torch.optim.Adam(flattened(model), 0.01, fused=True)
    stepped(model, optimizer, steps)
    saved = copy.deepcopy(optimizer.state_dict())
    state_of(model, optimizer)._load_optimizer(saved)
    found = optimizer.state_dict()["state"]
    assert found.keys() == saved["state"].keys()
    for number, entry in saved["state"].items():
        for key, value in entry.items():
            assert torch.equal(found[number][key], value)


def test_gradients_are_clipped_to_the_norm_of_all():
    """(3, 0) and (0, 4) have the norm 5: at most 1 is a fifth, and at most 10 leaves them."""
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    for limit, factor in ((10.0, 1.0), (1.0, 0.2)):
        parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0]), torch.tensor([0, 4.0])
        assert clip_gradients(parameters, limit).item() == 5
        assert parameters[0].grad.tolist() == pytest.approx([3 * factor, 0])
        assert parameters[1].grad.tolist() == pytest.approx([0, 4 * factor])


def test_a_copied_model_is_not_trained_without_a_word():
    model = NETWORKS["several"]()
    optimizer = torch.optim.Adam(flattened(model), 0.01)
    check_joined(optimizer, model)
    with pytest.raises(RuntimeError, match=r"does not update 0\.weight"):
        check_joined(optimizer, copy.deepcopy(model))
    separate(model)
    with pytest.raises(RuntimeError, match=r"does not update 0\.weight"):
        check_joined(optimizer, model)
