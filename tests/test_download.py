"""The downloader against a real server on this machine: one that obeys, and one for each way in
which servers and networks fail."""
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

from data import download
from data.download import ARC_ZIP, MATHQA_ZIP, TASKS, File, fetch

ROOT = Path(__file__).resolve().parent.parent
BODY = bytes(range(256)) * 1200  # 307,200 bytes: several reads of the downloader
SIZE = len(BODY)
SHA256 = hashlib.sha256(BODY).hexdigest()
OTHER = BODY[::-1]


class Handler(BaseHTTPRequestHandler):
    """Serves server.files, with Range; the server's other fields make it fail."""

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.requests.append((self.path, asked))
        if self.path in server.moved:
            self.send_response(302)
            self.send_header("Location", server.moved[self.path])
            return self.end_headers()
        body = server.files.get(self.path)
        if body is None:
            return self.send_error(404)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.ranges else 0
        if start >= len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if server.says_length:
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        end = server.cuts.pop(0) if server.cuts else len(body)  # the connection breaks there
        try:
            self.wfile.write(body[start:end])
            if end < len(body) and server.hangs:
                server.released.wait(30)
        except ConnectionError:
            server.client_left = True

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
    server.files, server.moved, server.requests, server.cuts = {"/file": BODY}, {}, [], []
    server.ranges, server.says_length, server.hangs, server.client_left = True, True, False, False
    server.released = threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


def one(server, size=SIZE, pin=SHA256, name="file") -> dict:
    """A table with one task "t" of one file."""
    return {"t": ("free", [File(server.url, name, size, pin)])}


def refusal(directory, tasks, task="t") -> str:
    with pytest.raises(SystemExit) as stop:
        fetch(task, directory, tasks)
    assert "\n" not in stop.value.code  # one line
    return stop.value.code


def tree(directory) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes()
            for path in sorted(directory.rglob("*")) if path.is_file()}


# ---- what arrives --------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [SIZE, None])
@pytest.mark.parametrize("says_length", [True, False])
def test_a_good_download(server, tmp_path, capsys, size, says_length):
    server.says_length = says_length
    fetch("t", tmp_path, one(server, size))
    assert tree(tmp_path) == {"t/file": BODY}
    assert server.requests == [("/file", None)]
    assert capsys.readouterr().out.count("licence: free") == 1


@pytest.mark.parametrize("cuts, ranges", [
    ([100_000], [None, "bytes=100000-"]),
    ([100_000, 100_001], [None, "bytes=100000-", "bytes=100001-"]),
    ([0], [None, None])])
def test_a_body_that_ends_early_is_continued(server, tmp_path, cuts, ranges):
    server.cuts = cuts
    fetch("t", tmp_path, one(server))
    assert tree(tmp_path) == {"t/file": BODY}
    assert server.requests == [("/file", asked) for asked in ranges]


def test_without_a_size_the_server_s_length_counts(server, tmp_path):
    server.cuts = [100_000]
    fetch("t", tmp_path, one(server, size=None))
    assert tree(tmp_path) == {"t/file": BODY}
    assert server.requests == [("/file", None), ("/file", "bytes=100000-")]


def test_a_server_that_ignores_range_starts_over(server, tmp_path):
    """Its answer to "the rest, please" is the whole; appended, it would be one and a half files."""
    server.cuts, server.ranges = [100_000], False
    fetch("t", tmp_path, one(server))
    assert server.requests == [("/file", None), ("/file", "bytes=100000-")]
    assert tree(tmp_path) == {"t/file": BODY}


@pytest.mark.parametrize("size", [SIZE, None])
def test_a_part_that_is_too_long_starts_over(server, tmp_path, size):
    (tmp_path / "t").mkdir()
    (tmp_path / "t/file.part").write_bytes(BODY + b"more")
    fetch("t", tmp_path, one(server, size))
    assert server.requests == [("/file", f"bytes={SIZE + 4}-"), ("/file", None)]
    assert tree(tmp_path) == {"t/file": BODY}


@pytest.mark.parametrize("content", [BODY, OTHER])
def test_a_whole_part_is_checked_before_it_gets_its_name(server, tmp_path, content):
    (tmp_path / "t").mkdir()
    (tmp_path / "t/file.part").write_bytes(content)
    if content == BODY:
        fetch("t", tmp_path, one(server))
        assert tree(tmp_path) == {"t/file": BODY}
    else:
        assert "wrong checksum" in refusal(tmp_path, one(server))
        assert tree(tmp_path) == {}
    assert server.requests == []


