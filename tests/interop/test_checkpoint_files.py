"""Formats of checkpoints: read as PyTorch reads them, called what they are, and never run."""

import collections
import gzip
import io
import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
import torch
from torch import nn

import ibpcore
from ibpcore import UserError
from ibpcore.interop.exporting.onnx import to_onnx
from ibpcore.interop.importing.files import read_checkpoint
from ibpcore.io.pickles import Unknown
from ibpcore.io.torch_files import is_torch_file, read_torch_file

DAMAGED = "it is damaged, or not a PyTorch checkpoint"


def saved(content, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


WHOLE = torch.arange(12.0)
CONTENTS = {
    "views": {"a": WHOLE[2:8].view(2, 3), "b": WHOLE[::3], "t": WHOLE.view(3, 4).t()},
    "types": {str(t): torch.ones(3).to(t) for t in (torch.float64, torch.half, torch.int8)},
    "more types": {str(t): torch.ones(2).to(t) for t in (torch.bool, torch.bfloat16, torch.uint8)},
    "nothing": {"empty": torch.zeros(0), "scalar": torch.tensor(2.5), "none": None},
    "values": {"list": [1, -2, 2**40, -(2**70)], "tuple": (True, 0.5, "é"), "dict": {3: {}}},
    "collections": collections.OrderedDict(a=collections.Counter("aab"), b=torch.Size([1, 2])),
    "an optimiser": torch.optim.Adam(nn.Linear(2, 1).parameters()).state_dict(),
    "parameters": dict(nn.BatchNorm2d(2).named_parameters()),
}


def agree(found, expected) -> None:
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=0)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for name, value in expected.items():
            agree(found[name], value)
    else:
        assert found == expected


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("what", CONTENTS)
def test_as_pytorch_reads_them(what, zipped):
    content = saved(CONTENTS[what], zipped)
    assert is_torch_file(content)
    agree(read_torch_file(content), CONTENTS[what])
    agree(read_torch_file(content), torch.load(io.BytesIO(content), weights_only=True))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_every_protocol(protocol):
    buffer = io.BytesIO()
    torch.save(CONTENTS, buffer, pickle_protocol=protocol)
    agree(read_torch_file(buffer.getvalue()), CONTENTS)


@pytest.mark.parametrize("zipped", [True, False])
def test_modules_are_not_made(zipped):
    """Not even looked up: the class is gone."""

    class Gone(nn.Linear):
        pass

    Gone.__qualname__ = "Gone"
    globals()["Gone"] = Gone
    try:
        with mock.patch("warnings.warn"):  # in the old format it stores the source of the class
            content = saved(Gone(2, 1), zipped)
    finally:
        del globals()["Gone"]
    with pytest.raises(AttributeError):
        torch.load(io.BytesIO(content), weights_only=False)
    module = read_torch_file(content)
    assert (type(module), module.kind) == (Unknown, "Gone")
    assert module.state["_parameters"]["weight"].shape == (1, 2)


# Pickles that mean harm


