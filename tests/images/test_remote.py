"""Images of other machines: only what the user names, never more than the limit, and the vectors of a local file."""

import http.server
import io
import threading
import time

import fsspec
import pytest
from PIL import Image

from gen2embed_mteb.errors import Gen2EmbedError
from gen2embed_mteb.images import remote
from gen2embed_mteb.images.cached_images import CachedImages
from gen2embed_mteb.images.errors import ImageError
from gen2embed_mteb.images.remote import read_remote, require_allowed_names, shown
from gen2embed_mteb.images.source import ImageSource


def png(color="red"):
    with io.BytesIO() as file:
        Image.new("RGB", (40, 30), color).save(file, "PNG")
        return file.getvalue()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(remote, "WAIT", 0.0)


@pytest.fixture
def memory():
    """A file system of fsspec in memory, with one picture."""
    files = fsspec.filesystem("memory")
    files.pipe_file("/pictures/red.png", png())
    yield files
    files.rm("/", recursive=True)


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    disable_nagle_algorithm = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.failing, self.sent = [], 0, 0

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        if self.server.failing:
            self.server.failing -= 1
            return self.send_error(503)
        if path == "/endless":
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.server.sent += self.wfile.write(bytes(65536))
            except OSError:
                return None
        if path == "/slow":
            time.sleep(0.6)
        if path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", path.removeprefix("/to/").replace("_", "/"))
            self.end_headers()
            return None
        if path == "/cut" and self.server.asked.count("/cut") < 2:
            self.send_response(200)
            self.send_header("Content-Length", str(len(png())))
            self.end_headers()
            self.wfile.write(png()[:-9])
            return None
        if path not in ("/cut", "/red.png", "/slow", "/pictures/red.png"):
            return self.send_error(404)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(png())
        return None


@pytest.fixture
def server():
    server = Server()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("kind", [ImageSource, lambda root, **more: CachedImages(root, root / "cache", **more)])
def test_digest_size_and_pixels_are_those_of_a_local_file(tmp_path, memory, server, kind):
    (tmp_path / "red.png").write_bytes(png())
    images = kind(tmp_path, remote_images=("memory", f"{server.address}/"))
    want = images.facts("red.png")
    for address in ("memory://pictures/red.png", f"{server.address}/red.png"):
        assert images.facts(address) == want
        assert images.open(address).tobytes() == images.open("red.png").tobytes()


def test_nothing_is_read_that_was_not_named(tmp_path, memory, server):
    plain, named = ImageSource(tmp_path), ImageSource(tmp_path, remote_images=("memory",))
    for images in (plain, named):
        with pytest.raises(ImageError, match="nothing is fetched from a URL"):
            images.open(f"{server.address}/red.png")
    with pytest.raises(ImageError, match="nothing is fetched"):
        plain.open("memory://pictures/red.png")
    assert not server.asked
    beginning = ImageSource(tmp_path, remote_images=("memory://pictures/",))
    assert beginning.open("memory://pictures/red.png").size == (40, 30)
    memory.pipe_file("/other/red.png", png())
    for address in (
        "memory://other/red.png",
        "memory://pictures/../other/red.png",
        "memory://pictures/%2e%2e/other/red.png",
    ):
        with pytest.raises(ImageError):
            beginning.open(address)


@pytest.mark.parametrize(
    "address",
    [
        "file:///etc/passwd",
        "local:///etc/passwd",
        "simplecache::memory://pictures/red.png",
        "memory://a.zip::memory://pictures/red.png",
        "zip://red.png::memory://pictures/a.zip",
    ],
)
def test_local_files_and_chains_are_never_read(tmp_path, memory, address):
    with pytest.raises(ImageError):
        ImageSource(tmp_path, remote_images=("memory", "file", "local", "zip", "simplecache")).open(address)


def test_the_rules_for_local_files_stay(tmp_path, memory):
    (tmp_path / "root").mkdir()
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "root" / "link.png").symlink_to(tmp_path / "secret.png")
    images = ImageSource(tmp_path / "root", remote_images=("memory",))
    for path in ("../secret.png", "link.png", str(tmp_path / "secret.png")):
        with pytest.raises(ImageError, match="outside"):
            images.open(path)


def test_never_more_than_the_limit_is_read(server, memory):
    with pytest.raises(ImageError, match="more than the limit of 100000 bytes"):
        read_remote(f"{server.address}/endless", ("http",), 100_000)
    assert server.sent < 20_000_000, "what the sockets hold"
    size = len(png())
    assert read_remote("memory://pictures/red.png", ("memory",), size) == png()
    with pytest.raises(ImageError, match="limit"):
        read_remote("memory://pictures/red.png", ("memory",), size - 1)