def test_a_git_pin(server, tmp_path):
    """The ids that `git hash-object` prints."""
    server.files["/hello"] = b"hello\n"
    known = {b"hello\n": "ce013625030ba8dba906f756967f9e9ca394464a",
             b"": "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"}
    for content, pin in known.items():
        (tmp_path / "x").write_bytes(content)
        assert download.checksum(tmp_path / "x", pin) == pin
    (tmp_path / "x").unlink()
    fetch("t", tmp_path, one(server, None, known[b"hello\n"], "hello"))
    assert tree(tmp_path) == {"t/hello": b"hello\n"}
    assert "wrong checksum" in refusal(tmp_path / "2", one(server, None, known[b""], "hello"))


# ---- interruptions -------------------------------------------------------------------------------

CHILD = """
import sys
from data import download
from data.download import File
download.TASKS["t"] = ("free", [{file!r}])
sys.argv = ["download", "--task", "t", "--dir", {directory!r}]
download.main()
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_continued(server, tmp_path, sent):
    tasks = one(server)
    server.cuts, server.hangs = [200_000], True
    code = CHILD.format(file=tasks["t"][1][0], directory=str(tmp_path))
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    part = tmp_path / "t/file.part"
    for _ in range(2000):
        if part.exists() and part.stat().st_size:
            break
        time.sleep(0.005)
    child.send_signal(sent)
    said = child.communicate(timeout=30)[1]
    server.released.set()
    have = part.stat().st_size
    assert child.returncode and 0 < have <= 200_000
    if sent == signal.SIGINT:
        assert "interrupted: the same command goes on" in said and "Traceback" not in said
    assert tree(tmp_path) == {"t/file.part": BODY[:have]}
    fetch("t", tmp_path, tasks)
    assert server.requests == [("/file", None), ("/file", f"bytes={have}-")]
    assert tree(tmp_path) == {"t/file": BODY}


def test_it_gives_up_and_keeps_what_it_has(server, tmp_path):
    server.cuts = [1000, 2000, 3000]  # three tries: WAITS has two entries here
    said = refusal(tmp_path, one(server))
    assert f"{server.url}file" in said and "3,000 of 307,200" in said and "--path" in said
    assert tree(tmp_path) == {"t/file.part": BODY[:3000]}
    fetch("t", tmp_path, one(server))
    assert server.requests[-1] == ("/file", "bytes=3000-")
    assert tree(tmp_path) == {"t/file": BODY}


def test_nobody_listens(server, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        tasks = {"t": ("free", [File(f"http://127.0.0.1:{unused.getsockname()[1]}/", "file", 5, SHA256)])}
        said = refusal(tmp_path, tasks)
    assert "refused" in said and "3 times" in said and str(tmp_path / "t/file") in said


def test_a_server_that_says_nothing(server, tmp_path, monkeypatch):
    """It would hang for ever without a timeout."""
    monkeypatch.setattr(download, "TIMEOUT", 0.1)
    server.cuts, server.hangs = [100_000, 100_000, 100_000], True
    said = refusal(tmp_path, one(server))
    assert "timed out" in said
    assert tree(tmp_path) == {"t/file.part": BODY[:download.CHUNK]}  # all whole chunks


def test_offline(tmp_path, monkeypatch):
    def no_name(*args, **options):
        raise socket.gaierror(-2, "Name or service not known")
    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    monkeypatch.setattr(download.time, "sleep", lambda seconds: pytest.fail("no use in waiting"))
    said = refusal(tmp_path, {"t": ("free", [File("http://example.org/", "file", 5, SHA256)])})
    assert "no network" in said and "http://example.org/file" in said
    assert str(tmp_path / "t/file") in said and "--path" in said
    assert tree(tmp_path) == {}


# ---- answers that are refused --------------------------------------------------------------------

def test_wrong_checksum(server, tmp_path):
    server.files["/file"] = OTHER
    said = refusal(tmp_path, one(server))
    assert SHA256 in said and hashlib.sha256(OTHER).hexdigest() in said and f"{server.url}file" in said
    assert tree(tmp_path) == {}


def test_a_part_of_something_else(server, tmp_path):
    """Continued, it makes a file that never was; it must not spoil the next run as well."""
    (tmp_path / "t").mkdir()
    (tmp_path / "t/file.part").write_bytes(OTHER[:1000])
    assert "wrong checksum" in refusal(tmp_path, one(server))
    assert tree(tmp_path) == {}
    fetch("t", tmp_path, one(server))
    assert server.requests == [("/file", "bytes=1000-"), ("/file", None)]
    assert tree(tmp_path) == {"t/file": BODY}


def test_not_found(server, tmp_path):
    said = refusal(tmp_path, one(server, name="absent"))
    for part in (f"{server.url}absent", "404", str(tmp_path / "t/absent"), "--path"):
        assert part in said
    assert server.requests == [("/absent", None)]  # another try would not help
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("content", [BODY + b"more", b"<html>Log in to the network</html>"])
def test_another_length_is_refused_before_it_is_read(server, tmp_path, content):
    """A page to log in, with status 200, must not cost the half that is there."""
    server.files["/file"], server.ranges = content, False
    (tmp_path / "t").mkdir()
    (tmp_path / "t/file.part").write_bytes(BODY[:1000])
    said = refusal(tmp_path, one(server))
    assert f"{len(content):,} bytes, not {SIZE:,}" in said
    assert tree(tmp_path) == {"t/file.part": BODY[:1000]}


@pytest.mark.parametrize("size", [SIZE, None])
def test_an_answer_without_end(server, tmp_path, monkeypatch, size):
    """No length, and more bytes than the file has: the disk must not fill up."""
    monkeypatch.setattr(download, "LIMIT", 400_000)
    server.files["/file"], server.says_length = BODY * 200, False
    said = refusal(tmp_path, one(server, size))
    assert f"more than {size or 400_000:,} bytes" in said
    assert tree(tmp_path) == {}
    for _ in range(1000):
        if server.client_left:
            break
        time.sleep(0.005)
    assert server.client_left  # the 61 MB were not read


def test_an_unknown_size_has_a_limit(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "LIMIT", SIZE - 1)
    assert "at most 307,199" in refusal(tmp_path, one(server, size=None))
    assert tree(tmp_path) == {}


def test_https_is_not_left():
    """A redirect to http would let anybody on the way answer; one to https is followed."""
    handler, request = download.StayEncrypted(), urllib.request.Request("https://a.example/file")
    with pytest.raises(HTTPError, match="not https"):
        handler.redirect_request(request, io.BytesIO(), 302, "Found", {}, "http://a.example/file")
    followed = handler.redirect_request(request, io.BytesIO(), 302, "Found", {}, "https://b.example/file")
    assert followed.full_url == "https://b.example/file"


def test_a_redirect_is_followed(server, tmp_path, monkeypatch):
    """With the Range, and through the class that refuses some."""
    seen, redirect = [], download.StayEncrypted.redirect_request
    monkeypatch.setattr(download.StayEncrypted, "redirect_request",
                        lambda *args: seen.append(args[-1]) or redirect(*args))
    server.moved, server.cuts = {"/moved": "/file"}, [100_000]
    fetch("t", tmp_path, one(server, name="moved"))
    assert tree(tmp_path) == {"t/moved": BODY}
    assert server.requests == [("/moved", None), ("/file", None),
                               ("/moved", "bytes=100000-"), ("/file", "bytes=100000-")]
    assert seen == [f"{server.url}file"] * 2


# ---- what is there already -----------------------------------------------------------------------

def test_what_is_there_is_checked_and_not_fetched(server, tmp_path, capsys):
    fetch("t", tmp_path, one(server))
    capsys.readouterr()
    fetch("t", tmp_path, one(server))
    assert f"{tmp_path / 't/file'} is there, checked" in capsys.readouterr().out
    assert len(server.requests) == 1


def test_what_is_there_is_not_overwritten(server, tmp_path):
    """One byte of it differs: perhaps a fault, perhaps somebody's own data."""
    mine = b"x" + BODY[1:]
    (tmp_path / "t").mkdir()
    (tmp_path / "t/file").write_bytes(mine)
    tasks = {"t": ("free", [File(server.url, "other", 5, SHA256), *one(server)["t"][1]])}
    said = refusal(tmp_path, tasks)
    for part in (str(tmp_path / "t/file"), "Delete it", "--path", SHA256):
        assert part in said
    assert tree(tmp_path) == {"t/file": mine}
    assert server.requests == []  # it is said before anything is fetched


