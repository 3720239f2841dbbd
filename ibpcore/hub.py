"""Trained models as repositories of the Hugging Face Hub, with a card of what is certified.

It needs the extra `hub`. A repository contains three files of the run, none of them a pickle,
and the card that is generated from them.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from ibpcore.certification.certificates import MEANINGS, SUMMARY
from ibpcore.certification.formatting import as_text, exact_text
from ibpcore.data.arrays import OWN
from ibpcore.errors import REFUSED, UserError, printable
from ibpcore.experiments.comparison import unlike_preset
from ibpcore.experiments.run_folder import saved_config
from ibpcore.io.files import read_json, write_atomic
from ibpcore.nn.checkpoint import MODEL, fingerprint, load_model
from ibpcore.nn.networks import Classifier
from ibpcore.training.config import RECORDED, TrainConfig
from ibpcore.training.run_files import CONFIG
from ibpcore.visualization.plots.style import style_of

try:
    from huggingface_hub import (
        EvalResult,
        ModelCard,
        ModelCardData,
        ModelHubMixin,
        snapshot_download,
    )
except ImportError:
    raise ImportError("huggingface_hub is needed: pip install 'ibpcore[hub]'") from None

FILES = (MODEL, CONFIG, SUMMARY)
HUB_DATASETS = {
    "mnist": "ylecun/mnist",
    "cifar10": "uoft-cs/cifar10",
    "tinyimagenet": "zh-plus/tiny-imagenet",
}
"""Names on the Hub of the data sets that it has."""


class Pretrained(ModelHubMixin):
    """A model with the settings and results of its run, to share on the Hub or to load from it.

    `save_pretrained(folder)`, `push_to_hub("user/name")` and `from_pretrained(folder or
    "user/name")` are inherited; the first two take `model_card_kwargs={"license": "mit"}`.
    Only safetensors and JSON are read: no code of a repository is run.

    Args:
        folder: of a run, or of a repository.

    Attributes:
        model: the classifier, in evaluation mode.
        config: its training configuration.
        summary: the content of `summary.json`.
        files: the content of each file of the repository, by its name.
        card: the text of the model card, without the licence.

    Raises:
        UserError: a file is missing or damaged, or the summary is of another model.
    """

    def __init__(self, folder: str | Path) -> None:
        folder, path = Path(folder), Path(folder) / SUMMARY
        self.model = load_model(folder / MODEL)
        self.config = saved_config(folder)
        self.summary = read_json(path)
        # In memory, since the mixin deletes config.json before it saves, maybe in this folder.
        self.files = {name: (folder / name).read_bytes() for name in FILES}
        try:
            matching = self.summary["weights"] == fingerprint(self.model)
            self.card = _card(self.model, self.config, self.summary)
        except REFUSED:
            raise UserError(f"{path} is damaged: it is not a summary of a run") from None
        if not matching:
            raise UserError(f"{path} is not of the model beside it")

    def _save_pretrained(self, save_directory: Path) -> None:
        for name, content in self.files.items():
            write_atomic(save_directory / name, content)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **where: Any) -> Pretrained:
        if Path(model_id).is_dir():
            return cls(model_id)
        return cls(snapshot_download(model_id, allow_patterns=list(FILES), **where))

    def generate_model_card(self, license: str | None = None) -> ModelCard:
        """The card, `README.md`, with the licence of the weights as the Hub names it, or none."""
        metadata = _metadata(self.config, self.summary, license).to_yaml()
        chosen = "none was chosen" if license is None else f"`{printable(license)}`"
        return ModelCard(f"---\n{metadata}\n---\n{self.card}\nLicence of the weights: {chosen}.\n")


def _metadata(config: TrainConfig, summary: dict[str, Any], license: str | None) -> ModelCardData:
    """The metadata that the Hub lists and searches by."""
    name = HUB_DATASETS.get(config.dataset)
    measures = {"accuracy": "accuracy", "acr": "average certified radius", "art": "ART"}
    return ModelCardData(
        library_name="ibpcore",
        pipeline_tag="image-classification",
        tags=["certified-robustness", "interval-bound-propagation", config.method],
        datasets=None if name is None else [name],
        metrics=["accuracy"],
        license=license,
        model_name=f"{config.dataset}-{config.method}",
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=name or config.dataset,
                dataset_name=printable(summary["dataset"]),
                dataset_split="test",
                metric_type=measure,
                metric_name=title,
                metric_value=summary[measure],
            )
            for measure, title in measures.items()
        ],
    )


CARD = """# {method} on {dataset}

