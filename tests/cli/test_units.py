"""Every command prints radii in the unit in which epsilon_max was typed."""

import json
import re

import pytest
from helpers import run_ibp, write_image

TINY = ("--epochs", 3, "--width", 2, "--hidden", 8, "--limit-train", 640, "--limit-test", 20)
QUICK = ("--samples", 5, "--grid", 9, "--line-points", 5, "--bisections", 2)
PGD = ("--steps", 2, "--restarts", 1, "--no-autoattack")


def printed(folder, epsilon_max):
    """What the commands print of a run, by command."""
    run, image = folder / "run", folder / "image.png"
    write_image(image, 200, (8, 8))
    commands = {
        "train": ("train", *TINY, "--epsilon-max", epsilon_max, "--out", run, "--device", "cpu"),
        "certify": ("certify", run),
        "predict": ("predict", image, "--model", run, "--html", folder / "page.html"),
        "attack": ("attack", run, *PGD),
        "inspect": ("inspect", run, *QUICK),
        "report": ("report", run, "--out", folder / "report"),
        "dry run": ("train", "--dry-run", *TINY, "--epsilon-max", epsilon_max, "--device", "cpu"),
    }
    texts = {}
    for name, command in commands.items():
        code, texts[name], err = run_ibp(*command)
        assert (code, err) == (0, ""), name
    return texts


@pytest.mark.parametrize(("typed", "said"), [("16/255", "16/255 (0.06274)"), ("0.08", "0.08")])
def test_one_unit_a_place(tmp_path, typed, said):
    texts = printed(tmp_path, typed)
    levels = "/" in typed
    for name in ("train", "certify", "predict", "attack", "inspect"):
        assert f", epsilon_max {said}" in texts[name], name
    scheduled = re.findall(r"accuracy +\S+ %  epsilon (\S+)", texts["train"])
    assert len(scheduled) == 3
    assert {("/255" in epsilon) for epsilon in scheduled} == {levels}
    for name, text in texts.items():
        assert "0.0627450" not in text, name
        assert ("/255" in text) == levels, name
    quarters = ["4/255", "8/255", "12/255", "16/255"]
    expected = quarters if levels else ["0.025", "0.05", "0.075", "0.08"]
    for name, start in (("train", "certified at "), ("certify", "certified at ")):
        assert re.findall(rf"{start}(\S+)", texts[name]) == expected
    assert re.findall(r"perturbed by up to (\S+)", texts["attack"]) == expected
    head = next(line for line in texts["report"].splitlines() if "training, s" in line)
    assert re.findall(r"at (\S+)", head) == expected
    assert f"Unlike the presets, in all runs: epsilon_max {typed}," in texts["report"]
    line = f'epsilon_max = "{typed}"' if levels else f"epsilon_max = {typed}"
    assert line in texts["dry run"].splitlines()
    # Files hold pixel units.
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["epsilon_max"] == (16 / 255 if levels else 0.08)
    assert list(summary["certified_accuracy"]) == expected
