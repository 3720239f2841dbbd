"""Models and run states on disk: bit-exact round trips, whole files or none, no code run."""

import contextlib
import errno
import io
import os
import pickle
import random
import stat
import zipfile
from pathlib import Path

import numpy as np
import oracle
import pytest
import safetensors.torch
import torch
from torch import nn

from ibpcore import UserError, cnn7, load_model, save_model
from ibpcore.bounds.options import BoundOptions
from ibpcore.certification.certify import CertificationOptions, certify
from ibpcore.certification.image_files import certify_pictures
from ibpcore.data.image_files import Pictures
from ibpcore.data.images import ImageSet
from ibpcore.io import files
from ibpcore.io.files import write_atomic
from ibpcore.nn import IntervalFlatten, IntervalLinear, IntervalSlice
from ibpcore.nn.checkpoint import check_saved, read_facts
from ibpcore.nn.networks import Network
from ibpcore.training.state import load_state, save_state


def used_model(in_shape=(3, 8, 8), **options):
    """Weights and running statistics that no initialisation would give."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = cnn7(in_shape, 4, width=2, hidden=5, **options)
    images = torch.rand(8, *in_shape, generator=generator)
    return oracle.randomize_batch_norm(model, images, generator).eval()


def bits(model):
    return {name: t.numpy().tobytes() for name, t in model.state_dict().items()}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Models


@pytest.mark.parametrize(
    "normalisation", [{}, {"mean": (0.1, 0.2, 1 / 3), "std": (0.3, 0.7, 1 / 7)}]
)
def test_a_model_comes_back_bit_for_bit(tmp_path, normalisation):
    model = used_model(**normalisation)
    save_model(model, tmp_path / "m.safetensors")
    again = load_model(tmp_path / "m.safetensors")
    assert bits(again) == bits(model)
    assert again.architecture == model.architecture
    assert not again.training
    images = torch.rand(3, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


def test_a_path_may_be_text(tmp_path):
    save_model(used_model(), f"{tmp_path}/m.safetensors")
    load_model(f"{tmp_path}/m.safetensors")
    assert read_facts(f"{tmp_path}/m.safetensors") == {}
    assert names(tmp_path) == ["m.safetensors"]


def test_a_file_may_lie_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(used_model(), "m.safetensors")
    assert names(tmp_path) == ["m.safetensors"]


def test_saving_does_not_change_the_model(tmp_path):
    model = used_model().train()
    before = bits(model)
    save_model(model, tmp_path / "m")
    assert bits(model) == before
    assert model.training


def test_saving_again_replaces(tmp_path):
    first, second = used_model(), used_model()
    nn.init.ones_(second[0].weight)
    for model in (first, second):
        save_model(model, tmp_path / "m")
    assert bits(load_model(tmp_path / "m")) == bits(second)
    assert names(tmp_path) == ["m"]


def test_facts_come_back(tmp_path):
    facts = {
        "training": {"epsilon_max": 8.8 / 255, "warmup": [1, 20], "limit_train": None},
        "dataset_title": "naïve 猫",
        "classes": ["a", "b"],
        "epochs_trained": 3,
        "flag": True,
    }
    save_model(used_model(), tmp_path / "m", **facts)
    assert read_facts(tmp_path / "m") == facts


def parameterless():
    """Logits that are the first three pixels."""
    return Network([IntervalFlatten(), IntervalSlice([(0, 3, 1)])], (1, 2, 2)).eval()


def test_a_network_without_parameters_comes_back_and_can_be_certified(tmp_path):
    model = parameterless()
    save_model(model, tmp_path / "m.safetensors")
    again = load_model(tmp_path / "m.safetensors")
    images = torch.tensor([[51, 153, 0, 255], [255, 0, 0, 0]], dtype=torch.uint8).view(2, 1, 2, 2)
    assert torch.equal(again(images / 255), model(images / 255))
    options = CertificationOptions(1.0, bounds=BoundOptions(elide=False))
    found = certify(again, ImageSet(images, torch.tensor([1, 0])), options)
    # Half the distance between the two largest pixels.
    torch.testing.assert_close(found.radius, torch.tensor([0.2, 0.5]).double(), rtol=2e-4, atol=0)
    pictures = Pictures([Path("a"), Path("b")], images, [None, None], [(), ()], [])
    assert certify_pictures(again, pictures, options).label.tolist() == [1, 0]


def test_sizes_may_be_numbers_of_numpy(tmp_path):
    """As `np.prod(shape)` gives them."""
    layers = [IntervalFlatten(), IntervalLinear(np.prod((1, 2, 2)), np.int64(3))]
    save_model(Network(layers, (1, 2, 2)), tmp_path / "m", radius=np.float32(0.5))
    assert load_model(tmp_path / "m").classes == 3
    assert read_facts(tmp_path / "m") == {"radius": 0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.half(), "0.weight is torch.float16"),
        (lambda model: model[0].double(), "0.weight is torch.float64"),
        (lambda model: model.to("meta"), "0.weight is no dense tensor in memory"),
        (lambda model: model[0].weight.data[:1].fill_(torch.nan), "0.weight .*not finite"),
        (lambda model: model[1].running_var.fill_(torch.inf), "1.running_var .*not finite"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, change, message):
    """The file that was there stays."""
    model, path = used_model(), tmp_path / "m.safetensors"
    save_model(model, path)
    before = path.read_bytes()
    change(model)
    with pytest.raises(UserError, match=message):
        save_model(model, path)
    with pytest.raises(UserError, match=message):
        check_saved(model)
    assert path.read_bytes() == before
    assert names(tmp_path) == ["m.safetensors"]


def test_the_file_is_plain_safetensors(tmp_path):
    """Others can read the weights under the names of the state dict."""
    model = used_model()
    save_model(model, tmp_path / "m")
    tensors = safetensors.torch.load_file(tmp_path / "m")
    assert {name: t.numpy().tobytes() for name, t in tensors.items()} == bits(model)


def test_only_a_cnn7_can_be_saved(tmp_path):
    with pytest.raises(UserError, match=r"cannot be saved: call ibpcore\.convert"):
        save_model(nn.Linear(2, 2), tmp_path / "m")
    assert names(tmp_path) == []


def changed(content, seed):
    """Three of the first thousand bytes replaced."""
    generator, result = random.Random(seed), bytearray(content)
    for _ in range(3):
        result[generator.randrange(1000)] = generator.randrange(256)
    return bytes(result)


def test_a_truncated_model_is_a_clear_error(tmp_path):
    save_model(used_model(), tmp_path / "m")
    content = (tmp_path / "m").read_bytes()
    for length in (*range(20), *range(20, len(content), 97), len(content) - 1):
        (tmp_path / "m").write_bytes(content[:length])
        with pytest.raises(UserError, match="m is not an intact safetensors file"):
            load_model(tmp_path / "m")


def test_a_changed_model_is_a_clear_error_or_fits(tmp_path):
    """Whatever happens to the header; the weights carry no checksum."""
    save_model(used_model(), tmp_path / "m", training={})
    content = (tmp_path / "m").read_bytes()
    for seed in range(100):
        (tmp_path / "m").write_bytes(changed(content, seed))
        with contextlib.suppress(UserError):
            load_model(tmp_path / "m")
        with contextlib.suppress(UserError):
            read_facts(tmp_path / "m")


# Files


def fail(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupt(*_, **__):
    raise KeyboardInterrupt


class FullDisk(io.FileIO):
    """Takes half of what it is given."""

    def write(self, content):
        super().write(content[: len(content) // 2])
        fail()


def break_stage(monkeypatch, stage, how):
    if stage == "os.fdopen":
        monkeypatch.setattr(os, "fdopen", FullDisk)
    elif stage == "tempfile.mkstemp":
        monkeypatch.setattr(files.tempfile, "mkstemp", how)
    else:
        monkeypatch.setattr(os, stage.removeprefix("os."), how)


STAGES = ["tempfile.mkstemp", "os.fdopen", "os.fsync", "os.chmod", "os.replace"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("old", [b"old", None])
def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch, stage, old):
    file = tmp_path / "file.bin"
    if old is not None:
        file.write_bytes(old)
    before = names(tmp_path)
    with monkeypatch.context() as patch:
        break_stage(patch, stage, fail)
        with pytest.raises(OSError, match="No space left") as caught:
            write_atomic(file, b"new content")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(file), "not the temporary file, which nobody knows"
    assert names(tmp_path) == before
    assert old is None or file.read_bytes() == old


@pytest.mark.parametrize("stage", ["os.fsync", "os.chmod", "os.replace"])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, stage):
    file = tmp_path / "file.bin"
    file.write_bytes(b"old")
    with monkeypatch.context() as patch:
        break_stage(patch, stage, interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_atomic(file, b"new content")
    assert names(tmp_path) == ["file.bin"]
    assert file.read_bytes() == b"old"


@pytest.mark.parametrize("stage", STAGES)
def test_a_failing_save_leaves_model_and_state(tmp_path, monkeypatch, stage):
    model = used_model()
    save_model(model, tmp_path / "m", epochs_trained=1)
    save_state(tmp_path / "s", {"epoch": 1})
    with monkeypatch.context() as patch:
        break_stage(patch, stage, fail)
        with pytest.raises(OSError, match="No space left"):
            save_model(cnn7((1, 4, 4), 2, 1, 1), tmp_path / "m", epochs_trained=2)
        with pytest.raises(OSError, match="No space left"):
            save_state(tmp_path / "s", {"epoch": 2})
    assert bits(load_model(tmp_path / "m")) == bits(model)
    assert read_facts(tmp_path / "m") == {"epochs_trained": 1}
    assert load_state(tmp_path / "s") == {"epoch": 1}
    assert names(tmp_path) == ["m", "s"]


def test_the_content_is_on_disk_before_it_has_the_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, r=real: (calls.append(n), r(*a)))
    write_atomic(tmp_path / "file", b"content")
    assert calls == ["fsync", "replace", "fsync"], "then the folder, that it keeps the name"
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write_atomic(tmp_path / "no" / "file", b"")
    assert caught.value.filename == str(tmp_path / "no" / "file")


def test_a_folder_of_that_name_stays(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_atomic(tmp_path / "taken", b"")
    assert names(tmp_path) == ["taken"]


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_the_mode_is_what_the_umask_leaves(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_atomic(tmp_path / "file", b"")
        assert os.umask(mask) == mask, "the umask itself stays as it was"
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


# States of runs


def test_a_state_comes_back(tmp_path):
    state = {
        "model": used_model().state_dict(),
        "odd": torch.tensor([0.1, -0.0, torch.inf, torch.nan, 1e-45]),
        "history": [{"epoch": 1, "loss": 0.1}],
        "epoch": 1,
    }
    save_state(tmp_path / "s", state)
    again = load_state(tmp_path / "s")
    assert again["epoch"] == 1
    assert again["history"] == state["history"]
    assert again["odd"].numpy().tobytes() == state["odd"].numpy().tobytes()
    assert again["model"].keys() == state["model"].keys()
    assert all(torch.equal(again["model"][k], v) for k, v in state["model"].items())
    assert names(tmp_path) == ["s"]


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def zipped(path, content):
    """The same pickle in the place where torch.save keeps its own."""
    torch.save({}, path)
    buffer = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith("data.pkl") else old.read(name))
    path.write_bytes(buffer.getvalue())


@pytest.mark.parametrize("how", ["torch.save", "legacy", "pickle", "zip"])
def test_a_state_never_runs_code(tmp_path, how):
    file, marker = tmp_path / "s", tmp_path / "sprung"
    trap = {"epoch": 1, "model": Trap(marker)}
    if how == "pickle":
        file.write_bytes(pickle.dumps(trap))
    elif how == "zip":
        zipped(file, pickle.dumps(trap, protocol=2))
    else:
        torch.save(trap, file, _use_new_zipfile_serialization=how != "legacy")
    with pytest.raises(UserError, match="s is damaged"):
        load_state(file)
    assert not marker.exists()
    torch.load(file, weights_only=False) if how != "pickle" else pickle.loads(file.read_bytes())
    assert marker.exists(), "the trap itself works"


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\3\4", b"{}", pickle.dumps({"epoch": 1})])
def test_a_foreign_state_is_a_clear_error(tmp_path, content):
    (tmp_path / "s").write_bytes(content)
    with pytest.raises(UserError, match="s is damaged: it does not hold the state of a run"):
        load_state(tmp_path / "s")


def test_a_state_is_a_dictionary(tmp_path):
    torch.save([1, 2], tmp_path / "s")
    with pytest.raises(UserError, match="does not hold the state of a run"):
        load_state(tmp_path / "s")


def test_a_missing_state_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"there is nothing to resume: .*s is missing"):
        load_state(tmp_path / "s")


def test_a_truncated_state_is_a_clear_error(tmp_path):
    save_state(tmp_path / "s", {"model": used_model().state_dict(), "epoch": 1})
    content = (tmp_path / "s").read_bytes()
    for length in (*range(0, len(content), 301), len(content) - 1):
        (tmp_path / "s").write_bytes(content[:length])
        with pytest.raises(UserError, match="does not hold the state of a run"):
            load_state(tmp_path / "s")


def test_a_changed_state_is_a_clear_error_or_a_dictionary(tmp_path):
    save_state(tmp_path / "s", {"model": used_model().state_dict(), "epoch": 1})
    content = (tmp_path / "s").read_bytes()
    for seed in range(100):
        (tmp_path / "s").write_bytes(changed(content, seed))
        with contextlib.suppress(UserError):
            assert isinstance(load_state(tmp_path / "s"), dict)
