"""Repositories of the Hugging Face Hub: the run's own files, a card that agrees with them."""

import json
import re
import shlex
import shutil
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import helpers
import pytest
import torch

from ibpcore import UserError, load_model, save_model
from ibpcore.data.arrays import OWN
from ibpcore.experiments.run import dataset_of, train_and_certify
from ibpcore.io.files import write_atomic
from ibpcore.training.config import TrainConfig, make_config
from ibpcore.training.presets import METHOD_PRESETS, PRESETS
from ibpcore_cli.options.train import train_command

pytest.importorskip("huggingface_hub")
from huggingface_hub import ModelCard, hub_mixin

from ibpcore import hub
from ibpcore.hub import FILES, Pretrained, training_call, training_command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a small run on the digits."""
    folder = tmp_path_factory.mktemp("run")
    sizes = {"limit_train": 64, "limit_test": 50, "epochs": 2, "width": 2, "hidden": 8}
    config = make_config("digits", "fastibp", epsilon_max=0.01, **sizes)
    train_and_certify(config, dataset_of(config, Path()), folder)
    return folder


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def test_what_is_saved_is_what_the_run_holds(run, tmp_path):
    Pretrained(run).save_pretrained(tmp_path / "hub")
    saved = helpers.snapshot(tmp_path / "hub")
    assert saved.keys() == {"README.md", *FILES}
    assert all(saved[name] == (run / name).read_bytes() for name in FILES)
    again = Pretrained.from_pretrained(tmp_path / "hub")
    assert (again.config, again.summary) == (Pretrained(run).config, summary_of(run))
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(again.model(images), load_model(run / "model.safetensors")(images))
    assert not again.model.training


def test_the_card_agrees_with_the_run(run, tmp_path):
    Pretrained(run).save_pretrained(tmp_path, model_card_kwargs={"license": "mit"})
    card = ModelCard.load(tmp_path / "README.md")
    summary = summary_of(run)
    data = card.data.to_dict()
    assert (data["library_name"], data["license"]) == ("ibpcore", "mit")
    assert data["pipeline_tag"] == "image-classification"
    assert {"fastibp", "certified-robustness"} <= set(data["tags"])
    assert data["metrics"] == ["accuracy"]
    assert "datasets" not in data  # the digits are not on the Hub
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {name: summary[name] for name in ("accuracy", "acr", "art")}
    assert {result.dataset_name for result in card.data.eval_results} == {"UCI optical digits"}
    rows = dict(re.findall(r"^\| (.*) \| (.*) % \|$", card.text, re.M))
    expected = {"accuracy": summary["accuracy"], "ACR": summary["acr"], "ART": summary["art"]}
    expected |= {f"certified at {r}": s for r, s in summary["certified_accuracy"].items()}
    assert rows == {name: f"{100 * share:.2f}" for name, share in expected.items()}
    for fact in (
        "FastIBP on UCI optical digits",
        "images of 1x8x8, 10 classes",
        "on 50 test images",
        "ε_max = 0.01, ART",
        "the perturbed image stays in [0, 1]",
        "The claim is `real`: radii are proved",
        "bounds were computed by `ibp`",
        f"ibpcore {summary['ibpcore']}",
        training_command(Pretrained(run).config),
        "Licence of the weights: `mit`.",
    ):
        assert fact.lower() in card.text.lower()
    assert "{" not in card.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clip": False}, "with pixels of any value"),
        ({"claim": "float32"}, "every execution of the stored network in float32"),
        ({"claim": "unchecked"}, "without accounting for rounding"),
    ],
)
def test_the_card_says_what_was_claimed(run, tmp_path, changes, words):
    shutil.copytree(run, tmp_path / "run")
    summary = {**summary_of(run), **changes}
    (tmp_path / "run/summary.json").write_text(json.dumps(summary))
    card = Pretrained(tmp_path / "run").generate_model_card()
    assert words in card.text
    assert "Licence of the weights: none was chosen." in card.text
    assert "license" not in card.data.to_dict()


def test_saving_where_it_came_from_loses_nothing(run, tmp_path):
    """The mixin deletes config.json first; a README.md that is there is somebody's own."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/README.md").write_text("own")
    before = helpers.snapshot(tmp_path / "run")
    Pretrained(tmp_path / "run").save_pretrained(tmp_path / "run")
    assert helpers.snapshot(tmp_path / "run") == before


class Api:
    """Instead of the Hub, a folder."""

    folder: Path

    def __init__(self, token=None):
        assert token == "secret"

    def create_repo(self, repo_id, **options):
        (self.folder / repo_id).mkdir(parents=True)
        return type("Url", (), {"repo_id": repo_id})

    def upload_folder(self, repo_id, folder_path, **options):
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)
        return "a commit"


