"""Fetch a task's files into downloads/TASK/, each checked against a pinned checksum.

Bytes arrive in NAME.part, which a later run continues; they get the name NAME when all are there
and their checksum is right. A file that is there already is checked, and never overwritten. An
archive is opened only if its own checksum holds, and deleted after use if this run fetched it.

Left out: mirrors, the parquet copies on the Hugging Face Hub, and reading single members of a
remote archive: a megabyte or two of ARC costs its whole archive, 681 MB.

    python -m data.download --task gsm8k      # the same as: make data TASK=gsm8k
"""
import argparse
import hashlib
import os
import socket
import ssl
import time
import zipfile
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import NoReturn
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from tqdm import tqdm

from data import DOWNLOADS

WAITS = (1, 2, 4, 8)  # seconds before another try; after that the user decides
TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 16  # bytes
LIMIT = 100 << 20  # bytes of a file of unknown size: far more than any training set here has
TROUBLE = (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


@dataclass(frozen=True)
class File:
    """One file of a task. Its bytes are at `where` + `name`: a URL, or a member of `archive`."""
    where: str
    name: str  # under downloads/TASK, too
    size: int | None  # bytes; None: not known
    pin: str = ""  # SHA-256 of the bytes (64 digits) or their git blob id (40); "": none is known
    archive: "File | None" = None


# Commits, not branches, so that the pins stay right.
OPENAI = ("https://raw.githubusercontent.com/openai/grade-school-math/"
          "3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/")
PATEL = "https://raw.githubusercontent.com/arkilpatel/SVAMP/689d7ccac74b9983a2ac7cc3b264f441b99e7c53/"
# ReFT's own files: _nl has solutions in words, _python_sdp programs, both for training.
REFT = "https://raw.githubusercontent.com/lqtrung1998/mwp_ReFT/bdc844e02e5c783d4361d7777f4ad486e7e116da/data/"
# 12,000 + 500 of MATH's problems; unique_id tells which of them are the original 7,500 and 5,000.
# Not raw.githubusercontent.com: the files are in Git LFS, of which that host has only the pointers.
PRM800K = ("https://github.com/openai/prm800k/raw/"
           "7ecc794703b2877f63226f2477a49b34f9b25163/prm800k/math_splits/")
# The pins of both archives are those of TensorFlow Datasets.
MATHQA_ZIP = File("https://math-qa.github.io/math-QA/data/", "MathQA.zip", 7_302_821,
                  "7344f30456a7aef3176d4866cc953b35b41bec44eda6b00cdbcfde2876b2f07a")
ARC_ZIP = File("https://ai2-public-datasets.s3.amazonaws.com/arc/", "ARC-V1-Feb2018.zip", 680_841_265,
               "6d2d5ab50b2ceec6ba5f79c921be77cf2de712ea25a2b3f4fff3acc101cecfa0")
CHALLENGE, EASY = "ARC-V1-Feb2018-2/ARC-Challenge/", "ARC-V1-Feb2018-2/ARC-Easy/"

TASKS: dict[str, tuple[str, list[File]]] = {  # task: licence, files
    "gsm8k": ("MIT (OpenAI); ReFT's files Apache-2.0 (ByteDance)", [
        File(OPENAI, "train.jsonl", 4_166_206,
             "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
        File(OPENAI, "test.jsonl", 749_738,
             "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
        File(OPENAI, "example_model_solutions.jsonl", 2_563_513,  # outputs with labels, for the tests
             "4bc62db838f8418365d51c627bd66294cbdca9fb7f01519cb13f0dce8c51580b"),
        File(REFT, "gsm8k_nl.json", None, "deb398325d6e8f1f984ad993dd5c4de7444c1e33"),
        File(REFT, "gsm8k_python_sdp.json", None, "f1b5c9bce340a249333831b7dc63a78b74a646a4"),
        File(REFT, "gsm8k_test_set.json", 425_309,
             "0f2e17554946d235d2c0cdf9343bb9d3319007bba9596e0665d4f8b341f57016")]),
    "svamp": ("MIT (Arkil Patel); ReFT's files Apache-2.0 (ByteDance)", [
        File(PATEL, "SVAMP.json", 339_970,
             "5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e"),
        File(REFT, "svamp_nl.json", 1_881_012,
             "12e9ee172f08987112244dc95a03877353874b24ff3b8481eab675123b8fdd9d"),
        File(REFT, "svamp_python_sdp.json", 1_849_934,
             "09936759f652750064b1cb0dc81bce893f0b3e4a21e81d63d5cf738e0a379c3c"),
        File(REFT, "svamp_test_set.json", 250_243,
             "baba23c85982adad6b7f6a9d6c6cf3b82c4135364a5ac36b8447add90f783d85")]),
    "mathqa": ("Apache-2.0, as its card on the Hugging Face Hub says (the archive says nothing); "
               "ReFT's files Apache-2.0 (ByteDance)", [
        File("", "train.json", None,
             "00e8919347d65dbba9289bf04ed998a6c48dbf451ca909eeb66a35f2419c2bf6", MATHQA_ZIP),
        File("", "dev.json", 3_505_596,
             "aeca12424fc8f32d0e35c09b7738986a446c12f110c8071f3cc8913712f04bf3", MATHQA_ZIP),
        File("", "test.json", 2_346_754,
             "dfe7bc4691caf26842ccd4cf14e8f978327bab4f2989e0b076a4e6b38a9371d1", MATHQA_ZIP),
        File(REFT, "mathqa_nl.json", None, "3b7af65bad55c86a4873cc8dd86261cdb8cff4f2"),
        File(REFT, "mathqa_python_sdp.json", None, "188c079ee89e55b65311cf23e1ef72b0c3bf3d68"),
        File(REFT, "mathqa_test_set.json", 503_496,
             "0bcd2eaceeb419e6d9ce55aa20f064e92f3ce9fcf7725bfc5a0bf320769cd8bc")]),
    "mathqa-numeric": ("Apache-2.0 (ByteDance)", [
        File(REFT, "mathqa-numeric_nl.json", None, "a53a8a6f041efc5e7d724222bf6472f231b36bce"),
        File(REFT, "mathqa-numeric_python_sdp.json", None, "587adb5c00e836bffd4c5452668f64fdb3fef5f2"),
        File(REFT, "mathqa-numeric_test_set.json", 433_111,
             "7106aa5810115db4d2767a87753fa549fb870e69a517136b5f690c434072f421")]),
    "math": ("MIT by Hendrycks et al. and by OpenAI, but contested: AoPS sent Hugging Face a DMCA "
             "notice about it (2025-01-02). For your own use; do not pass problems or solutions on", [
        File(PRM800K, "train.jsonl", 10_896_985,
             "90d96daeac3fe343ebb1e22ce93dd99690f75983e957f88de42f87cffe1e8076"),
        File(PRM800K, "test.jsonl", 446_564,
             "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132")]),
    "arc": ("CC BY-SA 4.0 (AI2)", [
        File(CHALLENGE, "ARC-Challenge-Train.jsonl", None, archive=ARC_ZIP),
        File(CHALLENGE, "ARC-Challenge-Dev.jsonl", 126_540,
             "55224364abd2477f66a9a57c5cbef109fb71d83019aa5e37aec0e7ab757746ca", ARC_ZIP),
        File(CHALLENGE, "ARC-Challenge-Test.jsonl", 492_726,
             "9fa8ffb3e3a1f88cb302d53dd95aae81e39209ad9bcf974376b319d8fd35717c", ARC_ZIP),
        File(EASY, "ARC-Easy-Train.jsonl", None, archive=ARC_ZIP)]),
}


def fetch(task: str, directory: str | Path = DOWNLOADS, tasks: dict = TASKS) -> None:
    """All files of a task, complete and checked, in directory/task; or SystemExit with a remedy."""
    if task not in tasks:
        what = "toy is generated and needs no download" if task == "toy" else f"unknown task {task!r}"
        raise SystemExit(f"{what}: choose from {', '.join(tasks)}, such as make data TASK=gsm8k")
    licence, files = tasks[task]
    folder = Path(directory) / task
    missing = [file for file in files if not is_there(file, folder)]
    if not missing:
        return
    print(f"{task}, licence: {licence}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    members = [file for file in missing if file.archive]
    archives = [archive for archive in dict.fromkeys(member.archive for member in members)
                if not is_there(archive, folder)]
    for file in [file for file in missing if not file.archive] + archives:
        download(file, folder)
    for member in members:
        extract(member, folder)
    for archive in archives:
        (folder / archive.name).unlink()


def is_there(file: File, folder: Path) -> bool:
    """Whether the file is there and right; SystemExit if something else has its name."""
    path = folder / file.name
    if not path.exists():
        return False
    found = checksum(path, file.pin)
    if found != file.pin:
        raise SystemExit(f"{path} is there with checksum {found}, expected {file.pin}. Delete it and run "
                         "this again; or, if it is data of your own, name its folder with --path")
    print(f"{path} is there, " + ("checked" if file.pin else "unchecked: no checksum of it is known"))
    return True


def checksum(path: Path, pin: str) -> str:
    """The checksum of a file, of the pin's kind; "" if there is no pin."""
    if not pin:
        return ""
    # git's id of a file is the SHA-1 of a short header and the bytes
    digest = (hashlib.sha256() if len(pin) == 64
              else hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False))
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def finish(file: File, folder: Path) -> None:
    """Give a whole .part its final name; or delete it, if its checksum is wrong."""
    part = folder / f"{file.name}.part"
    found = checksum(part, file.pin)
    if found != file.pin:
        part.unlink()
        stop(file, folder, f"wrong checksum {found}, expected {file.pin}, deleted")
    with open(part, "rb+") as written:
        os.fsync(written.fileno())
    os.replace(part, folder / file.name)


def stop(file: File, folder: Path, reason: str) -> NoReturn:
    archive = f" in {file.archive.where}{file.archive.name}" if file.archive else ""
    raise SystemExit(f"{file.where}{file.name}{archive}: {reason}. Run this again later, or get the "
                     f"file by hand, as {folder / file.name}, or name a folder with data: --path")


# --- from the network -----------------------------------------------------------------------------

class StayEncrypted(HTTPRedirectHandler):
    """Follows redirects, but not from https to http."""

    def redirect_request(self, request, body, code, message, headers, url):
        if request.type == "https" and not url.lower().startswith("https:"):
            raise HTTPError(url, code, f"redirect to {url}, which is not https", headers, body)
        return super().redirect_request(request, body, code, message, headers, url)


def download(file: File, folder: Path) -> None:
    """The file from its URL. When the connection breaks, the next of a few tries continues."""
    for wait in (*WAITS, None):
        try:
            receive(file, folder)
            return finish(file, folder)
        except HTTPError as error:
            stop(file, folder, f"HTTP {error.code}, {error.reason}")
        except TROUBLE as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, socket.gaierror):
                stop(file, folder, f"no network, or no such host ({reason})")
            if wait is None:
                stop(file, folder, f"{reason!r}, {len(WAITS) + 1} times; what has arrived is kept")
            print(f"{file.name}: {reason!r}, trying again in {wait} s", flush=True)
            time.sleep(wait)


def receive(file: File, folder: Path) -> None:
    """Bring the file's .part to its full length: keep what it has, ask the server for the rest.

    One of TROUBLE if the connection breaks, SystemExit if the server has another number of bytes.
    """
    part, limit = folder / f"{file.name}.part", file.size or LIMIT
    have = part.stat().st_size if part.exists() else 0
    if have == file.size:
        return  # a run ended just before it could check the checksum
    request = Request(file.where + file.name, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = build_opener(StayEncrypted).open(request, timeout=TIMEOUT)
    except HTTPError as error:
        if error.code != 416 or not have:
            raise
        part.unlink()
        raise ConnectionError(f"no bytes after {have:,}, starting over") from None
    with response:
        if response.status != 206:  # the server sends the whole, whatever it was asked for
            have = 0
        total = file.size if response.length is None else have + response.length
        expected = total == file.size if file.size else (total or 0) <= LIMIT
        if not expected:  # and what there is stays: a page to log in may have come instead
            stop(file, folder, f"the server has {total:,} bytes, not {'' if file.size else 'at most '}{limit:,}")
        with (open(part, "ab" if have else "wb") as out,
              tqdm(total=total, initial=have, desc=file.name, unit="B", unit_scale=True,
                   dynamic_ncols=True) as bar):
            while chunk := response.read(CHUNK):
                have += len(chunk)
                if have > limit:
                    part.unlink()
                    stop(file, folder, f"the server sends more than {limit:,} bytes")
                out.write(chunk)
                bar.update(len(chunk))
    if total is not None and have < total:
        raise ConnectionError(f"the answer ended after {have:,} of {total:,} bytes")


# --- out of an archive ----------------------------------------------------------------------------

def extract(file: File, folder: Path) -> None:
    """One member of a checked archive. Its name comes from TASKS, no path in the archive is used."""
    limit = file.size or LIMIT
    try:
        with (zipfile.ZipFile(folder / file.archive.name) as archive,
              archive.open(file.where + file.name) as member):
            content = member.read(limit + 1)
    except (KeyError, zipfile.BadZipFile) as error:
        stop(file, folder, str(error))
    if len(content) > limit:
        stop(file, folder, f"it has more than {limit:,} bytes")
    (folder / f"{file.name}.part").write_bytes(content)
    finish(file, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--task", required=True, help=f"one of {', '.join(TASKS)}")
    parser.add_argument("--dir", default=DOWNLOADS, help="files go to DIR/TASK")
    args = parser.parse_args()
    try:
        fetch(args.task, args.dir)
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted: the same command goes on from here") from None
    except OSError as error:  # a full disk, a folder that may not be written
        raise SystemExit(f"{error}: the same command goes on from here") from None


if __name__ == "__main__":
    main()
