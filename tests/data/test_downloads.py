"""Downloads from a server in this process: resumed, checked, and unpacked whole or not at all."""

import gzip
import hashlib
import http.server
import io
import os
import re
import stat
import tarfile
import threading
import zipfile

import numpy as np
import pytest
from helpers import WNIDS, idx_bytes, run_ibp, snapshot, write_mnist, write_tinyimagenet

from ibpcore import UserError
from ibpcore.data import downloads, sources
from ibpcore.data.downloads import Archive, fetch, install, unpack
from ibpcore.data.sources import Request, load_dataset

CONTENT = bytes(range(256)) * 40
CUT = 3000


class Server(http.server.ThreadingHTTPServer):
    """Gives `content` to whoever asks.

    Attributes:
        ranges: whether it can give a part of it.
        cut: it hangs up after so many bytes of an answer.
        asked: the Range of each request.
    """

    content, ranges, cut = CONTENT, True, None

    def __init__(self):
        self.asked = []
        super().__init__(("127.0.0.1", 0), Answer)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/file"


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append(wanted)
        if self.path == "/gone":
            self.send_error(404)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and server.ranges else 0
        if start and start >= len(server.content):
            self.send_error(416)
            return
        part = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(part)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-/{len(server.content)}")
        self.end_headers()
        self.wfile.write(part[: server.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def archive(server, name="file.bin", content=CONTENT):
    return Archive(name, (server.url,), hashlib.md5(content).hexdigest())


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_fetched_once(tmp_path, server):
    for _ in range(2):
        assert fetch(archive(server), tmp_path).read_bytes() == CONTENT
    assert server.asked == [None]
    assert names(tmp_path) == ["file.bin"]


def test_an_interrupted_download_goes_on(tmp_path, server):
    server.cut = CUT
    with pytest.raises(UserError, match=r"interrupted after 3000 of 10240 bytes; the same command"):
        fetch(archive(server), tmp_path)
    assert names(tmp_path) == ["file.bin.part"]
    assert (tmp_path / "file.bin.part").read_bytes() == CONTENT[:CUT]
    with pytest.raises(UserError, match=r"interrupted after 6000 of 10240 bytes"):
        fetch(archive(server), tmp_path)
    server.cut = None
    assert fetch(archive(server), tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, f"bytes={CUT}-", f"bytes={2 * CUT}-"]
    assert names(tmp_path) == ["file.bin"]


def test_a_server_without_parts_starts_anew(tmp_path, server):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:CUT])
    server.ranges = False
    assert fetch(archive(server), tmp_path).read_bytes() == CONTENT


def test_a_download_that_was_whole_when_it_was_killed(tmp_path, server):
    """Nothing is lacking: the server says that there is no such part."""
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    assert fetch(archive(server), tmp_path).read_bytes() == CONTENT
    assert names(tmp_path) == ["file.bin"]


@pytest.mark.parametrize("left", [None, b"junk", b"junk" * 9999], ids=["new", "resumed", "longer"])
def test_a_wrong_checksum(tmp_path, server, left):
    if left is not None:
        (tmp_path / "file.bin.part").write_bytes(left)
    expected = archive(server, content=b"something else")
    with pytest.raises(UserError, match=r"wrong checksum, so the file was removed$") as caught:
        fetch(expected, tmp_path)
    assert server.url in str(caught.value)
    assert names(tmp_path) == []


def test_a_damaged_file_is_fetched_again(tmp_path, server):
    (tmp_path / "file.bin").write_bytes(b"damaged")
    assert fetch(archive(server), tmp_path).read_bytes() == CONTENT


def test_the_next_address_goes_on_where_the_first_stopped(tmp_path, server):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:CUT])
    gone = server.url.replace("/file", "/gone")
    both = archive(server)._replace(urls=(gone, server.url))
    assert fetch(both, tmp_path).read_bytes() == CONTENT
    assert server.asked == [f"bytes={CUT}-"] * 2
    with pytest.raises(UserError, match=r"cannot download http.*gone: HTTP Error 404: Not Found$"):
        fetch(archive(server, "other")._replace(urls=(gone,)), tmp_path)


def test_a_server_that_is_not_there(tmp_path, server):
    nobody = archive(server)._replace(urls=("http://127.0.0.1:1/file",))
    with pytest.raises(UserError, match=r"cannot download http://127.0.0.1:1/file: .*refused"):
        fetch(nobody, tmp_path)
    assert names(tmp_path) == []


def test_a_download_without_end(tmp_path, server, monkeypatch):
    monkeypatch.setattr(downloads, "MAX_BYTES", 5000)
    monkeypatch.setattr(downloads, "READ_BYTES", 1000)
    read = []
    monkeypatch.setattr(downloads, "_md5", lambda path: read.append(path.stat().st_size))
    with pytest.raises(UserError, match="wrong checksum, so the file was removed"):
        fetch(archive(server), tmp_path)
    assert read == [6000]
    assert names(tmp_path) == []


# Archives


