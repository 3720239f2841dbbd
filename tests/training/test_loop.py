"""The training loop: steps, schedules, resuming, and stopping when the loss breaks."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch

from ibpcore import UserError, certified_margins, certified_radii, load_model
from ibpcore.bounds.ibp import clean_margins
from ibpcore.bounds.options import BoundOptions
from ibpcore.data.batches import ordered_batches, shuffled_batches
from ibpcore.data.sources import Request, load_dataset
from ibpcore.nn.checkpoint import MODEL
from ibpcore.nn.folding import clean_pass
from ibpcore.training.config import TrainConfig, make_config
from ibpcore.training.loop import train_model, train_step
from ibpcore.training.methods import METHODS
from ibpcore.training.presets import PRESETS
from ibpcore.training.run_files import METRICS, STATE
from ibpcore.training.state import start_state

DIGITS = load_dataset("digits", Request(limit_train=96, limit_test=32))


def small(method="acert", **overrides):
    sizes = {"width": 2, "hidden": 8, "epochs": 3, "batch_size": 32}
    return make_config("digits", method, **{**sizes, **overrides})


def first_batch():
    return next(ordered_batches(DIGITS.train, 32))


def weights(model):
    return torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()])


def test_same_seed_same_weights(tmp_path):
    runs = [tmp_path / name for name in "ab"]
    for run in runs:
        run.mkdir()
        train_model(small(), DIGITS, run)
    a, b = (weights(load_model(run / MODEL)) for run in runs)
    assert torch.equal(a, b)


def test_a_trained_model_is_pickled_once(tmp_path):
    """Training holds all parameters in one tensor, which each of them would take along."""
    model = train_model(small(epochs=1), DIGITS, tmp_path)
    parameters = list(model.parameters())
    assert len({p.untyped_storage().data_ptr() for p in parameters}) == len(parameters)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in parameters)
    assert len(pickle.dumps(model)) < 2 * len(pickle.dumps(copy.deepcopy(model)))


def test_adaptive_fastibp_is_acert(tmp_path):
    """With the same learning rates, to the last bit."""
    acert = small("acert")
    adaptive = dataclasses.replace(acert, method="fastibp")
    assert adaptive == small(
        "fastibp", adaptive=True, learning_rate=2e-3, learning_rate_schedule="onecycle"
    )
    runs = []
    for config in (acert, adaptive):
        run = tmp_path / config.method
        run.mkdir()
        runs.append(weights(train_model(config, DIGITS, run)))
    assert torch.equal(*runs)


def test_another_seed_other_weights(tmp_path):
    first = train_model(small(epochs=1), DIGITS, tmp_path)
    second = train_model(small(epochs=1, seed=1), DIGITS, tmp_path)
    assert not torch.equal(weights(first), weights(second))


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("standard", {}),
        ("fastibp", {}),
        ("acert", {"solver": "brentq"}),
        ("acert", {"solver": "fused", "candidates": 2}),
        ("acert", {"solver": "tracked", "max_iterations": 1}),
        ("acert", {"solver": "tracked", "max_iterations": 100}),
        ("acert", {"train_bound": "crown"}),
        ("ibp", {}),
        ("random-ibp", {"beta2": 0.9}),
        ("sabr", {"relu_shrinkage": 0.2}),
        ("sabr", {"adaptive": True}),
        ("mtl-ibp", {}),
        ("cc-ibp", {}),
        ("exp-ibp", {}),
        ("exp-ibp", {"adaptive": True}),
        ("taps", {"attack_steps": 2}),
        ("staps", {"attack_steps": 2, "adaptive": True}),
    ],
    ids=str,
)
def test_resume_ends_with_the_same_bits(tmp_path, monkeypatch, method, given):
    """The second epoch breaks off in its middle; augmentation and attacks draw at random."""
    config = small(method, flip=True, padding=1, **given)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for run in (whole, broken):
        run.mkdir()
    expected = train_model(config, DIGITS, whole)

    calls = []

    def fails_in_the_fifth_step(batch, epsilon, config):
        calls.append(epsilon)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return before(batch, epsilon, config)

    before = METHODS[method]
    monkeypatch.setitem(METHODS, method, fails_in_the_fifth_step)
    with pytest.raises(KeyboardInterrupt):
        train_model(config, DIGITS, broken)
    monkeypatch.undo()
    assert len((broken / METRICS).read_text().splitlines()) == 1

    resumed = train_model(config, DIGITS, broken, resume=True)
    assert torch.equal(weights(expected), weights(resumed))
    assert torch.equal(weights(load_model(broken / MODEL)), weights(expected))
    drop = {"seconds"}
    rows = [
        [{k: v for k, v in json.loads(line).items() if k not in drop} for line in lines]
        for lines in ((run / METRICS).read_text().splitlines() for run in (whole, broken))
    ]
    assert rows[0] == rows[1]


def test_slopes_are_those_of_the_last_visit():
    """After a step each image has R's secant at the radius it was trained at; the others none."""
    config = small(solver="brentq", regularizer=0.0)
    state = start_state(config, DIGITS, "cpu")
    state.model.train()
    batch = next(shuffled_batches(DIGITS.train, 32, seed=0, epoch=0, flip=False, padding=0))
    logits, network = clean_pass(state.model, batch.images, track=False)
    at_zero = clean_margins(logits, batch.labels)
    radii = certified_radii(network, batch.images, batch.labels, config.epsilon_max).root
    margins = certified_margins(network, batch.images, batch.labels, radii)

    train_step(state, batch, 1.0, config)

    bounded = radii > 0
    assert bounded.any()
    assert not bounded.all()
    expected = (margins - at_zero)[bounded] / radii[bounded]
    found = state.slopes[batch.samples][bounded]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)
    others = torch.ones(len(state.slopes), dtype=torch.bool)
    others[batch.samples[bounded]] = False
    assert state.slopes[others].isnan().all()


