"""Published settings: every entry is valid, and some are compared with their commands."""

import pytest

from ibpcore import UserError
from ibpcore.choices import PRESET_NAMES
from ibpcore.training.config import make_config
from ibpcore.training.published import PRESET_SOURCES

ENTRIES = [
    (source, dataset, epsilon, method)
    for source, (_, settings) in PRESET_SOURCES.items()
    for (dataset, epsilon), methods in settings.items()
    for method in methods
]


@pytest.mark.parametrize(("source", "dataset", "epsilon", "method"), ENTRIES)
def test_every_entry_is_a_configuration(source, dataset, epsilon, method):
    config = make_config(dataset, method, preset=source, epsilon_max=epsilon)
    assert config.epsilon_max == epsilon
    assert config.epsilon_max <= config.train_epsilon <= 2 * epsilon
    if source != "best":
        assert config.learning_rate == 5e-4
        assert config.learning_rate_schedule == "multistep"


def test_the_largest_radius_is_the_default():
    assert make_config("mnist", "mtl-ibp", preset="expressive-losses").epsilon_max == 0.3
    assert make_config("cifar10", "sabr", preset="ctbench").epsilon_max == 8 / 255


def test_the_best_kappa_of_fastibp_on_cifar10():
    """With 0, the published one, its accuracy was 4 points lower in short runs."""
    assert make_config("cifar10", "fastibp", preset="best").kappa == 0.5
    assert make_config("cifar10", "fastibp", preset="best", kappa=0.0).kappa == 0
    assert make_config("cifar10", "acert", preset="best").kappa == 0
    assert make_config("mnist", "fastibp", preset="best").kappa == 0


def test_a_command_of_ctbench():
    """scripts/examples/cifar10/2.255/train_sabr.sh"""
    config = make_config("cifar10", "sabr", preset="ctbench", epsilon_max="2/255")
    assert config.train_epsilon == pytest.approx(0.011764, rel=1e-4)
    assert (config.epochs, config.warmup, config.batch_size) == (160, (2, 81), 128)
    assert [round(x * 160, 9) for x in config.learning_rate_drops] == [120, 140]
    assert (config.box_size, config.relu_shrinkage, config.l1) == (0.1, pytest.approx(0.2), 1e-6)
    assert (config.attack_steps, config.attack_step_size, config.attack_restarts) == (5, 0.2, 3)
    assert (config.kappa, config.regularizer, config.precise_batch_norm) == (0, 0.5, True)


def test_another_command_of_ctbench():
    """scripts/examples/cifar10/8.255/train_mtlibp.sh"""
    config = make_config("cifar10", "mtl-ibp", preset="ctbench")
    assert (config.epochs, config.warmup, config.batch_size) == (240, (2, 121), 128)
    assert (config.attack_steps, config.attack_step_size, config.attack_restarts) == (1, 2.0, 3)
    assert (config.ibp_weight, config.average_last) == (0.6, pytest.approx(15 / 240))


def test_a_command_of_expressive_losses():
    """README, MNIST - 0.3, MTL-IBP"""
    config = make_config("mnist", "mtl-ibp", preset="expressive-losses")
    assert config.train_epsilon == pytest.approx(0.4002)
    assert (config.ibp_weight, config.l1) == (0.08, 1e-6)
    assert (config.epochs, config.warmup, config.batch_size) == (70, (1, 20), 256)
    assert (config.attack_steps, config.attack_step_size) == (1, 10.0)


def test_what_is_given_replaces_what_is_published():
    config = make_config("cifar10", "sabr", preset="ctbench", epochs=24, box_size=0.5)
    assert (config.warmup, config.box_size) == ((2, 12), 0.5)
    assert config.learning_rate_drops == (200 / 240, 220 / 240)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("digits", "sabr"), "ctbench has no settings for digits, only for mnist, cifar10"),
        (("cifar10", "acert"), "ctbench has no acert for cifar10, only fastibp"),
        (("cifar10", "cc-ibp"), "has no cc-ibp for cifar10"),
    ],
)
def test_what_is_not_published_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        make_config(*given, preset="ctbench")


def test_radii_that_are_not_published_are_refused():
    with pytest.raises(UserError, match=r"at epsilon_max 2/255 .*, 8/255 .*, not at 3/255"):
        make_config("cifar10", "sabr", preset="ctbench", epsilon_max="3/255")
    assert make_config("cifar10", "sabr", preset="ctbench", epsilon_max=0.03137).batch_size == 128


@pytest.mark.parametrize("epsilon", [float("nan"), [1], True])
def test_radii_that_are_none_are_refused(epsilon):
    with pytest.raises(UserError, match="epsilon_max must be"):
        make_config("cifar10", "sabr", preset="ctbench", epsilon_max=epsilon)


def test_paper_is_the_default():
    assert ("paper", *PRESET_SOURCES) == PRESET_NAMES
    assert make_config("mnist", "sabr", preset="paper") == make_config("mnist", "sabr")
    with pytest.raises(UserError, match="preset must be one of paper, best"):
        make_config("mnist", "sabr", preset="none")
