"""Exit codes: 2 for what is wrong in the command line, 1 for what is wrong elsewhere."""

import pytest
from helpers import run_ibp

TRAINING = (
    ("--kappa", "2"),
    ("--epochs", "0"),
    ("--lr", "0"),
    ("--batch-size", "1"),
    ("--width", "0"),
    ("--architecture", "no layer"),
    ("--model", "no colon"),
    ("--warmup", "5:2"),
    ("--warmup", "x"),
    ("--eps", "2"),
    ("--xtol", "0"),
    ("--padding", "-1"),
    ("--validation", "5000"),
    ("--image-size", "4"),
    ("--train-bound", "x"),
    ("--device", "tpu"),
    ("--threads", "0"),
)
CERTIFYING = (
    ("--eps", "0"),
    ("--xtol", "0"),
    ("--rtol", "nan"),
    ("--bound", "crown,ibp"),
    ("--claim", "x"),
    ("--slope-steps", "-1"),
    ("--device", "cuda:x"),
    ("--threads", "2000"),
)
BAD = {
    "train": (*TRAINING, ("--kappa", "nan"), ("--method", "standard", "--adaptive")),
    "sweep": (*TRAINING, ("--seeds", "0"), ("--kappa", "0:1"), ("--jobs", "0")),
    "search": (*TRAINING, ("--budget", "0"), ("--objectives", "acr"), ("--certify", "-1")),
    "certify run": (*CERTIFYING, ("--limit-test", "0"), ("--dataset", "x")),
    "predict a.png --model run": CERTIFYING,
    "attack run": (("--steps", "0"), ("--restarts", "0"), ("--seed", "-1"), ("--device", "x")),
    "inspect run": (("--grid", "4"), ("--line-length", "0"), ("--bound", "x"), ("--seed", "-1")),
    "verify a.onnx b.vnnlib": (("--timeout", "0"), ("--starts", "-1"), ("--seed", "-1")),
    "export run --onnx x.onnx": (("--eps", "2"), ("--limit", "0"), ("--timeout", "x")),
    "export run": ((), ("--onnx", "net.txt")),
    "import net.pt --out x": (("--in-shape", "3,32"), ("--crop", "0"), ("--architecture", "x")),
    "completion": (("csh",),),
    "doctor": (("--device", "x"),),
    "report": ((),),
}


@pytest.mark.parametrize(
    ("command", "given"), [(command, given) for command in BAD for given in BAD[command]]
)
def test_a_bad_value_exits_with_2(tmp_path, monkeypatch, command, given):
    monkeypatch.chdir(tmp_path)
    done = run_ibp(*command.split(), *given)
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1), done.err
    assert done.err.startswith("Error: ")
    assert not any(tmp_path.iterdir())


MISSING = (
    "train --config none.toml",
    "train --resume none",
    "search --resume none",
    "search --space none.toml",
    "train --dataset mnist --data-dir none",
    "certify none",
    "certify --resume none",
    "predict none.png --model none",
    "attack none",
    "inspect none",
    "verify none.onnx none.vnnlib",
    "export none --onnx x.onnx",
    "import none.pt --out x.safetensors --dataset mnist",
    "report none",
)


@pytest.mark.parametrize("command", MISSING)
def test_what_is_missing_exits_with_1(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    done = run_ibp(*command.split())
    assert (done.code, done.out, len(done.err.splitlines())) == (1, "", 1), done.err
    assert "none" in done.err
