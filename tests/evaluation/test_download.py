"""A published file is fetched whole, or not at all."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cascade.errors import UserError
from cascade.evaluation.download import URL, fetch

CONTENT = bytes(range(256)) * 3000
NAME = f"weights-{hashlib.sha256(CONTENT).hexdigest()[:8]}.pth"


class Answers(BaseHTTPRequestHandler):
    """/whole/ sends the file, /cut/ a part of it, /other/ another one, and /none/ nothing."""

    def do_GET(self):
        self.server.asked.append(self.path)
        kind = self.path.split("/")[1]
        self.send_response(404 if kind == "none" else 200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        if kind != "none":
            self.wfile.write({"cut": CONTENT[:-5], "other": CONTENT[::-1]}.get(kind, CONTENT))

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def address(server, kind):
    return f"http://127.0.0.1:{server.server_address[1]}/{kind}/{NAME}"


def test_it_is_fetched_once(server, tmp_path):
    for _ in range(2):
        path = fetch(address(server, "whole"), tmp_path / "cache")
        assert path.read_bytes() == CONTENT and path.name == NAME
    assert len(server.asked) == 1 and list((tmp_path / "cache").iterdir()) == [path]


def test_what_a_power_cut_left_is_fetched_again(server, tmp_path):
    (tmp_path / NAME).write_bytes(CONTENT[:-5])
    path = fetch(address(server, "whole"), tmp_path)
    assert path.read_bytes() == CONTENT and list(tmp_path.iterdir()) == [path]


def test_without_a_home_a_sentence_says_so(monkeypatch):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    with pytest.raises(UserError, match="no home folder"):
        fetch()


@pytest.mark.parametrize(
    "kind, said", [("none", "404"), ("cut", "isn't that file"), ("other", "isn't that file")]
)
def test_anything_else_leaves_nothing(kind, said, server, tmp_path):
    with pytest.raises(UserError, match=said):
        fetch(address(server, kind), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_a_sentence_says_so(server, tmp_path):
    nowhere = address(server, "whole")
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="--inception FILE") as caught:
        fetch(nowhere, tmp_path)
    assert "Traceback" not in str(caught.value) and list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="Can't fetch"):
        fetch(nowhere, tmp_path / "file")


def test_the_address_ends_as_its_digest_begins():
    assert URL.endswith("-6726825d.pth")