def pickled(content: bytes) -> bytes:
    """`content` in the place where torch.save keeps its pickle, another file's tensors beside."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(saved({"w": torch.arange(9.0)}, True))) as old,
        zipfile.ZipFile(buffer, "w") as new,
    ):
        for name in old.namelist():
            new.writestr(name, content if name.endswith("/data.pkl") else old.read(name))
    return buffer.getvalue()


CALLS = {
    "bytearray": b"c__builtin__\nbytearray\nJ\x00\x00\x00\x70\x85R",
    "a tensor": b"ctorch\nFloatTensor\nJ\x00\x00\x00\x70\x85R",
    "a codec that doubles bytes": (
        b"c_codecs\nencode\nc_codecs\nencode\nX\x02\x00\x00\x00abX\x06\x00\x00\x00latin1\x86R"
        b"X\x03\x00\x00\x00hex\x86R"
    ),
    "a module of the system": b"cposix\nsystem\nX\x04\x00\x00\x00true\x85R",
    "a class of the package": b"cibpcore.nn.cnn7\nCNN7\n)\x81",
}


@pytest.mark.parametrize("what", CALLS)
def test_a_call_makes_a_stand_in(what):
    content = pickled(b"\x80\x02}X\x01\x00\x00\x00a" + CALLS[what] + b"s.")
    assert type(read_torch_file(content)["a"]) is Unknown


HOSTILE = {
    "no end": b"}X\x01\x00\x00\x00a",
    "a call of a call": b"cos\nmkdir\n)R)R.",
    "a call of text": b"X\x01\x00\x00\x00a)R.",
    "an empty stack": b"R.",
    "a mark that is not there": b"}t.",
    "a key whose hash has no end": b"})" + b"\x85" * 200_000 + b"Ns.",
    "a list as a key": b"}]Ns.",
    "half a pair": b"}(Nu.",
    "a memo that is not there": b"j\xff\xff\xff\x7f.",
    "an extension": b"\x82\x01.",
    "text that ends early": b"X\xff\xff\xff\x7fa.",
    "a persistent object": b"NQ.",
    "a huge storage": (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        b"\x8a\x05\x00\x00\x00\x00\x10tQ."
    ),
    "a record that is not there": (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x007X\x03\x00\x00\x00cpuK\x01tQ."
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_pickles(what):
    with pytest.raises(UserError, match=DAMAGED):
        read_torch_file(pickled(b"\x80\x02" + HOSTILE[what]))


def test_a_pickle_of_very_many_operations():
    content = pickled(b"\x80\x02" + b"N\x85" * 50 + b".")
    read_torch_file(content)
    with mock.patch("ibpcore.io.pickles.MOST_CODES", 50), pytest.raises(UserError, match=DAMAGED):
        read_torch_file(content)


def test_a_record_that_stands_for_many():
    """Storages of one record under many names would take more than the file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        keys = [str(number).encode() for number in range(10)]
        parts = [
            b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x00" + key
            for key in keys
        ]
        ends = b"X\x03\x00\x00\x00cpuM\x00\x04tQ"
        archive.writestr("a/data.pkl", b"\x80\x02(" + ends.join([*parts, b"t."]))
        archive.writestr("a/data/0", bytes(4096))
        for key in keys[1:]:
            record = zipfile.ZipInfo(f"a/data/{key.decode()}")
            archive.writestr(record, b"")
            first = archive.getinfo("a/data/0")
            for name in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(record, name, getattr(first, name))
    with pytest.raises(UserError, match=DAMAGED):
        read_torch_file(buffer.getvalue())


# The format before PyTorch 1.6


def with_pickles(content: bytes, change) -> bytes:
    """A file of the old format, with its five pickles changed."""
    file, parts, start = io.BytesIO(content), [], 0
    for _ in range(5):
        list(pickletools.genops(file))
        parts.append(content[start : file.tell()])
        start = file.tell()
    return b"".join(change(parts)) + content[start:]


LEGACY = {
    "no keys": lambda parts: [*parts[:4], pickle.dumps([], 2)],
    "a key twice": lambda parts: [*parts[:4], pickle.dumps(2 * pickle.loads(parts[4]), 2)],
    "another protocol": lambda parts: [parts[0], pickle.dumps(1002, 2), *parts[2:]],
    "another machine": lambda parts: [
        *parts[:2],
        pickle.dumps({**pickle.loads(parts[2]), "little_endian": False}, 2),
        *parts[3:],
    ],
    "a larger storage": lambda parts: [
        *parts[:3],
        parts[3].replace(b"K\x09N", b"K\x0aN"),
        parts[4],
    ],
    "a huge storage": lambda parts: [
        *parts[:3],
        parts[3].replace(b"K\x09N", b"\x8a\x05\x00\x00\x00\x00\x10N"),
        parts[4],
    ],
    "nothing behind the magic number": lambda parts: parts[:1],
}


@pytest.mark.parametrize("what", LEGACY)
def test_damaged_files_of_the_old_format(what):
    content = saved({"w": torch.arange(9.0)}, False)
    assert with_pickles(content, lambda parts: parts) == content
    changed = with_pickles(content, LEGACY[what])
    assert changed != content
    with pytest.raises(UserError, match=DAMAGED):
        read_torch_file(changed)


