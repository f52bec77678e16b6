"""The downloader against a real server on this machine: one that obeys, and one for each way in which servers and
networks fail."""
import hashlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError

import pytest

from data import TASKS, download
from infra import InputError
from data.download import SOURCES, File, fetch
from data.files import FILES

ROOT = Path(__file__).resolve().parent.parent
BODY = bytes(range(256)) * 1200  # 307,200 bytes: several reads of the downloader
SIZE = len(BODY)
SHA256 = hashlib.sha256(BODY).hexdigest()
OTHER = BODY[::-1]


class Handler(BaseHTTPRequestHandler):
    """Serves server.files; the server's other fields make it fail."""

    def do_GET(self):
        server = self.server
        server.requests.append(self.path)
        if self.path in server.moved:
            self.send_response(302)
            self.send_header("Location", server.moved[self.path])
            return self.end_headers()
        if server.errors or self.path not in server.files:
            return self.send_error(server.errors.pop(0) if server.errors else 404)
        body = server.files[self.path]
        self.send_response(200)
        if server.says_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        end = server.cuts.pop(0) if server.cuts else len(body)  # the connection breaks there
        try:
            self.wfile.write(body[:end])
            if end < len(body) and server.hangs:
                server.released.wait(30)
        except ConnectionError:
            server.client_left.set()

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server in a thread; `cuts` are the positions where its first answers break off."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "WAITS", (0, 0))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}/"
    vars(server).update(files={"/file": BODY}, moved={}, requests=[], errors=[], cuts=[], says_length=True, hangs=False,
                        released=threading.Event(), client_left=threading.Event())
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


def one(server, name="file", size=SIZE, sha256=SHA256, git="") -> dict:
    """A table with one task "t" of one file."""
    return {"t": ("free", [File(f"{server.url}{name}", size, sha256, git)])}


def refusal(directory, sources, task="t") -> str:
    with pytest.raises(InputError) as stop:
        fetch(task, directory, sources)
    assert "\n" not in str(stop.value)  # one line
    return str(stop.value)


def tree(directory) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes()
            for path in sorted(directory.rglob("*")) if path.is_file()}


def put(directory, name: str, content: bytes) -> None:
    (directory / "t").mkdir(exist_ok=True)
    (directory / "t" / name).write_bytes(content)


# ---- what arrives --------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [SIZE, None])
@pytest.mark.parametrize("says_length", [True, False])
def test_a_download_gets_through_trouble(server, tmp_path, capsys, size, says_length):
    """A killed run's remains, a busy server, and an answer that breaks off, where the length of all is known. What has
    arrived is only checked the next time."""
    cuts = [100_000] if size or says_length else []
    server.errors, server.cuts, server.says_length = [503 if says_length else 429], [*cuts], says_length
    put(tmp_path, "file.part", OTHER)
    fetch("t", tmp_path, one(server, size=size))
    said = capsys.readouterr().out
    assert said.count("trying again") == 1 + len(cuts) and said.count("licence: free") == 1
    fetch("t", tmp_path, one(server, size=size))
    assert capsys.readouterr().out == f"{tmp_path / 't/file'} exists, checked\n"
    assert tree(tmp_path) == {"t/file": BODY} and server.requests == ["/file"] * (2 + len(cuts))


def test_a_git_pin(server, tmp_path):
    """The ids that `git hash-object` prints, for "hello" and for an empty file."""
    hello, empty = "ce013625030ba8dba906f756967f9e9ca394464a", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    server.files["/hello"] = b"hello\n"
    said = refusal(tmp_path, one(server, "hello", None, "", empty))
    assert hello in said and empty in said and tree(tmp_path) == {}
    fetch("t", tmp_path, one(server, "hello", None, "", hello))
    assert tree(tmp_path) == {"t/hello": b"hello\n"}


# ---- interruptions -------------------------------------------------------------------------------