def test_pushed_and_fetched(run, tmp_path, monkeypatch):
    """By the mixin, with the Hub's own interface played by folders."""
    Api.folder = tmp_path / "hub"
    monkeypatch.setattr(hub_mixin, "HfApi", Api)
    card = {"license": "mit"}
    pushed = Pretrained(run).push_to_hub("me/digits", token="secret", model_card_kwargs=card)
    assert pushed == "a commit"
    (tmp_path / "hub/me/digits/pytorch_model.bin").write_bytes(b"not to be read")

    def download(repo_id, filename=None, allow_patterns=None, **where):
        assert where["revision"] == "v1"
        target = tmp_path / "cache"
        target.mkdir(exist_ok=True)
        for name in [filename] if filename else allow_patterns:
            shutil.copy(tmp_path / "hub" / repo_id / name, target)
        return str(target / filename if filename else target)

    monkeypatch.setattr(hub_mixin, "hf_hub_download", download)
    monkeypatch.setattr(hub, "snapshot_download", download)
    fetched = Pretrained.from_pretrained("me/digits", revision="v1")
    assert {path.name for path in (tmp_path / "cache").iterdir()} == set(FILES)
    assert fetched.files == Pretrained(run).files


def damaged(folder, name):
    path = folder / name
    if name == "model.safetensors":
        model = load_model(path)
        model[0].weight.data += 1
        save_model(model, path)
    elif name == "config.json":
        # What the mixin would hand on as an argument.
        path.write_text(json.dumps({**json.loads(path.read_text()), "folder": "/"}))
    else:
        write_atomic(path, b'{"weights": 3}')


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.safetensors", "summary.json is not of the model beside it"),
        ("config.json", "unknown setting folder"),
        ("summary.json", "damaged: it is not a summary of a run"),
    ],
)
def test_a_repository_that_is_not_whole_is_refused(run, tmp_path, name, reason):
    Pretrained(run).save_pretrained(tmp_path)
    damaged(tmp_path, name)
    with pytest.raises(UserError, match=reason):
        Pretrained.from_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=name):
        Pretrained(tmp_path)


CONFIGS = [make_config(d, m) for d in PRESETS if d != OWN for m in METHOD_PRESETS] + [
    make_config("mnist", "fastibp", validation=99, select_weights="best", patience=3),
    make_config(
        *("cifar10", "acert"),
        **{"epochs": 7, "epsilon_max": 2 / 255, "flip": False, "clip": False, "compile": "on"},
        **{"kappa": 1 / 3, "solver": "fused", "xtol": 1e-7, "seed": 5, "limit_test": 9},
    ),
    make_config("mnist", "ibp", epochs=30, warmup=(2, 9), initial_kappa=0.75, adaptive=True),
    make_config("tinyimagenet", "crown-ibp", epochs=40, loss_fusion=False, tf32=False),
    make_config("imagefolder", "sabr", image_size=48, box_size=0.3, attack_steps=4),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.dataset}-{config.method}")
def test_the_command_trains_with_the_same_settings(config):
    ibp, train, *words = shlex.split(training_command(config))
    assert (ibp, train) == ("ibp", "train")
    options = train_command.make_context("train", words).params
    settings = {field.name for field in fields(TrainConfig)} - {"dataset", "method"}
    given = {k: v for k, v in options.items() if v is not None and k in settings}
    assert make_config(options["dataset"], options["method"], **given) == config


def test_a_run_from_a_saved_model_names_one():
    config = make_config("digits", "acert", start="0" * 64, epochs=5)
    words = shlex.split(training_command(config))[2:]
    assert words[words.index("--from") + 1] == "MODEL"
    train_command.make_context("train", words)


def test_an_extended_run_says_so(run, tmp_path):
    config = json.loads((run / "config.json").read_text())
    folder = shutil.copytree(run, tmp_path / "run")
    assert "changed after epoch" not in Pretrained(folder).card
    (folder / "config.json").write_text(json.dumps(config | {"extended_at": [1]}))
    assert "The number of epochs was changed after epoch 1" in Pretrained(folder).card
    assert "extended" not in training_command(Pretrained(folder).config)


def test_images_of_ones_own_are_given_in_python():
    config = make_config(OWN, "acert", epochs=5, epsilon_max=0.05, warmup=(1, 3))
    library = SimpleNamespace(train=lambda data, method, **settings: (method, settings))
    named = {"ibpcore": library, "images": None, "labels": None}
    method, settings = eval(training_call(config), named)
    assert make_config(OWN, method, **settings) == config


def test_a_preset_needs_no_options():
    assert training_command(make_config("mnist", "acert")) == (
        "ibp train --dataset mnist --method acert"
    )
    shorter = replace(make_config("digits", "acert", epochs=5), epsilon_max=0.05)
    assert training_command(shorter) == (
        "ibp train --dataset digits --method acert --epsilon-max 0.05 --epochs 5"
    )
    assert "--epsilon-max 16/255" in training_command(replace(shorter, epsilon_max=16 / 255))


def test_the_command_writes_a_repository(run, tmp_path):
    target = tmp_path / "hub"
    result = helpers.run_ibp("export", run, "--hub", target, "--license", "apache-2.0")
    assert (result.code, result.err) == (0, "")
    assert f"hf upload USER/NAME {target} ." in result.out
    assert {path.name for path in target.iterdir()} == {"README.md", *FILES}
    assert ModelCard.load(target / "README.md").data.license == "apache-2.0"
    again = helpers.run_ibp("export", run, "--hub", target)
    assert "already exists and is not empty" in again.err


def test_the_command_names_the_extra(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(sys.modules, "ibpcore.hub")
    result = helpers.run_ibp("export", run, "--hub", tmp_path / "hub")
    assert result.err == "Error: huggingface_hub is needed: pip install 'ibpcore[hub]'\n"
    assert not (tmp_path / "hub").exists()