def test_a_file_of_python_2_and_pytorch_0_3():
    """Short strings of bytes, and an older function for tensors."""
    content = saved({"w": torch.arange(9.0).view(3, 3)}, False)

    def older(parts):
        text = parts[3].replace(b"_rebuild_tensor_v2", b"_rebuild_tensor")
        text = text.replace(b"X\x01\x00\x00\x00w", b"U\x01w")
        return [*parts[:3], text.replace(b"X\x07\x00\x00\x00storage", b"U\x07storage"), parts[4]]

    changed = with_pickles(content, older)
    assert len(changed) == len(content) - 3 - 3 - 3
    agree(read_torch_file(changed), {"w": torch.arange(9.0).view(3, 3)})


def test_tensors_of_types_that_networks_do_not_have():
    """They are no error as long as nobody asks for them."""
    content = saved({"w": torch.ones(2), "v": torch.ones(2, dtype=torch.uint16)}, True)
    found = read_torch_file(content)
    agree(found["w"], torch.ones(2))
    assert type(found["v"]) is Unknown


def test_a_truncated_file_of_the_old_format():
    content = saved({"w": torch.arange(9.0), "v": torch.arange(3)}, False)
    for end in range(len(content)):
        with pytest.raises(UserError):
            read_checkpoint(content[:end])


# Other formats


def test_safetensors_come_by_name():
    tensors = {"b": torch.ones(2), "a.10": torch.zeros(3).double(), "a.2": torch.ones(1).half()}
    found = read_checkpoint(safetensors.torch.save(tensors))
    assert found.by_name
    agree(found.objects, {name: tensors[name] for name in ("a.10", "a.2", "b")})


OTHERS = {
    b"": "it is damaged, or neither a file of torch.save nor",
    b"hello": "it is damaged, or neither",
    b"PK\3\4": "it is damaged, or neither",
    b"\x08\x06" * 40: "it is damaged, or neither",
    pickle.dumps({"epoch": 1}): "is a pickle, but not written by torch.save",
    gzip.compress(b"weights"): "is compressed by gzip: unpack it first",
    b"\x89HDF\r\n\x1a\n": "is an HDF5 file, such as Keras writes",
    b"\x93NUMPY\1\0": "is a NumPy array",
    b"version https://git-lfs.github.com/spec/v1\n": "is a pointer of Git LFS",
    b"\n<!DOCTYPE html>": "is a web page, not a checkpoint",
    b"x" * 257 + b"ustar\x0000": "is a tar archive: unpack it first",
    b"\x02" + b"\0" * 7 + b"{x": "it is a damaged safetensors file",
    b"\x02" + b"\0" * 7 + b"[]": "it is damaged, or neither",
}


@pytest.mark.parametrize("content", OTHERS, ids=range(len(OTHERS)))
def test_other_files_are_called_what_they_are(content):
    with pytest.raises(UserError, match=re.escape(OTHERS[content])):
        read_checkpoint(content)


def test_files_of_this_package_are_called_what_they_are(tmp_path: Path):
    model = ibpcore.cnn7((1, 8, 8), 10, 2, 2).eval()
    ibpcore.save_model(model, tmp_path / "own")
    with pytest.raises(UserError, match="it is a model file of ibpcore already"):
        read_checkpoint((tmp_path / "own").read_bytes())
    content = to_onnx(model)
    with pytest.raises(UserError, match="it is an ONNX network, not a checkpoint"):
        read_checkpoint(content)
    with pytest.raises(UserError, match="it is damaged, or neither"):
        read_checkpoint(content[:-1])


def test_archives_of_other_programs_are_called_what_they_are(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("weights.npy", b"")
    with zipfile.ZipFile(tmp_path / "jit", "w") as archive:
        archive.writestr("m/data.pkl", pickle.dumps({}, 2))
        archive.writestr("m/constants.pkl", pickle.dumps((), 2))
    with pytest.raises(UserError, match="it is a TorchScript archive: save the state dict"):
        read_checkpoint((tmp_path / "jit").read_bytes())
    with pytest.raises(UserError, match=r"it is a zip archive, but not one of torch\.save"):
        read_checkpoint((tmp_path / "zip").read_bytes())
