"""Download a task's files into downloads/TASK/ and check each against its pinned checksum.

data/sources.json lists the files. They arrive as NAME.part and are renamed to NAME once their checksum is right. Files
that exist already are checked, and never overwritten. An archive is opened only if its own checksum is right, and
deleted after use if it was downloaded here. A megabyte or two of ARC costs its whole archive, 681 MB.

    python -m data.download --task gsm8k      # the same as: make data TASK=gsm8k
"""
import argparse
import hashlib
import json
import os
import socket
import ssl
import time
import zipfile
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, build_opener

from tqdm import tqdm

from data import DOWNLOADS
from infra import InputError

WAITS = (1, 2, 4, 8)  # seconds before each further try
TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 16  # bytes
LIMIT = 100 << 20  # bytes of a file of unknown size: far more than any training set here has
TROUBLE = (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


@dataclass(frozen=True)
class File:
    """One file of a task, or an archive that holds files of a task as members."""
    source: str  # URL; of a member, its path in the archive
    size: int | None = None  # bytes, where known
    sha256: str = ""
    git: str = ""  # git's id of the file, where its SHA-256 is not known
    members: tuple["File", ...] = ()

    @property
    def name(self) -> str:
        return self.source.rsplit("/", 1)[-1]

    @property
    def pin(self) -> str:
        return self.sha256 or self.git


def read_sources() -> dict[str, tuple[str, list[File]]]:
    """Read {task: (licence, files)} from data/sources.json."""
    table = json.loads(Path(__file__).with_name("sources.json").read_text(encoding="utf-8"))

    def file(row: dict) -> File:
        members = tuple(file(member) for member in row.get("members", ()))
        return File(**row | {"source": row["source"].format(**table["places"]), "members": members})

    return {task: (row["licence"], [file(one) for one in row["files"]]) for task, row in table["tasks"].items()}


SOURCES = read_sources()


def fetch(task: str, directory: str | Path = DOWNLOADS, sources: dict = SOURCES) -> None:
    """Bring all files of a task into directory/task, complete and checked; InputError names the remedy."""
    if task not in sources:
        what = "toy is generated and needs no download" if task == "toy" else f"unknown task {task!r}"
        raise InputError(f"{what}: choose from {', '.join(sources)}, such as make data TASK=gsm8k")
    licence, files = sources[task]
    folder = Path(directory) / task
    missing = {file: [part for part in file.members or [file] if not exists(part, folder)] for file in files}
    if not any(missing.values()):
        return
    print(f"{task}, licence: {licence}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    for file, parts in missing.items():
        try:
            if file.members and parts:
                unpack(file, parts, folder)
            elif parts:
                download(file, folder)
        except InputError:
            raise
        except (*TROUBLE, ValueError, KeyError, zipfile.BadZipFile) as error:
            names = ", ".join(part.name for part in parts)
            raise InputError(f"{file.source}: {error}. Check the network and run this again, or put {names} into "
                             f"{folder} by hand, or name a folder that has the files: --path") from None


def exists(file: File, folder: Path) -> bool:
    """Tell whether a file exists; InputError if something else has its name."""
    path = folder / file.name
    if not path.exists():
        return False
    if (found := checksum(path, file)) != file.pin:
        raise InputError(f"{path} exists with checksum {found}, expected {file.pin}. Delete it and run this again; or, "
                         "if it is data of your own, move it and name it with --task")
    print(f"{path} exists, " + ("checked" if file.pin else "unchecked: its checksum is not known"))
    return True


def checksum(path: Path, file: File) -> str:
    """Compute the checksum of the kind that is pinned, "" if none is. Git's is the SHA-1 of a header and the bytes."""
    if not file.pin:
        return ""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False) if file.git else hashlib.sha256()
    with open(path, "rb") as content:
        return hashlib.file_digest(content, lambda: digest).hexdigest()


class HttpsOnly(HTTPRedirectHandler):
    """Follow redirects, but not from https to http."""

    def redirect_request(self, request, body, code, message, headers, url):
        if request.type == "https" and not url.lower().startswith("https:"):
            raise HTTPError(url, code, f"redirect to {url}, which is not https", headers, body)
        return super().redirect_request(request, body, code, message, headers, url)


def download(file: File, folder: Path) -> None:
    """Download a file from its URL. When the connection breaks, start over, a few times."""
    for wait in (*WAITS, None):
        try:
            with build_opener(HttpsOnly).open(file.source, timeout=TIMEOUT) as response:
                return save(file, folder, response, file.size if response.length is None else response.length)
        except TROUBLE as error:
            refused = getattr(error, "code", 500) not in (408, 429, *range(500, 600))  # others may pass with time
            no_use = refused or isinstance(getattr(error, "reason", 0), socket.gaierror)
            if no_use or wait is None:
                raise
            print(f"{file.name}: {error}, trying again in {wait} s", flush=True)
            time.sleep(wait)


def unpack(archive: File, members: list[File], folder: Path) -> None:
    """Extract members of an archive, each under the last part of its name, so that none leaves the folder."""
    ours = not exists(archive, folder)
    if ours:
        download(archive, folder)
    with zipfile.ZipFile(folder / archive.name) as opened:
        for member in members:
            with opened.open(member.source) as content:
                save(member, folder, content, member.size)
    if ours:
        (folder / archive.name).unlink()


def save(file: File, folder: Path, content, total: int | None) -> None:
    """Write what content.read gives as NAME.part, check it, and rename it to NAME; leave nothing if that fails.

    ConnectionError if fewer than `total` bytes come; ValueError if more than the file may have, or other ones.
    """
    part, limit = folder / f"{file.name}.part", file.size or LIMIT
    try:
        with (open(part, "wb") as out,
              tqdm(total=total, desc=file.name, unit="B", unit_scale=True, dynamic_ncols=True) as bar):
            while (chunk := content.read(CHUNK)) and out.tell() <= limit:
                bar.update(out.write(chunk))
            size = out.tell()
            out.flush()
            os.fsync(out.fileno())
        if size > limit:
            raise ValueError(f"{file.name} has more than {limit:,} bytes")
        if size < (total or 0):
            raise ConnectionError(f"{file.name} ended after {size:,} of {total:,} bytes")
        if (found := checksum(part, file)) != file.pin:
            raise ValueError(f"{file.name} has {size:,} bytes with checksum {found}, expected {file.pin}")
        os.replace(part, folder / file.name)
    finally:
        part.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--task", required=True, help=f"one of {', '.join(SOURCES)}")
    parser.add_argument("--dir", default=DOWNLOADS, help="files go to DIR/TASK")
    args = parser.parse_args()
    try:
        fetch(args.task, args.dir)
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted: run the same command again for the files that are missing") from None
    except InputError as error:
        raise SystemExit(str(error)) from None
    except OSError as error:  # a full disk, a folder that may not be written
        raise SystemExit(f"{error}. Once that is solved, run the same command again") from None


if __name__ == "__main__":
    main()
