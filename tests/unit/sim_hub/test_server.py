"""The protocol: routes, headers, ranges, errors, access, and the request log."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from sim.hub.server import Hub

from .conftest import SHARD, Client, serve

SHA256 = hashlib.sha256(SHARD).hexdigest()
SHARD_URL = "/org/model/resolve/main/model-1.safetensors"


def commit(client: Client) -> str:
    return str(client.get("/api/models/org/model").json()["sha"])


@pytest.mark.parametrize("revision", ["", "/revision/main"])
def test_model_info(client: Client, revision: str) -> None:
    info = client.get(f"/api/models/org/model{revision}?blobs=true").json()
    assert re.fullmatch("[0-9a-f]{40}", info["sha"])
    assert info["id"] == "org/model"
    shard = next(row for row in info["siblings"] if row["rfilename"] == "model-1.safetensors")
    assert shard["size"] == len(SHARD)
    assert shard["lfs"] == {"sha256": SHA256, "size": len(SHARD), "pointerSize": 130}
    assert client.get(f"/api/models/org/model/revision/{info['sha']}").json()["sha"] == info["sha"]


def test_model_info_without_blobs_names_files_only(client: Client) -> None:
    siblings = client.get("/api/models/org/model").json()["siblings"]
    assert siblings == [{"rfilename": name} for name in ("config.json", "model-1.safetensors", "sub/a.txt")]


def test_tree(client: Client) -> None:
    rows = {row["path"]: row for row in client.get("/api/models/org/model/tree/main?recursive=true").json()}
    assert {path: row["type"] for path, row in rows.items()} == {
        "config.json": "file",
        "model-1.safetensors": "file",
        "sub": "directory",
        "sub/a.txt": "file",
    }
    assert rows["model-1.safetensors"]["lfs"] == {"oid": SHA256, "size": len(SHARD), "pointerSize": 130}
    assert [row["path"] for row in client.get("/api/models/org/model/tree/main").json()] == [
        "config.json",
        "model-1.safetensors",
        "sub",
    ]
    assert [row["path"] for row in client.get("/api/models/org/model/tree/main/sub").json()] == ["sub/a.txt"]
    assert client.get("/api/models/org/model/tree/main/none").headers["X-Error-Code"] == "EntryNotFound"


def test_tree_in_pages(client: Client) -> None:
    path: str | None = "/api/models/org/model/tree/main?recursive=true&limit=3"
    found = []
    while path:
        answer = client.get(path)
        found.append([row["path"] for row in answer.json()])
        link = re.fullmatch(r'<http://[^/]+(/.*)>; rel="next"', answer.headers.get("Link", ""))
        path = link.group(1) if link else None
    assert found == [["config.json", "model-1.safetensors", "sub"], ["sub/a.txt"]]


@pytest.mark.parametrize("kind", ["json", "form"])
def test_paths_info(client: Client, kind: str) -> None:
    body = json.dumps({"paths": ["config.json", "none"]}) if kind == "json" else urlencode({"paths": "config.json"})
    content = "application/json" if kind == "json" else "application/x-www-form-urlencoded"
    rows = client.ask("POST", "/api/models/org/model/paths-info/main", body.encode(), Content_Type=content).json()
    assert [row["path"] for row in rows] == ["config.json"]


def test_refs(client: Client, root: Path) -> None:
    (root / "org/model@v1").mkdir()
    (root / "org/model@v1/config.json").write_text("{}")
    refs = client.get("/api/models/org/model/refs").json()
    assert [(row["name"], row["targetCommit"]) for row in refs["branches"]] == [("main", commit(client))]
    assert [row["ref"] for row in refs["tags"]] == ["refs/tags/v1"]


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_resolve_of_a_shard(client: Client, method: str) -> None:
    answer = client.ask(method, SHARD_URL)
    assert answer.status == 200
    assert answer.body == (SHARD if method == "GET" else b"")
    assert {
        name: answer.headers[name]
        for name in ("ETag", "X-Linked-Etag", "X-Linked-Size", "X-Repo-Commit", "Content-Length", "Accept-Ranges")
    } == {
        "ETag": f'"{SHA256}"',
        "X-Linked-Etag": f'"{SHA256}"',
        "X-Linked-Size": "10240",
        "X-Repo-Commit": commit(client),
        "Content-Length": "10240",
        "Accept-Ranges": "bytes",
    }


def test_resolve_of_a_small_file(client: Client) -> None:
    answer = client.get(f"/org/model/resolve/{commit(client)}/sub/a.txt")
    assert answer.body == b"a\n"
    assert answer.headers["ETag"] == '"78981922613b2afb6025042ff6bd878ac1994e85"'
    assert "X-Linked-Etag" not in answer.headers


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [
        ("bytes=0-9", 0, 9),
        ("bytes=10000-", 10000, 10239),
        ("bytes=10230-99999", 10230, 10239),
        ("bytes=-5", 10235, 10239),
    ],
)
def test_range(client: Client, asked: str, first: int, last: int) -> None:
    answer = client.get(SHARD_URL, Range=asked)
    assert (answer.status, answer.body) == (206, SHARD[first : last + 1])
    assert answer.headers["Content-Range"] == f"bytes {first}-{last}/10240"


@pytest.mark.parametrize("asked", ["bytes=10240-", "bytes=-0"])
def test_range_behind_the_end(client: Client, asked: str) -> None:
    answer = client.get(SHARD_URL, Range=asked)
    assert answer.status == 416
    assert answer.headers["Content-Range"] == "bytes */10240"


@pytest.mark.parametrize("asked", ["bytes=5-2", "lines=1-2", "bytes=0-1,3-4", "bytes=-"])
def test_ranges_that_are_none_are_ignored(client: Client, asked: str) -> None:
    answer = client.get(SHARD_URL, Range=asked)
    assert (answer.status, len(answer.body)) == (200, 10240)


def test_one_connection_serves_many_requests(client: Client) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", client.port)
    for _ in range(3):
        connection.request("GET", SHARD_URL)
        assert connection.getresponse().read() == SHARD
    connection.close()


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/org/none/resolve/main/config.json", 401, "RepoNotFound"),
        ("/api/models/org/none", 401, "RepoNotFound"),
        ("/org/model/resolve/v9/config.json", 404, "RevisionNotFound"),
        ("/api/models/org/model/revision/" + "0" * 40, 404, "RevisionNotFound"),
        ("/org/model/resolve/main/none.json", 404, "EntryNotFound"),
        ("/org/model/resolve/main/..%2F..%2F..%2Fsecret", 404, "EntryNotFound"),
        ("/%2e%2e/model/resolve/main/config.json", 401, "RepoNotFound"),
        ("/", 404, None),
        ("/api/whoami-v2", 401, None),
    ],
)
def test_errors(client: Client, path: str, status: int, code: str | None) -> None:
    answer = client.get(path)
    assert (answer.status, answer.headers.get("X-Error-Code")) == (status, code)
    assert answer.json()["error"]


def test_a_missing_repository_is_404_for_whoever_is_known(client: Client) -> None:
    answer = client.get("/org/none/resolve/main/config.json", Authorization="Bearer t")
    assert (answer.status, answer.headers["X-Error-Code"]) == (404, "RepoNotFound")
    assert client.get("/api/whoami-v2", Authorization="Bearer t").json()["name"] == "sim"


@pytest.mark.parametrize(
    ("kind", "token", "info", "file"),
    [
        ("gated", None, (200, None), (401, "GatedRepo")),
        ("gated", "other", (200, None), (403, "GatedRepo")),
        ("gated", "right", (200, None), (200, None)),
        ("private", None, (401, "RepoNotFound"), (401, "RepoNotFound")),
        ("private", "other", (404, "RepoNotFound"), (404, "RepoNotFound")),
        ("private", "right", (200, None), (200, None)),
    ],
)
def test_access(client: Client, kind: str, token: str | None, info: object, file: object) -> None:
    client.play(access={"org/model": {"kind": kind, "token_sha256": [hashlib.sha256(b"right").hexdigest()]}})
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    for path, expected in (("/api/models/org/model", info), (SHARD_URL, file)):
        answer = client.get(path, **headers)
        assert (answer.status, answer.headers.get("X-Error-Code")) == expected


def test_a_wrong_manifest_is_said_in_the_answer(client: Client, root: Path) -> None:
    (root / "org/model/.hub-manifest.json").write_text("{")
    answer = client.get("/api/models/org/model")
    assert answer.status == 500
    assert ".hub-manifest.json" in answer.json()["error"]


def test_a_shard_that_only_the_manifest_knows_is_listed_and_missing(client: Client, root: Path) -> None:
    entry = {"size": 5, "sha256": "0" * 64}
    (root / "org/model/.hub-manifest.json").write_text(json.dumps({"files": {"model-2.safetensors": entry}}))
    assert "model-2.safetensors" in client.get("/api/models/org/model").body.decode()
    answer = client.get("/org/model/resolve/main/model-2.safetensors")
    assert (answer.status, answer.headers["X-Error-Code"]) == (404, "EntryNotFound")


def test_the_log_says_what_was_sent_and_holds_no_token(client: Client) -> None:
    client.get(SHARD_URL, Range="bytes=100-", Authorization="Bearer hf_secret")
    client.ask("HEAD", "/org/model/resolve/main/none")
    text = client.get("/_control/log").body.decode()
    first, second = (json.loads(line) for line in text.splitlines())
    assert {
        key: first[key] for key in ("method", "path", "range", "status", "offset", "bytes", "complete", "authorized")
    } == {
        "method": "GET",
        "path": SHARD_URL,
        "range": "bytes=100-",
        "status": 206,
        "offset": 100,
        "bytes": 10140,
        "complete": True,
        "authorized": True,
    }
    assert (second["method"], second["status"], second["bytes"], second["authorized"]) == ("HEAD", 404, 0, False)
    assert "hf_secret" not in text
    client.ask("DELETE", "/_control/log")
    assert client.log() == []


def test_the_log_goes_to_a_file_too(root: Path, tmp_path: Path) -> None:
    for client in serve(Hub(root, log_file=tmp_path / "log")):
        client.get(SHARD_URL)
        client.log()
    assert json.loads((tmp_path / "log").read_text())["bytes"] == 10240


def test_a_hub_that_is_killed_has_written_down_what_it_had_sent(root: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-m", "sim.hub", f"--root={root}", f"--log={log}", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]) as hub:
        assert hub.stdout is not None
        url = hub.stdout.readline().strip()
        rules = {"rules": [{"path": SHARD_URL, "stall_after": 7000, "times": 1}]}
        urllib.request.urlopen(f"{url}/_control", json.dumps(rules).encode()).close()

        def line() -> tuple[Any, ...]:
            (text,) = (text for text in log.read_text().splitlines() if SHARD_URL in text)
            return tuple(json.loads(text)[name] for name in ("status", "offset", "bytes", "complete"))

        try:
            with urllib.request.urlopen(url + SHARD_URL) as answer:
                assert len(answer.read(7000)) == 7000
                # The hub stands still now. Its line is written after the bytes have left, and the client may be first.
                until = time.monotonic() + 20
                while line()[2] < 7000 and time.monotonic() < until:
                    time.sleep(0.01)
        finally:
            hub.kill()
    assert line() == (200, 0, 7000, False)


def test_requests_at_once_have_a_line_each(root: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    for client in serve(Hub(root, log_file=log)):
        with ThreadPoolExecutor(8) as pool:
            for number in range(40):
                pool.submit(client.get, SHARD_URL, Range=f"bytes={number}-")
        client.log()
    lines = [json.loads(text) for text in log.read_text().splitlines()]
    assert sorted((line["offset"], line["bytes"]) for line in lines) == [(n, 10240 - n) for n in range(40)]


def test_control_wants_its_token(root: Path) -> None:
    for client in serve(Hub(root, control_token="open")):
        assert client.get("/_control").status == 403
        assert client.get("/_control", X_Control_Token="wrong").status == 403
        assert client.get("/_control", X_Control_Token="open").json()["repositories"] == ["org/model"]


def test_control_knows_its_routes(client: Client) -> None:
    assert client.get("/_control/other").status == 404
    assert client.ask("POST", "/_control", b"{").status == 400


def test_the_program_serves_until_it_is_told_to_stop(root: Path) -> None:
    repository = Path(__file__).parents[3]
    program = subprocess.Popen(
        [sys.executable, "-m", "sim.hub", "--root", root, "--port", "0"],
        cwd=repository,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert program.stdout is not None
    with program.stdout:
        address = program.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", address)
        program.send_signal(signal.SIGTERM)
        assert program.wait(timeout=20) == 0


def test_the_program_names_what_is_wrong(root: Path, tmp_path: Path, client: Client) -> None:
    repository = Path(__file__).parents[3]
    for options, remedy in (
        (["--root", tmp_path / "none"], "no such folder"),
        (["--root", root, "--port", str(client.port)], "give another --host or --port"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "sim.hub", *options],
            cwd=repository,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": ""},
        )
        assert done.returncode == 1
        assert remedy in done.stderr
        assert "Traceback" not in done.stderr