def test_a_redirect_goes_only_where_the_user_allows(server):
    allowed = (f"{server.address}/",)
    assert read_remote(f"{server.address}/to/_red.png", allowed, 10**6) == png()
    inside = (f"{server.address}/to/",)
    with pytest.raises(ImageError, match="nothing is fetched"):
        read_remote(f"{server.address}/to/_red.png", inside, 10**6)
    for place in ("file:__etc_passwd", "http:__169.254.169.254_latest"):
        with pytest.raises(ImageError):
            read_remote(f"{server.address}/to/{place}", allowed, 10**6)


def test_a_failing_server_is_asked_again_and_a_missing_file_is_not(server, memory):
    server.failing = 2
    assert read_remote(f"{server.address}/red.png", ("http",), 10**6) == png()
    assert len(server.asked) == 3
    with pytest.raises(ImageError, match="not found"):
        read_remote(f"{server.address}/nothing.png", ("http",), 10**6)
    assert len(server.asked) == 4
    with pytest.raises(ImageError, match="not found"):
        read_remote("memory://pictures/nothing.png", ("memory",), 10**6)


def test_an_answer_that_is_cut_short_is_asked_for_again(server):
    assert read_remote(f"{server.address}/cut", ("http",), 10**6) == png()
    assert server.asked == ["/cut", "/cut"]


def test_a_slow_answer_is_given_up(server):
    with pytest.raises(ImageError, match=r"no answer within 0\.1 seconds|timed out"):
        read_remote(f"{server.address}/slow", ("http",), 10**6, seconds=0.1)


def test_messages_show_no_secrets():
    assert shown("s3://key:secret@bucket/a.png?X-Signature=abc#x") == "s3://bucket/a.png"
    with pytest.raises(ImageError) as error:
        read_remote("https://user:word@example.org/a.png?sig=abc", (), 10**6)
    assert "word" not in str(error.value) and "abc" not in str(error.value)


@pytest.mark.parametrize("name", ["file", "zip", "simplecache::s3", "no-such-thing", "s3://bucket", "file:///data/"])
def test_what_can_never_be_read_is_refused_before_any_work(name):
    with pytest.raises(Gen2EmbedError, match="remote_images"):
        require_allowed_names([name])


def test_known_protocols_are_accepted():
    require_allowed_names(["memory", "http", "https", "hf", "memory://pictures/", "https://images.example.org/"])


@pytest.mark.slow
@pytest.mark.exhaustive
def test_an_evaluation_of_remote_pictures_equals_one_of_local_files(tmp_path, memory, server):
    """The same vectors and figures; a picture that is not there is set aside alone."""
    import json

    from mmeb_files import colour_rows, write_images, write_table

    from gen2embed_mteb import cli

    write_images(tmp_path / "local" / "img")
    rows = colour_rows(["red", "blue", "green"])
    for row in rows:
        name = row["qry_img_path"]
        memory.pipe_file(f"/{name}", (tmp_path / "local" / name).read_bytes())
    remote_rows = [row | {"qry_img_path": f"memory://{row['qry_img_path']}"} for row in rows]
    remote_rows.append(rows[0] | {"qry_img_path": "memory://img/nothing.png"})
    scores = []
    for name, table, more in (("local", rows, []), ("remote", remote_rows, ["--remote_images", "memory"])):
        write_table(tmp_path / name / "VOC2007" / "test-00000-of-00001.parquet", table)
        words = [
            "evaluate",
            "--model_name",
            "gen2embed-mini",
            "--data_dir",
            str(tmp_path / name),
            "--subsets",
            "VOC2007",
        ]
        words += ["--output_dir", str(tmp_path / f"out-{name}"), "--max_error_rate", "0.5", *more]
        assert cli.main(words) == 0
        scores.append(json.loads((tmp_path / f"out-{name}" / "results.json").read_text())["datasets"]["VOC2007"])
    assert scores[1] | {"num_errors": 0} == scores[0] and scores[1]["num_errors"] == 1
    shards = [sorted((tmp_path / f"out-{name}" / "embeddings").rglob("*.npy")) for name in ("local", "remote")]
    assert shards[0] and [one.read_bytes() for one in shards[0]] == [one.read_bytes() for one in shards[1]]