CHILD = """
import sys
from data import download
from data.download import File
download.SOURCES["t"] = ("free", [{file!r}])
sys.argv = ["download", "--task", "t", "--dir", {directory!r}]
download.main()
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_download_leaves_no_file_that_looks_complete(server, tmp_path, sent):
    sources = one(server)
    server.cuts, server.hangs = [200_000], True
    code = CHILD.format(file=sources["t"][1][0], directory=str(tmp_path))
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    part = tmp_path / "t/file.part"
    for _ in range(2000):
        if part.exists() and part.stat().st_size:
            break
        time.sleep(0.005)
    child.send_signal(sent)
    said = child.communicate(timeout=30)[1]
    server.released.set()
    assert child.returncode and not (tmp_path / "t/file").exists()
    if sent == signal.SIGINT:
        assert "interrupted: run the same command again" in said and "Traceback" not in said
        assert tree(tmp_path) == {}
    fetch("t", tmp_path, sources)
    assert tree(tmp_path) == {"t/file": BODY}


@pytest.mark.parametrize("hangs, fault", [(False, "3,000 of 307,200"), (True, "timed out")])
def test_it_gives_up_with_a_remedy(server, tmp_path, monkeypatch, hangs, fault):
    """On answers that break off, or that hang: without a timeout it would wait for ever."""
    monkeypatch.setattr(download, "TIMEOUT", 0.1 if hangs else 30)
    server.hangs, server.cuts = hangs, [1000, 2000, 3000]  # three tries: WAITS has two entries here
    said = refusal(tmp_path, one(server))
    for part in (f"{server.url}file: ", fault, str(tmp_path / "t"), "--path"):
        assert part in said
    assert tree(tmp_path) == {} and len(server.requests) == 3


def test_offline(tmp_path, monkeypatch):
    def no_name(*args, **options):
        raise socket.gaierror(-2, "Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    monkeypatch.setattr(download.time, "sleep", lambda seconds: pytest.fail("no use in waiting"))
    said = refusal(tmp_path, {"t": ("free", [File("http://example.org/file", 5, SHA256)])})
    for part in ("Name or service not known", "http://example.org/file", "Check the network", "--path"):
        assert part in said
    assert tree(tmp_path) == {}


def test_a_full_disk_is_a_sentence(server, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setitem(SOURCES, "t", one(server)["t"])
    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr("sys.argv", ["download", "--task", "t", "--dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="No space left on device.*run the same command again"):
        download.main()
    assert tree(tmp_path) == {} and server.requests == ["/file"]


# ---- answers that are refused --------------------------------------------------------------------

@pytest.mark.parametrize("name, content, parts", [
    ("file", OTHER, (SHA256, "307,200 bytes")), ("file", b"<html>Log in to the network</html>", (SHA256, "34 bytes")),
    ("absent", BODY, ("404", "put absent into", "--path"))])
def test_an_answer_that_is_refused_at_once(server, tmp_path, name, content, parts):
    """Another try would not help."""
    server.files["/file"] = content
    said = refusal(tmp_path, one(server, name))
    for part in (*parts, f"{server.url}{name}", str(tmp_path / "t")):
        assert part in said
    assert name == "absent" or hashlib.sha256(content).hexdigest() in said
    assert tree(tmp_path) == {} and server.requests == [f"/{name}"]


@pytest.mark.parametrize("size, says_length", [(SIZE, True), (None, True), (SIZE, False), (None, False)])
def test_an_answer_without_end(server, tmp_path, monkeypatch, size, says_length):
    """More bytes than the file has, or may have: the disk must not fill up."""
    monkeypatch.setattr(download, "LIMIT", 400_000)
    server.files["/file"], server.says_length = BODY * 200, says_length
    assert f"more than {size or 400_000:,} bytes" in refusal(tmp_path, one(server, size=size))
    assert tree(tmp_path) == {} and server.client_left.wait(5)  # the 61 MB were not read


def test_https_is_not_left(server, tmp_path, monkeypatch):
    """A redirect to http would let anybody on the way answer; one to https is followed, as the server's is by the class
    that refuses some."""
    handler, request = download.HttpsOnly(), urllib.request.Request("https://a.example/file")
    with pytest.raises(HTTPError, match="not https"):
        handler.redirect_request(request, io.BytesIO(), 302, "Found", {}, "http://a.example/file")
    followed = handler.redirect_request(request, io.BytesIO(), 302, "Found", {}, "https://b.example/file")
    assert followed.full_url == "https://b.example/file"

    server.moved = {"/moved": "/file"}
    fetch("t", tmp_path, one(server, "moved"))
    assert tree(tmp_path) == {"t/moved": BODY}
    monkeypatch.setattr(download.HttpsOnly, "redirect_request", lambda *args: None)  # that is: do not follow
    assert "302" in refusal(tmp_path / "other", one(server, "moved"))


# ---- what exists already -------------------------------------------------------------------------

def test_a_file_that_exists_is_not_overwritten(server, tmp_path):
    """One byte of it differs: perhaps a fault, perhaps somebody's own data."""
    mine = b"x" + BODY[1:]
    put(tmp_path, "file", mine)
    sources = {"t": ("free", [File(f"{server.url}other", 5, SHA256), *one(server)["t"][1]])}
    said = refusal(tmp_path, sources)
    for part in (str(tmp_path / "t/file"), "Delete it", "--task", SHA256):
        assert part in said
    assert tree(tmp_path) == {"t/file": mine}
    assert server.requests == []  # before anything is fetched