@pytest.mark.parametrize("task, said", [("toy", "toy is generated and needs no download"),
                                        ("gsm9k", "unknown task 'gsm9k'"), ("../t", "unknown task")])
def test_unknown_tasks(tmp_path, task, said):
    message = refusal(tmp_path, TASKS, task)
    assert said in message and ", ".join(TASKS) in message
    assert tree(tmp_path) == {}


# ---- archives ------------------------------------------------------------------------------------

def zipped(**members: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "/"), data)
    return content.getvalue()


def two_members(server, content: bytes, names=("one", "two")) -> dict:
    """A table whose files are members of the archive `content`, in a folder that leads upwards."""
    server.files["/a.zip"] = content
    archive = File(server.url, "a.zip", len(content), hashlib.sha256(content).hexdigest())
    one, two = (File("../up/", name, None, archive=archive) for name in names)
    return {"t": ("free", [one, File(two.where, two.name, SIZE, SHA256, archive)])}


GOOD_ZIP = zipped(**{"..__up__one": b"1", "..__up__two": BODY, "..__up__corpus": b"0"})


def test_members_of_an_archive(server, tmp_path, capsys):
    """Nothing but the members asked for, in the folder of the task and not above; the archive goes."""
    tasks = two_members(server, GOOD_ZIP)
    fetch("t", tmp_path, tasks)
    assert tree(tmp_path) == {"t/one": b"1", "t/two": BODY}
    assert server.requests == [("/a.zip", None)]  # once for both
    fetch("t", tmp_path, tasks)
    assert len(server.requests) == 1
    assert "one is there, unchecked" in capsys.readouterr().out