An image classifier with a proof: for an image of certified radius r, no change of any pixel by at most r can change its prediction. It was trained by {method} with ibpcore {version}, on {dataset}: images of {shape}, {classes} classes.

| on {samples} test images | |
|---|---|
{rows}

ACR is the average certified radius as a share of ε_max = {epsilon_max}, ART = √(accuracy · ACR). *Certified at r* is the share of the test images that are classified correctly and have a proof for r.

## What the certificates guarantee

Pixels are in [0, 1]; the network normalises them itself. The perturbation is measured in the l∞ norm, {ball}. Radii above ε_max were not searched for. Bounds were computed by `{bound}`. The claim is `{claim}`: {meaning}. Nothing is claimed about other perturbations or about images that were not certified.

## Use

```sh
pip install 'ibpcore[hub]'
```

```python
from ibpcore.hub import Pretrained

model = Pretrained.from_pretrained("THIS/REPOSITORY").model  # images (B, C, H, W) to logits
```

`ibp certify model.safetensors` certifies test images again, and `ibpcore.certified_radii` any others. Loading the repository runs no code from it: it contains safetensors and JSON only.

## Reproduce

```{language}
{command}
```

{extended}The data set was read as "{dataset}".
"""  # noqa: E501
OPTION_NAMES = {"select_weights": "select", "start": "from"}
"""The options of `ibp train` that are not called as their settings."""
BALLS = {True: "and the perturbed image stays in [0, 1]", False: "with pixels of any value"}


def _card(model: Classifier, config: TrainConfig, summary: dict[str, Any]) -> str:
    """The text of the card, without the licence."""
    rows = [("accuracy", summary["accuracy"]), ("ACR", summary["acr"]), ("ART", summary["art"])]
    rows += [(f"certified at {r}", s) for r, s in summary["certified_accuracy"].items()]
    return CARD.format(
        method=style_of(config.method).title,
        dataset=printable(summary["dataset"]),
        version=printable(summary["ibpcore"]),
        shape="x".join(map(str, model.in_shape)),
        classes=model.classes,
        samples=int(summary["samples"]),
        rows="\n".join(f"| {printable(name)} | {100 * share:.2f} % |" for name, share in rows),
        epsilon_max=as_text(summary["epsilon_max"]),
        ball=BALLS[summary["clip"]],
        bound=printable(summary["bound"]),
        claim=summary["claim"],
        meaning=MEANINGS[summary["claim"]],
        language="python" if config.dataset == OWN else "sh",
        command=training_call(config) if config.dataset == OWN else training_command(config),
        extended=_extended(config),
    )


def _extended(config: TrainConfig) -> str:
    """A paragraph on the weights of a run that was resumed with other epochs; else empty."""
    if not config.extended_at:
        return ""
    epochs = ", ".join(map(str, config.extended_at))
    return (
        f"The number of epochs was changed after epoch {epochs}, by `ibp train --resume RUN"
        " --epochs N`. There the learning rate began its schedule anew: the command above alone"
        " gives other weights.\n\n"
    )


def training_call(config: TrainConfig) -> str:
    """The call in Python that makes a run of images of one's own, see `ibpcore.train`."""
    given = {name: value for name, value in _chosen(config).items() if value is not None}
    given |= {"start": "MODEL"} if config.start else {}
    settings = "".join(f", {name}={value!r}" for name, value in given.items())
    return f"ibpcore.train((images, labels), {config.method!r}{settings})"


def training_command(config: TrainConfig) -> str:
    """The `ibp train` command of a configuration, with every setting that is not the preset's.

    A run that started from a saved model is one `--from MODEL`.
    """
    words = ["ibp", "train", "--dataset", config.dataset, "--method", config.method]
    if config.dataset == "imagefolder":
        words += ["--data-dir", "FOLDER"]
    for name, value in _chosen(config).items():
        option = OPTION_NAMES.get(name, name.replace("_", "-"))
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None:
            words += [f"--{option}", _option_value(name, value)]
    return shlex.join(words)


def _chosen(config: TrainConfig) -> dict[str, object]:
    """The settings to choose that differ from the preset."""
    return {name: v for name, v in unlike_preset(config).items() if name not in RECORDED}


def _option_value(name: str, value: object) -> str:
    """A setting as its option takes it."""
    if name == "start":
        return "MODEL"
    if name == "epsilon_max" and isinstance(value, float):
        return exact_text(value)
    return ":".join(map(str, value)) if isinstance(value, tuple) else str(value)