@pytest.mark.parametrize("task, said", [("toy", "toy is generated and needs no download"),
                                        ("gsm9k", "unknown task 'gsm9k'"), ("../t", "unknown task")])
def test_unknown_tasks(tmp_path, task, said):
    message = refusal(tmp_path, SOURCES, task)
    assert said in message and ", ".join(SOURCES) in message
    assert tree(tmp_path) == {}


# ---- archives ------------------------------------------------------------------------------------

def zipped(**members: bytes) -> bytes:
    """An archive whose members lie in a folder that leads upwards."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"../up/{name}", data)
    return content.getvalue()


def two_members(server, content: bytes) -> dict:
    """A table whose files are members of the archive `content`."""
    server.files["/a.zip"] = content
    members = (File("../up/one"), File("../up/two", SIZE, SHA256))
    archive = File(f"{server.url}a.zip", len(content), hashlib.sha256(content).hexdigest(), members=members)
    return {"t": ("free", [archive])}


GOOD_ZIP = zipped(one=b"1", two=BODY, corpus=b"0")


def test_members_of_an_archive(server, tmp_path, capsys):
    """Nothing but the members asked for, in the folder of the task and not above; the archive goes."""
    sources = two_members(server, GOOD_ZIP)
    fetch("t", tmp_path / "in", sources)
    assert tree(tmp_path) == {"in/t/one": b"1", "in/t/two": BODY}
    (tmp_path / "in/t/two").unlink()
    fetch("t", tmp_path / "in", sources)
    fetch("t", tmp_path / "in", sources)
    assert tree(tmp_path) == {"in/t/one": b"1", "in/t/two": BODY}
    assert server.requests == ["/a.zip"] * 2  # once for both, once for one of them
    assert "one exists, unchecked" in capsys.readouterr().out


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("altered", [0, 1])
def test_the_archive_itself_has_a_checksum(server, tmp_path, monkeypatch, exists, altered):
    """One that exists is used, and left; one that is altered is not opened."""
    sources, content = two_members(server, GOOD_ZIP), bytearray(GOOD_ZIP)
    content[-1] ^= altered  # in the comment's length
    server.files["/a.zip"] = bytes(content)
    kept = {"t/a.zip": bytes(content)} if exists else {}
    if exists:
        put(tmp_path, "a.zip", bytes(content))
    if altered:
        monkeypatch.setattr(zipfile, "ZipFile", lambda *args: pytest.fail("opened"))
        said = refusal(tmp_path, sources)
        assert hashlib.sha256(content).hexdigest() in said and hashlib.sha256(GOOD_ZIP).hexdigest() in said
        assert tree(tmp_path) == kept and ("Check the network" in said) == (not exists)
    else:
        fetch("t", tmp_path, sources)
        assert tree(tmp_path) == kept | {"t/one": b"1", "t/two": BODY}
    assert len(server.requests) == (not exists)


@pytest.mark.parametrize("members, said", [
    ({"one": b"1"}, "no item named '../up/two'"),
    ({"one": b"1", "in/two": BODY}, "no item named '../up/two'"),  # by its exact name only
    ({"one": b"1", "two": OTHER}, f"expected {SHA256}"),
    ({"one": b"1", "two": BODY[1:]}, "ended after 307,199 of 307,200 bytes"),
    ({"one": b"1", "two": BODY + b"0"}, "two has more than 307,200 bytes"),
    ({"one": bytes(400_001), "two": BODY}, "one has more than 400,000 bytes")])
def test_members_that_are_missing_or_wrong(server, tmp_path, monkeypatch, members, said):
    """A member of unknown size has a limit, too."""
    monkeypatch.setattr(download, "LIMIT", 400_000)
    message = refusal(tmp_path, two_members(server, zipped(**members)))
    assert said in message and f"{server.url}a.zip: " in message
    assert set(tree(tmp_path)) <= {"t/a.zip", "t/one"} and "t/two" not in tree(tmp_path)


# ---- the table -----------------------------------------------------------------------------------

ALL = [(task, file) for task, (_, files) in SOURCES.items() for file in files]
FINAL = [(task, part) for task, file in ALL for part in file.members or [file]]


def test_the_table():
    """Whatever comes over the network has a pin, and no name leads out of its folder."""
    for task, (licence, files) in SOURCES.items():
        names = [part.name for file in files for part in (file, *file.members)]
        assert licence and len(set(names)) == len(names), task
    for _, file in ALL:
        assert file.source.startswith("https://") and file.pin, file
    for _, file in ALL + FINAL:
        assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", file.name), file
        assert re.fullmatch(r"([0-9a-f]{64})?", file.sha256) and re.fullmatch(r"([0-9a-f]{40})?", file.git), file
        assert not (file.sha256 and file.git) and file.size != 0, file
    assert [part.name for _, part in FINAL if not part.pin] == ["ARC-Challenge-Train.jsonl", "ARC-Easy-Train.jsonl"]


def test_every_file_that_a_split_reads_is_downloaded():
    """For each task and source; a name spelt otherwise in one of the two tables shows only after the download."""
    assert ["toy", *SOURCES] == list(TASKS)
    for tasks in FILES.values():
        for task, splits in tasks.items():
            read = {name for names in splits.values() for name in names}
            assert read <= {part.name for of, part in FINAL if of == task}, task


@pytest.mark.parametrize("task, file", FINAL, ids=[f"{task}-{file.name}" for task, file in FINAL])
def test_pins_hold_for_real_files(task, file):
    """As `make data` leaves them, or in a folder of data sets with ReFT's files in mwp_reft/."""
    root = Path(os.environ.get("SIR_DATA_DIR", ROOT / "downloads"))
    found = [path for path in (root / task / file.name, root / "mwp_reft" / file.name) if path.exists()]
    if not found or not file.pin:
        pytest.skip(f"no {task}/{file.name}: make data TASK={task}, or set SIR_DATA_DIR; or its checksum is not known")
    if (checksum := download.checksum(found[0], file)).startswith("6606c063"):
        pytest.skip(f"{found[0]} is a copy with 294 of the 299 lines")
    assert checksum == file.pin
    assert file.size in (None, found[0].stat().st_size)