@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("standard", {}),
        ("fastibp", {"kappa": 0.3, "l1": 1e-4}),
        ("acert", {"solver": "brentq"}),
        ("acert", {}),
        ("crown-ibp", {}),
        ("crown-ibp", {"loss_fusion": True, "adaptive": True}),
        ("acert", {"train_bound": "crown"}),
    ],
)
def test_a_batch_in_parts_is_the_batch(method, given):
    """Loss, gradient, radii and memory, in float64; 32 images in 5 parts, some without radius."""
    results = []
    for parts in (1, 5):
        state = start_state(small(method, accumulate=parts, **given), DIGITS, "cpu")
        state.model.double().train()
        batch = first_batch()._replace(images=first_batch().images.double())
        result = train_step(state, batch, 0.5, small(method, accumulate=parts, **given))
        gradient = torch.cat([p.grad.flatten() for p in state.model.parameters()])
        results.append((gradient, state.slopes, result.sums))
    assert results[0][0].abs().max() > 1e-3
    for one, several in zip(*results, strict=True):
        torch.testing.assert_close(several, one, rtol=1e-6, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("method", ["exp-ibp", "taps", "staps"])
def test_a_loss_that_is_no_mean_has_no_parts(method):
    with pytest.raises(UserError, match=f"accumulate must be 1 for {method}"):
        small(method, accumulate=2)


@pytest.mark.parametrize("method", ["taps", "staps"])
def test_a_network_with_too_few_layers_is_refused_before_the_first_step(method):
    start_state(small(method, classifier_size=6), DIGITS, "cpu")
    with pytest.raises(UserError, match="classifier_size must be at most 6"):
        start_state(small(method, classifier_size=7), DIGITS, "cpu")


@pytest.mark.parametrize("before", [False, True])
def test_cudnn_is_deterministic_during_training_only(tmp_path, monkeypatch, before):
    """Its setting is restored, also where training fails."""
    cudnn, during, standard = torch.backends.cudnn, [], METHODS["standard"]

    def observed(batch, epsilon, config):
        during.append(cudnn.deterministic)
        if len(during) > 3:
            raise KeyboardInterrupt
        return standard(batch, epsilon, config)

    monkeypatch.setitem(METHODS, "standard", observed)
    monkeypatch.setattr(cudnn, "deterministic", before)
    train_model(small("standard", epochs=1), DIGITS, tmp_path)
    assert cudnn.deterministic is before
    with pytest.raises(KeyboardInterrupt):
        train_model(small("standard", epochs=1), DIGITS, tmp_path)
    assert cudnn.deterministic is before
    assert during == [True] * 4


def test_metrics_have_a_row_an_epoch(tmp_path):
    config = small(epochs=4, warmup=(2, 3))
    train_model(config, DIGITS, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["epsilon"] == 0
    assert 0 < rows[1]["epsilon"] < rows[2]["epsilon"]
    assert rows[3]["epsilon"] == pytest.approx(config.epsilon_max)
    assert all(0 <= row["mean_radius"] <= row["epsilon"] + 1e-7 for row in rows)
    assert rows[-1]["learning_rate"] < 0.1 * max(row["learning_rate"] for row in rows)


def test_resume_refuses_other_data(tmp_path):
    """Same configuration, one pixel changed."""
    train_model(small(epochs=1), DIGITS, tmp_path)
    images = DIGITS.train.images.clone()
    images[0, 0, 0, 0] += 1
    other = dataclasses.replace(DIGITS, train=dataclasses.replace(DIGITS.train, images=images))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="images of the data set changed"):
        train_model(small(epochs=1), other, tmp_path, resume=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_stops_when_the_loss_breaks(tmp_path, monkeypatch, broken):
    """In epoch 2 loss or gradient turns NaN: say where, keep the weights after epoch 1."""
    config = small("standard", epochs=1)
    good = train_model(config, DIGITS, tmp_path)
    calls = []
    before = METHODS["standard"]

    def breaks(batch, epsilon, config):
        result = before(batch, epsilon, config)
        calls.append(0)
        if len(calls) < 5:
            return result
        if broken == "loss":
            return result._replace(loss=result.loss * torch.nan)
        # d sqrt(z) / dz is infinite at 0: the value is finite, the gradient is not.
        return result._replace(loss=result.loss + (0 * batch.logits.sum()).sqrt())

    monkeypatch.setitem(METHODS, "standard", breaks)
    state = torch.load(tmp_path / STATE, weights_only=True)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    with pytest.raises(UserError, match=r"not finite at step 2 of 3 in epoch 2; .* after epoch 1"):
        train_model(small("standard", epochs=3), DIGITS, fresh)
    assert state["epoch"] == 1
    assert torch.load(fresh / STATE, weights_only=True)["epoch"] == 1
    assert weights(load_model(fresh / MODEL)).isfinite().all()
    assert weights(good).isfinite().all()


def test_a_step_counts_its_regularisers(monkeypatch):
    """Loss = method + lambda (1 - share) regulariser + l1 |W|, each on its own."""

    def loss(**overrides):
        config = small("fastibp", **overrides)
        share = overrides.pop("share", 0.5)
        state = start_state(config, DIGITS, "cpu")
        return train_step(state, first_batch(), share, config).sums[0]

    bare = loss(regularizer=0.0)
    one, two = loss(regularizer=0.5) - bare, loss(regularizer=1.0) - bare
    assert one > 0
    # Differences of float32 losses: their rounding is far above that of one loss.
    near = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(two, 2 * one, **near)
    model = start_state(small("fastibp"), DIGITS, "cpu").model
    norm = sum(p.abs().sum() for n, p in model.named_parameters() if p.dim() > 1)
    torch.testing.assert_close(loss(regularizer=0.0, l1=0.01) - bare, 0.01 * norm.detach(), **near)


def test_gradients_are_clipped():
    config = small("standard", gradient_clip=1e-3, learning_rate=1.0)
    state = start_state(config, DIGITS, "cpu")
    train_step(state, first_batch(), 1.0, config)
    norm = torch.stack([p.grad.norm() for p in state.model.parameters()]).norm()
    assert norm <= 1e-3 * (1 + 1e-4)


class TestConfig:
    def test_presets_are_table_4(self):
        rows = {name: make_config(name, "acert") for name in ("mnist", "cifar10", "tinyimagenet")}
        assert [c.epsilon_max for c in rows.values()] == [0.4, 8.8 / 255, 1 / 255]
        assert [c.batch_size for c in rows.values()] == [128, 128, 256]
        assert [c.epochs for c in rows.values()] == [100, 200, 200]
        assert [c.warmup for c in rows.values()] == [(1, 20), (1, 80), (1, 80)]
        assert [c.regularizer for c in rows.values()] == [0.5, 0.5, 0.2]
        assert [c.l1 for c in rows.values()] == [0, 0, 1e-4]
        assert [(c.flip, c.padding) for c in rows.values()] == [(False, 0), (True, 2), (True, 4)]
        for config in rows.values():
            assert (config.width, config.hidden, config.gradient_clip) == (64, 512, 10)
            assert (config.learning_rate, config.learning_rate_schedule) == (2e-3, "onecycle")
            assert config.kappa == 0
            exact = dataclasses.replace(config, solver="brentq").root_options(0.1)
            assert (exact.xtol, exact.rtol, exact.max_iterations) == (1e-6, 1e-4, 100)

    def test_fastibp_has_its_own_learning_rate(self):
        config = make_config("mnist", "fastibp")
        assert (config.learning_rate, config.learning_rate_schedule) == (5e-4, "multistep")

    def test_published_settings(self):
        """Relative box or weight of the bounds, and L1, of the authors' commands."""
        boxes = {"mnist": (0.6, 1e-6), "cifar10": (0.7, 0), "tinyimagenet": (0.4, 1e-6)}
        for dataset, expected in boxes.items():
            config = make_config(dataset, "sabr")
            assert (config.box_size, config.l1) == expected
            assert (config.attack_steps, config.attack_step_size) == (8, 0.5)
            assert (config.relu_shrinkage, config.initial_kappa) == (0, None)
        weights = {
            ("mnist", "mtl-ibp"): (0.08, 1e-6),
            ("mnist", "cc-ibp"): (0.3, 3e-6),
            ("cifar10", "mtl-ibp"): (0.5, 1e-7),
            ("cifar10", "cc-ibp"): (0.5, 0),
            ("cifar10", "exp-ibp"): (0.5, 0),
            ("tinyimagenet", "mtl-ibp"): (0.01, 5e-5),
            ("tinyimagenet", "cc-ibp"): (0.01, 5e-5),
            ("tinyimagenet", "exp-ibp"): (0.04, 5e-5),
        }
        for (dataset, method), expected in weights.items():
            config = make_config(dataset, method)
            assert (config.ibp_weight, config.l1) == expected
            assert (config.attack_steps, config.attack_step_size) == (1, 10)
            assert (config.attack_scale, config.kappa) == (1, 0)
            assert (config.learning_rate, config.learning_rate_schedule) == (5e-4, "multistep")

    def test_published_settings_of_taps(self):
        """Layers, weight, box, L1, kappa, and steps of 2 max(0.2, 2 / steps)."""
        published = {
            ("mnist", "taps"): (2, 4, None, 0, 0, 5),
            ("mnist", "staps"): (1, 4, 0.6, 1e-5, 0, 10),
            ("cifar10", "taps"): (1, 2, None, 0, 0, 10),
            ("cifar10", "staps"): (1, 2, 0.9, 0, 0, 10),
            ("tinyimagenet", "taps"): (1, 8, None, 5e-5, 0.3, 1),
            ("tinyimagenet", "staps"): (1, 4, 0.6, 5e-5, 0, 1),
        }
        for (dataset, method), (size, weight, box, l1, kappa, steps) in published.items():
            config = make_config(dataset, method)
            assert (config.classifier_size, config.taps_weight) == (size, weight)
            assert box in (None, config.box_size)
            assert (config.l1, config.kappa, config.relu_shrinkage) == (l1, kappa, 0)
            assert (config.attack_steps, config.attack_restarts) == (steps, 3)
            assert config.attack_step_size == 2 * max(0.2, 2 / steps)
            assert (config.learning_rate, config.learning_rate_schedule) == (5e-4, "multistep")

    def test_the_warmup_keeps_its_share(self):
        assert make_config("mnist", "acert", epochs=10).warmup == (1, 2)
        assert make_config("mnist", "acert", epochs=10, warmup=(2, 9)).warmup == (2, 9)

    @pytest.mark.parametrize("dataset", PRESETS)
    def test_survives_json(self, dataset):
        config = make_config(dataset, "fastibp", kappa=0.25)
        assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("epsilon_max", 0.0),
            ("epsilon_max", 1.5),
            ("epsilon_max", float("nan")),
            ("kappa", -0.1),
            ("kappa", 1.1),
            ("epochs", 0),
            ("epochs", 2.5),
            ("batch_size", 1),
            ("learning_rate", 0.0),
            ("warmup", (5, 2)),
            ("warmup", (0, 2)),
            ("warmup", (1, 31)),
            ("rtol", 1e-9),
            ("warmup", 3),
            ("schedule", "cosine"),
            ("solver", "newton"),
            ("max_iterations", -1),
            ("width", 0),
            ("limit_train", "all"),
            ("flip", 1),
            ("adaptive", 1),
            ("adaptive", False),
            ("initialization", "xavier"),
            ("initial_kappa", 2.0),
            ("initial_kappa", "one"),
            ("box_size", 0.0),
            ("box_size", 1.1),
            ("relu_shrinkage", -0.1),
            ("relu_shrinkage", 1.0),
            ("ibp_weight", -0.1),
            ("ibp_weight", float("nan")),
            ("attack_steps", 0),
            ("attack_steps", 2.5),
            ("attack_step_size", 0.0),
            ("attack_scale", -1.0),
            ("train_bound", "deeppoly"),
            ("train_bound", None),
        ],
    )
    def test_bad_values_are_named(self, name, value):
        with pytest.raises(UserError, match=name):
            make_config("digits", "acert", **{name: value})

    @pytest.mark.parametrize("method", ["standard", "crown-ibp", "sabr"])
    def test_methods_with_bounds_of_their_own_take_no_other(self, method):
        assert make_config("digits", method).train_bound == "ibp"
        with pytest.raises(UserError, match=f"train_bound must be ibp for {method}, but is"):
            make_config("digits", method, train_bound="crown")

    def test_a_run_is_certified_by_the_bound_it_was_trained_with(self):
        config = make_config("digits", "fastibp", train_bound="crown", elide=False)
        assert config.bound_options == BoundOptions("crown", elide=False)
        assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config

    def test_files_from_before_there_was_a_choice_mean_ibp(self):
        values = make_config("digits", "fastibp").to_dict()
        del values["train_bound"]
        assert TrainConfig.from_dict(values).bound_options == BoundOptions("ibp")

    def test_unknown_settings_are_named(self):
        with pytest.raises(UserError, match="momentum"):
            make_config("digits", "acert", momentum=0.9)

    @pytest.mark.parametrize(("method", "adaptive"), [("acert", True), ("fastibp", False)])
    def test_files_from_before_adaptive_was_a_setting(self, method, adaptive):
        values = make_config("digits", method).to_dict()
        del values["adaptive"]
        assert TrainConfig.from_dict(values).adaptive is adaptive

    def test_standard_training_is_not_adaptive(self):
        with pytest.raises(UserError, match="adaptive must be off for standard"):
            make_config("digits", "standard", adaptive=True)

    def test_standard_training_has_no_other_kappa(self):
        with pytest.raises(UserError, match="kappa must be 1"):
            make_config("digits", "standard", kappa=0.5)