def tar_of(*members):
    """(name, content) or (name, type, link) each."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for name, *what in members:
            member = tarfile.TarInfo(name)
            if isinstance(what[0], str):
                member.size = len(what[0])
                file.addfile(member, io.BytesIO(what[0].encode()))
            else:
                member.type, member.linkname = what
                file.addfile(member)
    return buffer.getvalue()


def zip_of(*members):
    """(name, content) or (name, content, mode) each."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content, *mode in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = (mode or [0])[0] << 16
            file.writestr(info, content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def unpacked(tmp_path, suffix, content):
    file, out = tmp_path / f"archive{suffix}", tmp_path / "a" / "b" / "out"
    out.mkdir(parents=True)
    file.write_bytes(content)
    unpack(file, out)
    return {path.relative_to(out).as_posix(): path.read_text() for path in files_of(out)}


def files_of(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_archives_are_unpacked(tmp_path):
    content = {"top/a.txt": "one", "top/b/c.txt": "two"}
    assert unpacked(tmp_path / "tar", ".tar.gz", tar_of(*content.items())) == content
    assert unpacked(tmp_path / "zip", ".zip", zip_of(*content.items())) == content
    assert unpacked(tmp_path / "gz", ".gz", gzip.compress(b"three")) == {"archive": "three"}


@pytest.fixture(autouse=True)
def _nothing_outside(tmp_path):
    yield
    assert not (tmp_path / "evil").exists()
    assert not (tmp_path / "a" / "evil").exists()


OUTSIDE = [
    "../evil",
    "../../evil",
    "x/../../evil",
    "/tmp/evil",
    "a\\..\\evil",
    "C:evil",
    "./x",
    "x//y",
]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("suffix", [".zip", ".tar.gz"])
def test_members_outside(tmp_path, suffix, name):
    made = zip_of if suffix == ".zip" else tar_of
    with pytest.raises(UserError, match="member whose name is not allowed"):
        unpacked(tmp_path, suffix, made(("fine", "x"), (name, "evil")))
    assert [path.name for path in files_of(tmp_path / "a")] == ["fine"]


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
)
def test_links_and_devices_in_a_tar(tmp_path, kind):
    content = tar_of(("link", kind, "../.."), ("link/evil", "evil"))
    with pytest.raises(UserError, match="a member that is not a file: link"):
        unpacked(tmp_path, ".tar.gz", content)
    assert files_of(tmp_path / "a") == []


@pytest.mark.parametrize("mode", [stat.S_IFLNK | 0o777, stat.S_IFIFO])
def test_links_in_a_zip(tmp_path, mode):
    with pytest.raises(UserError, match="a member that is not a file: link"):
        unpacked(tmp_path, ".zip", zip_of(("link", "../..", mode), ("link/evil", "evil")))


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz", ".gz"])
def test_bombs(tmp_path, monkeypatch, suffix):
    """A megabyte in a kilobyte, where 100 kB are allowed."""
    monkeypatch.setattr(downloads, "MAX_BYTES", 100_000)
    zeros = "\0" * 2**20
    bomb = {".gz": gzip.compress(zeros.encode())}
    bomb |= {".zip": zip_of(("zeros", zeros)), ".tar.gz": tar_of(("zeros", zeros))}
    assert len(bomb[suffix]) < 5000
    with pytest.raises(UserError, match="unpacks to more than 100000 bytes"):
        unpacked(tmp_path, suffix, bomb[suffix])
    assert sum(path.stat().st_size for path in files_of(tmp_path / "a")) <= 100_000


def test_a_bomb_in_a_name(tmp_path, monkeypatch):
    """tarfile takes a long name into memory as long as its header says it is."""
    monkeypatch.setattr(downloads, "MAX_BYTES", 100_000)
    head = tarfile.TarInfo("././@LongLink")
    head.type, head.size = tarfile.GNUTYPE_LONGNAME, 2**33
    content = gzip.compress(head.tobuf(tarfile.GNU_FORMAT) + bytes(2**20))
    with pytest.raises(UserError, match="cannot be unpacked: it unpacks to more than"):
        unpacked(tmp_path, ".tar.gz", content)


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz", ".gz"])
@pytest.mark.parametrize("damage", ["text", "cut"])
def test_damaged_archives(tmp_path, suffix, damage):
    members = [(f"file{i}", str(i) * 9999) for i in range(5)]
    whole = {".zip": zip_of(*members), ".tar.gz": tar_of(*members)}
    whole[".gz"] = gzip.compress(os.urandom(9999))
    content = whole[suffix][:-40] if damage == "cut" else b"hello"
    with pytest.raises(UserError, match=r"archive\S+ cannot be unpacked"):
        unpacked(tmp_path, suffix, content)


def test_two_members_of_one_name(tmp_path):
    with pytest.raises(UserError, match=r"cannot be unpacked: .*File exists"):
        unpacked(tmp_path, ".tar.gz", tar_of(("a", "one"), ("a", "two")))


# Whole data sets


def served(server, content, name):
    server.content = content
    return archive(server, name, content)


def test_tinyimagenet_is_installed_whole(tmp_path, server, monkeypatch):
    write_tinyimagenet(tmp_path / "source")
    top = tmp_path / "source"
    members = [(str(p.relative_to(top)), p.read_bytes()) for p in files_of(top)]
    there = served(server, zip_of(*members), "tiny-imagenet-200.zip")
    monkeypatch.setattr(sources, "TINYIMAGENET_ARCHIVE", there)
    data = load_dataset("tinyimagenet", Request(tmp_path / "data", download=True))
    assert data.classes == tuple(sorted(WNIDS))
    assert names(tmp_path / "data") == ["tiny-imagenet-200", "tiny-imagenet-200.zip"]


def test_mnist_is_installed_whole(tmp_path, server, monkeypatch):
    """One server gives the same file under every name: three by three bytes, no images."""
    packed = gzip.compress(idx_bytes(np.arange(9, dtype=np.uint8)))
    server.content, md5 = packed, hashlib.md5(packed).hexdigest()
    files = [Archive(name, (server.url,), md5) for name in sources.MNIST_MD5]
    monkeypatch.setattr(sources, "MNIST_ARCHIVES", files)
    advice = "move this file away, and --download fetches it anew"
    with pytest.raises(UserError, match=f"not an idx file of 3 dimensions; {advice}"):
        load_dataset("mnist", Request(tmp_path, download=True))
    raw = names(tmp_path / "MNIST" / "raw")
    assert raw == sorted(name.removesuffix(".gz") for name in sources.MNIST_MD5)


def test_a_folder_that_is_there_is_completed(tmp_path, server, monkeypatch):
    """What is missing is fetched, as it is packed, and nothing else is touched."""
    raw = write_mnist(tmp_path) / "MNIST" / "raw"
    (raw / "mine").write_text("mine")
    missing = raw / "t10k-labels-idx1-ubyte"
    there = served(server, gzip.compress(missing.read_bytes()), f"{missing.name}.gz")
    missing.unlink()
    monkeypatch.setattr(sources, "MNIST_ARCHIVES", [there])
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=r"raw lacks t10k-labels-idx1-ubyte, .*--download fetches"):
        load_dataset("mnist", Request(tmp_path))
    assert snapshot(tmp_path) == before
    for _ in range(2):
        data = load_dataset("mnist", Request(tmp_path, download=True))
        assert data.test.labels.tolist() == 2 * list(range(10))
    assert snapshot(tmp_path) == before | {f"MNIST/raw/{missing.name}.gz": server.content}
    assert server.asked == [None]


