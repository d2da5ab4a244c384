"""Downloads from a server on this machine, which stalls, breaks off, and tells lies."""

import concurrent.futures
import errno
import hashlib
import http.server
import io
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import fax
from fax.tasks import DownloadError, _download
from fax.tasks._download import Source, cache_folder, files

CONTENT = bytes(i * i % 251 for i in range(100_000))
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`, by the habits that a test gives it, and remembers what was asked for."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.tag, self.asked = CONTENT, '"1"', []
        self.ranges = self.says_length = True
        self.chunked = False
        self.faults = []  # of the next connections: ("cut", n), ("stall", n) or ("status", code)
        self.before = lambda number: None  # each connection, with how many there were before
        self.url = f"http://127.0.0.1:{self.server_port}/some.sqlite.lzma"

    def handle_error(self, request, client_address):
        pass  # clients that go away are what is tested here


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        server.before(len(server.asked))
        asked = self.headers["Range"]
        server.asked.append(asked)
        fault, amount = server.faults.pop(0) if server.faults else (None, 0)
        if fault == "status":
            self.send_error(amount)
            return
        content, start = server.content, 0
        if asked and server.ranges and self.headers["If-Range"] == server.tag:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            said = start + amount if fault == "lie" else start
            self.send_header("Content-Range", f"bytes {said}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if server.tag:
            self.send_header("ETag", server.tag)
        if server.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif server.says_length:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start : start + amount if fault in ("cut", "stall") else None]
        if server.chunked:
            body = b"%x\r\n%s\r\n" % (len(body), body) + (b"" if fault else b"0\r\n\r\n")
        self.wfile.write(body)
        self.wfile.flush()
        if fault == "stall":
            threading.Event().wait(2)

    def setup(self):
        self.request.settimeout(10)
        if self.server.chunked:
            self.protocol_version = "HTTP/1.1"
        super().setup()

    def handle(self):
        self.close_connection = True
        self.handle_one_request()
        self.close_connection = True


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(_download, "_PAUSE", 0.001)
    monkeypatch.setattr(_download, "_TIMEOUT", 5.0)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def left(folder):
    """The files of a folder, without locks, which mean nothing."""
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def assert_whole(folder, server, sha256=SHA256):
    (path,) = files(folder, Source(server.url, sha256))
    assert path == folder / "some.sqlite.lzma"
    assert path.read_bytes() == CONTENT


def test_a_file_is_downloaded_once(server, tmp_path):
    folder = tmp_path / "not" / "there yet"
    assert_whole(folder, server)
    assert_whole(folder, server)
    assert server.asked == [None]
    assert left(folder) == ["some.sqlite.lzma"]  # the checksum is the published one


def test_the_first_checksum_is_written_down_where_none_is_published(server, tmp_path):
    assert_whole(tmp_path, server, None)
    record = tmp_path / "some.sqlite.lzma.sha256"
    assert record.read_text() == f"{SHA256}  some.sqlite.lzma\n"  # as sha256sum writes it
    path = tmp_path / "some.sqlite.lzma"
    path.write_bytes(CONTENT[:-1])
    for _ in range(2):  # it is not forgotten
        with pytest.raises(DownloadError, match=f"{SHA256} is in .*damaged, or another version"):
            files(tmp_path, Source(server.url))
    path.unlink()
    server.content = b"a new edition"  # whoever removes a file gets what there is
    assert files(tmp_path, Source(server.url))[0].read_bytes() == b"a new edition"
    assert record.read_text().startswith(hashlib.sha256(b"a new edition").hexdigest())


def test_a_checksum_that_cannot_be_written_down_leaves_nothing_behind(
    server, tmp_path, monkeypatch
):
    path = tmp_path / "some.sqlite.lzma"
    path.write_bytes(CONTENT)

    def full(path):
        raise OSError(errno.ENOSPC, "no space is left")

    with monkeypatch.context() as patched:
        patched.setattr(_download, "sync_to_disk", full)
        with pytest.raises(OSError, match="no space"):
            files(tmp_path, Source(server.url))
    assert left(tmp_path) == [path.name]
    assert_whole(tmp_path, server, None)
    assert left(tmp_path) == [path.name, f"{path.name}.sha256"]


def test_a_file_put_there_by_hand_is_checked(server, tmp_path):
    path = tmp_path / "some.sqlite.lzma"
    path.write_bytes(b"something else")
    with pytest.raises(DownloadError, match=rf"{SHA256} is published.*Remove it.*{server.url}"):
        files(tmp_path, Source(server.url, SHA256))
    path.write_bytes(CONTENT)
    assert_whole(tmp_path, server)
    assert server.asked == []


@pytest.mark.parametrize("sha256", [SHA256, None])
@pytest.mark.parametrize("fault", ["cut", "stall"])
def test_a_download_that_breaks_off_goes_on(server, tmp_path, monkeypatch, fault, sha256):
    monkeypatch.setattr(_download, "_TIMEOUT", 0.2)
    server.faults = [(fault, 30_000), (fault, 1), (fault, 20_000)]
    assert_whole(tmp_path, server, sha256)
    assert server.asked == [None, "bytes=30000-", "bytes=30001-", "bytes=50001-"]
    assert left(tmp_path) == ["some.sqlite.lzma"] + ["some.sqlite.lzma.sha256"] * (not sha256)


def test_a_download_goes_on_after_a_failure_of_all_attempts(server, tmp_path):
    server.faults = [("cut", 30_000)] + [("cut", 0)] * 5
    with pytest.raises(DownloadError, match=r"cannot be downloaded.*IncompleteRead"):
        files(tmp_path, Source(server.url, SHA256))
    assert left(tmp_path) == ["some.sqlite.lzma.part", "some.sqlite.lzma.part.json"]
    server.asked.clear()
    assert_whole(tmp_path, server)
    assert server.asked == ["bytes=30000-"]


def test_a_part_of_another_version_is_thrown_away(server, tmp_path):
    def replace(number):
        if number == 1:
            server.content, server.tag = CONTENT, '"2"'

    server.content, server.before = bytes(100_000), replace
    server.faults = [("cut", 30_000)]
    assert_whole(tmp_path, server, None)
    assert server.asked == [None, "bytes=30000-"]  # and the server sent all of it


def test_parts_that_no_version_vouches_for_are_not_joined(server, tmp_path):
    server.tag = ""
    server.faults = [("cut", 30_000)]
    assert_whole(tmp_path, server, None)
    assert server.asked == [None, None]


def test_a_part_that_is_wrong_is_replaced(server, tmp_path):
    server.faults = [("cut", 30_000)] + [("cut", 0)] * 5
    with pytest.raises(DownloadError):
        files(tmp_path, Source(server.url, SHA256))
    (tmp_path / "some.sqlite.lzma.part").write_bytes(bytes(30_000))
    server.asked.clear()
    assert_whole(tmp_path, server)
    assert server.asked == ["bytes=30000-", None]


@pytest.mark.parametrize("size", [100_000, 100_001])
def test_a_part_that_is_complete_or_too_long(server, tmp_path, size):
    server.faults = [("cut", 30_000)] + [("cut", 0)] * 5
    with pytest.raises(DownloadError):
        files(tmp_path, Source(server.url, SHA256))
    (tmp_path / "some.sqlite.lzma.part").write_bytes((CONTENT + b"?")[:size])
    server.asked.clear()
    assert_whole(tmp_path, server)
    assert server.asked == ([] if size == 100_000 else [None])


def test_a_damaged_note_beside_a_part(server, tmp_path):
    server.faults = [("cut", 30_000)] + [("cut", 0)] * 5
    with pytest.raises(DownloadError):
        files(tmp_path, Source(server.url, SHA256))
    (tmp_path / "some.sqlite.lzma.part.json").write_text("{")
    server.asked.clear()
    assert_whole(tmp_path, server)
    assert server.asked == [None]


def test_a_server_without_ranges(server, tmp_path):
    server.ranges = False
    server.faults = [("cut", 30_000), ("cut", 50_000)]
    assert_whole(tmp_path, server)
    assert server.asked == [None, "bytes=30000-", "bytes=50000-"]
    (tmp_path / "some.sqlite.lzma").unlink()
    server.faults = [("cut", 30_000)] * 10  # brings nothing new from the second time on
    server.asked.clear()
    with pytest.raises(DownloadError, match="IncompleteRead"):
        files(tmp_path, Source(server.url, SHA256))
    assert len(server.asked) == 6


def test_a_server_that_sends_another_range(server, tmp_path):
    server.faults = [("cut", 30_000), ("lie", 7)]
    assert_whole(tmp_path, server, None)
    assert server.asked == [None, "bytes=30000-", None]


def test_a_server_whose_file_became_shorter(server, tmp_path):
    def shorten(number):
        if number == 1:
            server.content = CONTENT[:20_000]

    server.content, server.before = CONTENT + b"!", shorten
    server.faults = [("cut", 30_000)]
    (path,) = files(tmp_path, Source(server.url))
    assert path.read_bytes() == CONTENT[:20_000]


def test_a_server_that_does_not_say_how_long_the_file_is(server, tmp_path):
    server.says_length = False
    with pytest.raises(DownloadError, match="does not say how long"):
        files(tmp_path, Source(server.url))
    assert_whole(tmp_path, server)  # a published checksum tells


def test_a_chunked_file(server, tmp_path):
    server.chunked = True
    server.faults = [("cut", 30_000)]
    assert_whole(tmp_path, server, None)
    assert len(server.asked) == 2


def test_a_wrong_file(server, tmp_path):
    server.content = CONTENT[::-1]
    with pytest.raises(DownloadError) as raised:
        files(tmp_path, Source(server.url, SHA256))
    for part in (SHA256, hashlib.sha256(CONTENT[::-1]).hexdigest(), server.url, "removed"):
        assert part in str(raised.value)
    assert left(tmp_path) == []


def test_errors_of_the_server(server, tmp_path):
    server.faults = [("status", 503), ("status", 429)]
    assert_whole(tmp_path, server)
    (tmp_path / "some.sqlite.lzma").unlink()
    server.faults, server.asked = [("status", 404)], []
    with pytest.raises(DownloadError, match="HTTP Error 404"):
        files(tmp_path, Source(server.url, SHA256))
    assert server.asked == [None]  # there is no use in asking again
    assert left(tmp_path) == []


def test_offline_says_which_files_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setattr(_download, "_PAUSE", 10.0)  # no second attempt
    sources = [
        Source(f"http://files.invalid/{name}", sha) for name, sha in [("a", SHA256), ("b", None)]
    ]
    (tmp_path / "there").mkdir()
    with pytest.raises(DownloadError) as raised:
        files(tmp_path / "there", *sources)
    text = str(raised.value)
    for part in (
        "there/a\n",
        "http://files.invalid/a",
        SHA256,
        "there/b\n",
        "http://files.invalid/b",
    ):
        assert part in text
    assert "not published" in text
    assert "FAX_CACHE" in text
    assert left(tmp_path / "there") == []
    assert isinstance(raised.value, OSError)


def test_a_full_disk(server, tmp_path, monkeypatch):
    room = 40_000

    class Full(io.FileIO):
        def write(self, raw):
            nonlocal room
            if len(raw) > room:
                raise OSError(errno.ENOSPC, "No space left on device")
            room -= len(raw)
            return super().write(raw)

    def opened(self, mode="r", *args, **kwargs):
        return Full(self, "ab") if mode == "ab" else original(self, mode, *args, **kwargs)

    original = Path.open
    server.faults = [("cut", 30_000)]
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", opened)
        with pytest.raises(OSError, match=r"no space is left.*Free some space") as raised:
            files(tmp_path, Source(server.url, SHA256))
    assert raised.value.errno == errno.ENOSPC
    kept = tmp_path / "some.sqlite.lzma.part"
    assert left(tmp_path) == [kept.name, kept.name + ".json"]
    assert kept.read_bytes() == CONTENT[: kept.stat().st_size]
    assert kept.stat().st_size >= 30_000
    assert_whole(tmp_path, server)
    assert server.asked[0] is None
    assert None not in server.asked[1:]


def test_two_processes_at_once(server, tmp_path):
    code = (
        "import sys; from fax.tasks._download import Source, files; from pathlib import Path; "
        "print('ready', flush=True); sys.stdin.readline(); "
        "files(Path(sys.argv[1]), Source(*sys.argv[2:]))"
    )
    gate = threading.Event()
    server.before = lambda number: gate.wait(20)
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path), server.url]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, text=True, **pipes)
    assert process.stdout.readline() == "ready\n"
    # Both want it before either gets a byte.
    process.stdin.write("\n")
    process.stdin.flush()
    with concurrent.futures.ThreadPoolExecutor(1) as here:
        own = here.submit(files, tmp_path, Source(server.url))
        gate.set()
        own.result(60)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert server.asked == [None]
    assert (tmp_path / "some.sqlite.lzma").read_bytes() == CONTENT
    assert left(tmp_path) == ["some.sqlite.lzma", "some.sqlite.lzma.sha256"]


def test_threads_at_once_and_a_process_that_was_killed(server, tmp_path):
    (tmp_path / ".some.sqlite.lzma.lock").touch()  # of somebody who is gone
    (tmp_path / "some.sqlite.lzma.part").write_bytes(b"left behind")
    failures = []

    def load():
        try:
            assert_whole(tmp_path, server)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert server.asked == [None]


def test_the_folder_for_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("FAX_CACHE", str(tmp_path / "one"))
    assert cache_folder() == tmp_path / "one"
    assert cache_folder(tmp_path / "two") == tmp_path / "two"
    monkeypatch.delenv("FAX_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "fax"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == tmp_path / "Library" / "Caches" / "fax"
    assert fax.tasks.DownloadError is DownloadError