def test_an_archive_that_is_there_is_used_and_left(server, tmp_path):
    tasks = two_members(server, GOOD_ZIP)
    (tmp_path / "t").mkdir()
    (tmp_path / "t/a.zip").write_bytes(GOOD_ZIP)
    fetch("t", tmp_path, tasks)
    assert tree(tmp_path) == {"t/a.zip": GOOD_ZIP, "t/one": b"1", "t/two": BODY}
    assert server.requests == []


@pytest.mark.parametrize("there", [True, False])
def test_an_archive_with_a_wrong_checksum_is_not_opened(server, tmp_path, monkeypatch, there):
    tasks = two_members(server, GOOD_ZIP)
    altered = bytearray(GOOD_ZIP)
    altered[-1] ^= 1  # in the comment's length
    server.files["/a.zip"] = bytes(altered)
    (tmp_path / "t").mkdir()
    if there:
        (tmp_path / "t/a.zip").write_bytes(altered)
    monkeypatch.setattr(zipfile, "ZipFile", lambda *args: pytest.fail("opened"))
    said = refusal(tmp_path, tasks)
    assert hashlib.sha256(altered).hexdigest() in said and hashlib.sha256(GOOD_ZIP).hexdigest() in said
    assert tree(tmp_path) == ({"t/a.zip": bytes(altered)} if there else {})


@pytest.mark.parametrize("members, said", [
    ({"..__up__one": b"1"}, "no item named '../up/two'"),
    ({"..__up__one": b"1", "two": BODY}, "no item named '../up/two'"),  # by its exact name only
    ({"..__up__one": b"1", "..__up__two": OTHER}, "wrong checksum"),
    ({"..__up__one": b"1", "..__up__two": BODY + b"0"}, "more than 307,200 bytes")])
def test_members_that_are_missing_or_wrong(server, tmp_path, members, said):
    message = refusal(tmp_path, two_members(server, zipped(**members)))
    assert said in message and f"../up/two in {server.url}a.zip" in message
    assert set(tree(tmp_path)) == {"t/a.zip", "t/one"}


def test_a_member_of_unknown_size_has_a_limit(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "LIMIT", 1000)
    bomb = zipped(**{"..__up__one": bytes(1001), "..__up__two": BODY})
    assert "more than 1,000 bytes" in refusal(tmp_path, two_members(server, bomb))


# ---- the table -----------------------------------------------------------------------------------

FILES = [(task, file) for task, (_, files) in TASKS.items() for file in files]


def test_the_table():
    """Whatever comes over the network has a pin, and no name leads out of its folder."""
    assert list(TASKS) == ["gsm8k", "svamp", "mathqa", "mathqa-numeric", "math", "arc"]
    for task, (licence, files) in TASKS.items():
        assert licence and len({file.name for file in files}) == len(files), task
    for file in [file for _, file in FILES] + [MATHQA_ZIP, ARC_ZIP]:
        assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", file.name), file
        assert re.fullmatch(r"([0-9a-f]{64}|[0-9a-f]{40})?", file.pin), file
        assert file.archive or file.pin and file.where.startswith("https://"), file
        assert (file.where == "" or file.where.endswith("/")) and file.size != 0, file


INCOMPLETE = {"6606c063fc6c3b0a03fc298d0f31c0af72a615471a711316befbd99d746d926c":
              "a copy of ARC-Challenge-Dev.jsonl with 294 of its 299 lines"}


@pytest.mark.parametrize("task, file", FILES, ids=[f"{task}-{file.name}" for task, file in FILES])
def test_pins_hold_for_real_files(task, file):
    """As `make data` leaves them, or in a folder of data sets with ReFT's files in mwp_reft/."""
    root = Path(os.environ.get("SIR_DATA_DIR", ROOT / "downloads"))
    found = [path for path in (root / task / file.name, root / "mwp_reft" / file.name) if path.exists()]
    if not found:
        pytest.skip(f"no {task}/{file.name}: make data TASK={task}, or set SIR_DATA_DIR")
    if not file.pin:
        pytest.skip(f"no checksum of {task}/{file.name} is known")
    if (checksum := download.checksum(found[0], "0" * 64)) in INCOMPLETE:
        pytest.skip(f"{found[0]} is {INCOMPLETE[checksum]}")
    assert download.checksum(found[0], file.pin) == file.pin
    assert file.size in (None, found[0].stat().st_size)
