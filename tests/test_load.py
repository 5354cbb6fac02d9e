"""What a user may type: zoo names, files, folders, and the hub (a loopback server here)."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from isoflop.arch import gpt, load, to_hf, write_spec, zoo
from isoflop.arch.hub import config_address
from isoflop.errors import InputError

TINY = gpt("tiny", d_model=8, n_layers=2, n_heads=2, vocab_size=9, max_seq_len=4)
CONFIG = json.dumps(to_hf(TINY)).encode()


def test_a_zoo_name_is_the_zoo_model() -> None:
    loaded = load("llama-3-8b")
    assert loaded.arch == zoo.entry("llama-3-8b").arch
    assert loaded.origin == "zoo"


def test_a_config_is_found_by_its_path_and_by_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_bytes(CONFIG)
    assert load(str(folder)).arch == load(str(folder / "config.json")).arch == TINY


def test_a_spec_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(write_spec(TINY))
    assert load(str(tmp_path / "mine.toml")).arch == TINY


def test_what_a_config_leaves_open_stands_in_the_notes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": 2, "odd": 1}')
    notes = " ".join(load(str(tmp_path)).notes)
    assert "odd" in notes
    assert "n_embd=768" in notes


def test_a_folder_without_config_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"folder with a config\.json"):
        load(str(tmp_path))


def test_a_name_that_is_nothing_says_what_was_tried() -> None:
    with pytest.raises(InputError, match="did you mean llama-3-8b") as caught:
        load("lama-3-8b")
    assert "tried each" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "x" * 5000, "a\0b", "a\nb", "x" * 300, "~nobody/x", "config.yaml"]
)
def test_an_odd_text_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        load(text)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"\.json or \.toml"):
        load(str(tmp_path / "model.bin"))


def test_a_pipe_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(InputError, match="ordinary file"):
        load(str(tmp_path))


# --- the hub ----------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does: a file, a redirect, a refusal, or too much."""

    asked: list[str]

    def do_GET(self) -> None:
        type(self).asked.append(self.path)
        repository = self.path.partition("/resolve/")[0]
        if repository in ("/org/moved", "/org/away"):
            self.send_response(307)
            target = "/org/tiny/resolve/main/config.json"
            away = "http://example.invalid/config.json"
            self.send_header("Location", target if repository == "/org/moved" else away)
            self.end_headers()
            return
        status = {"/org/gated": 401, "/org/none": 404, "/org/busy": 500}.get(repository, 200)
        body = b" " * (2 << 20) if repository == "/org/huge" else CONFIG
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(body)  # a reader stops at its limit, as it should

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_model_is_fetched_when_asked_for(hub: str) -> None:
    loaded = load("hf:org/tiny", hub=hub)
    assert loaded.arch.layers == TINY.layers
    assert loaded.arch.name == "org/tiny"
    assert loaded.origin == "hf:org/tiny"
    assert Hub.asked == ["/org/tiny/resolve/main/config.json"]


def test_a_revision_is_part_of_the_address(hub: str) -> None:
    load("hf:org/tiny@0123abc", hub=hub)
    assert Hub.asked == ["/org/tiny/resolve/0123abc/config.json"]


def test_a_redirect_within_the_hub_is_followed_and_no_other(hub: str) -> None:
    assert load("hf:org/moved", hub=hub).arch.layers == TINY.layers
    with pytest.raises(InputError, match="redirected away"):
        load("hf:org/away", hub=hub)


@pytest.mark.parametrize(
    ("name", "said"),
    [("gated", "gated"), ("none", "at that revision"), ("busy", "HTTP 500"), ("huge", "1,048,576")],
)
def test_a_refusal_is_explained(hub: str, name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load(f"hf:org/{name}", hub=hub)


def test_no_network_is_said() -> None:
    with pytest.raises(InputError, match="give its path instead"):
        load("hf:org/tiny", hub="http://127.0.0.1:9")


@pytest.mark.parametrize(
    "name",
    ["gpt2", "a/b/c", "../x", "a/..", "a/b@", "a/b@x/y", "a/b?c", "a /b", "a/b#c", "a//b", "http://x/y",
     "a/b%2e", "é/b", "-a/b", "a/" + "b" * 200],
)  # fmt: skip
def test_only_a_plain_name_becomes_an_address(hub: str, name: str) -> None:
    with pytest.raises(InputError):
        load(f"hf:{name}", hub=hub)
    assert Hub.asked == []


def test_the_public_hub_is_asked_over_https() -> None:
    address = config_address("org/name@v1.0")
    assert address == "https://huggingface.co/org/name/resolve/v1.0/config.json"