def test_an_archive_that_is_there_is_named(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"packed")
    with pytest.raises(UserError, match=r"--download \(which unpacks cifar-10-python"):
        load_dataset("cifar10", Request(tmp_path))


def test_a_kill_while_unpacking_leaves_no_half(tmp_path, server, monkeypatch):
    there = served(server, tar_of(("set/a", "1"), ("set/b", "2")), "set.tar.gz")
    target, part = tmp_path / "set", tmp_path / ".set.part"

    def killed(file, folder):
        (folder / "set").mkdir()
        (folder / "set" / "a").write_text("half")
        raise SystemExit  # nothing in between may take it for an error

    with monkeypatch.context() as patch:
        patch.setattr(downloads, "unpack", killed)
        patch.setattr(downloads.shutil, "rmtree", lambda *_, **__: None)  # nor tidy up
        with pytest.raises(SystemExit):
            install([there], tmp_path, target, "set")
    assert not target.exists()
    assert part.exists(), "it was killed"
    install([there], tmp_path, target, "set")
    assert {name: (target / name).read_text() for name in names(target)} == {"a": "1", "b": "2"}
    assert not part.exists()
    assert len(server.asked) == 1, "the archive was kept"


def test_an_archive_of_something_else(tmp_path, server):
    there = served(server, tar_of(("other/a", "1")), "set.tar.gz")
    with pytest.raises(UserError, match=r"set\.tar\.gz holds no folder set"):
        install([there], tmp_path, tmp_path / "set", "set")
    assert not {"set", ".set.part"} & set(names(tmp_path))


def test_the_command_line(tmp_path, server, monkeypatch):
    """One line, an exit code, and what came is kept for the next time."""
    monkeypatch.delenv("IBP_DATA_DIR", raising=False)
    there = served(server, os.urandom(9000), "tiny-imagenet-200.zip")
    server.cut = CUT
    monkeypatch.setattr(sources, "TINYIMAGENET_ARCHIVE", there)
    monkeypatch.chdir(tmp_path)
    for bytes_ in (CUT, 2 * CUT):
        outcome = run_ibp("train", "--dataset", "tinyimagenet", "--download")
        assert outcome.code == 1
        assert outcome.err == (
            f"Error: cannot download {server.url}: interrupted after {bytes_} of 9000 bytes;"
            " the same command continues from there\n"
        )
    assert [path for path in snapshot(tmp_path) if "tiny" in path] == [
        "data/tiny-imagenet-200.zip.part"
    ]
