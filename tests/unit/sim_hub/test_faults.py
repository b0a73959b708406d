"""Every fault that the hub can play, seen by a client."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest

from sim.hub.faults import FaultError, Faults, RateLimit, parse
from sim.hub.server import Hub

from .conftest import SHARD, Client, serve

SHARD_URL = "/org/model/resolve/main/model-1.safetensors"
ANY_SHARD = "/org/model/resolve/*/model-*.safetensors"


def test_cut_connection_and_resume(client: Client) -> None:
    client.play({"path": ANY_SHARD, "method": "GET", "cut_after": 1000, "times": 1})
    first = client.get(SHARD_URL)
    assert first.broken
    assert first.body == SHARD[:1000]
    second = client.get(SHARD_URL, Range="bytes=1000-")
    assert first.body + second.body == SHARD
    assert [(entry["offset"], entry["bytes"], entry["complete"], entry["rules"]) for entry in client.log()] == [
        (0, 1000, False, [0]),
        (1000, 9240, True, []),
    ]


def test_flipped_byte_is_at_its_place_in_ranges_too(client: Client) -> None:
    client.play({"path": ANY_SHARD, "flip_byte": 5000})
    wrong = SHARD[:5000] + bytes([SHARD[5000] ^ 0xFF]) + SHARD[5001:]
    assert client.get(SHARD_URL).body == wrong
    assert client.get(SHARD_URL, Range="bytes=4990-5009").body == wrong[4990:5010]
    assert client.get(SHARD_URL, Range="bytes=5001-").body == SHARD[5001:]


def test_truncated_file_looks_whole(client: Client) -> None:
    client.play({"path": ANY_SHARD, "truncate": 77})
    answer = client.get(SHARD_URL)
    assert (answer.body, answer.broken, answer.headers["X-Linked-Size"]) == (SHARD[:77], False, "77")


@pytest.mark.parametrize(("status", "code"), [(401, "GatedRepo"), (403, None), (404, "EntryNotFound"), (500, None)])
def test_status(client: Client, status: int, code: str | None) -> None:
    client.play({"path": ANY_SHARD, "status": status} | ({"error_code": code} if code else {}))
    answer = client.get(SHARD_URL)
    assert (answer.status, answer.headers.get("X-Error-Code")) == (status, code)
    assert client.get("/org/model/resolve/main/config.json").status == 200


def test_busy_for_the_next_two_requests_after_one(client: Client) -> None:
    client.play({"path": "/api/*", "status": 429, "retry_after": 3, "skip": 1, "times": 2})
    answers = [client.get("/api/models/org/model") for _ in range(4)]
    assert [answer.status for answer in answers] == [200, 429, 429, 200]
    assert [answer.headers["Retry-After"] for answer in answers] == [None, "3", "3", None]
    assert client.get("/_control").json()["seen"] == [4]


def test_stalled_connection_stays_open_and_sends_no_more(client: Client) -> None:
    client.play({"path": ANY_SHARD, "stall_after": 500})
    with socket.create_connection(("127.0.0.1", client.port), timeout=120) as connection:
        connection.sendall(f"GET {SHARD_URL} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        received = b""
        while len(received.partition(b"\r\n\r\n")[2]) < 500:
            received += connection.recv(4096)
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(1)
    (entry,) = client.log()  # waits until the hub has seen that the client left
    assert (entry["bytes"], entry["complete"]) == (500, False)


def test_wrong_etag_and_missing_headers(client: Client) -> None:
    client.play({"path": ANY_SHARD, "etag": "f" * 64, "omit_headers": ["x-repo-commit"]})
    headers = client.ask("HEAD", SHARD_URL).headers
    assert headers["ETag"] == headers["X-Linked-Etag"] == '"' + "f" * 64 + '"'
    assert "X-Repo-Commit" not in headers


def test_wrong_sha256_everywhere(client: Client) -> None:
    client.play({"path": ANY_SHARD, "sha256": "e" * 64})
    rows = client.get("/api/models/org/model/tree/main").json()
    assert [row["lfs"]["oid"] for row in rows if "lfs" in row] == ["e" * 64]
    siblings = client.get("/api/models/org/model?blobs=1").json()["siblings"]
    assert [row["lfs"]["sha256"] for row in siblings if "lfs" in row] == ["e" * 64]
    assert client.ask("HEAD", SHARD_URL).headers["X-Linked-Etag"] == '"' + "e" * 64 + '"'
    assert client.get("/_control").json()["seen"] == [1], "a listing does not use up a rule"


def test_hidden_file(client: Client) -> None:
    sha = client.get("/api/models/org/model").json()["sha"]
    client.play({"path": ANY_SHARD, "hide": True})
    info = client.get("/api/models/org/model").json()
    assert [row["rfilename"] for row in info["siblings"]] == ["config.json", "sub/a.txt"]
    assert info["sha"] == sha
    assert client.get(SHARD_URL).status == 404


def test_redirect_to_another_server(client: Client, root: Path) -> None:
    for other in serve(Hub(root)):
        client.play({"path": ANY_SHARD, "redirect": other.hub.url})
        answer = client.ask("HEAD", SHARD_URL)
        assert answer.status == 302
        assert answer.headers["X-Linked-Size"] == "10240"
        where = answer.headers["Location"]
        assert where.startswith(other.hub.url + "/_cdn/")
        assert other.get(where.removeprefix(other.hub.url)).body == SHARD
        assert [entry["path"] for entry in other.log()] == ["/_cdn" + SHARD_URL]


def test_a_redirect_to_itself_ends(client: Client) -> None:
    client.play({"path": "*", "redirect": client.hub.url})
    where = client.get(SHARD_URL).headers["Location"].removeprefix(client.hub.url)
    assert client.get(where).body == SHARD


def test_rules_add_up(client: Client) -> None:
    client.play({"path": ANY_SHARD, "flip_byte": 0}, {"path": "*", "cut_after": 10})
    answer = client.get(SHARD_URL)
    assert answer.broken
    assert answer.body == bytes([SHARD[0] ^ 0xFF]) + SHARD[1:10]


@pytest.mark.parametrize(
    "faults",
    [
        {"rules": [{"path": "*", "bytes_per_s": 40960}]},
        {"connection_bytes_per_s": 40960},
        {"total_bytes_per_s": 40960},
    ],
)
def test_a_limited_rate_delays_but_harms_nothing(client: Client, faults: dict[str, object]) -> None:
    client.ask("POST", "/_control", json.dumps(faults).encode())
    start = time.monotonic()
    assert client.get(SHARD_URL).body == SHARD
    assert time.monotonic() - start >= 0.2  # 10240 bytes at 40960 a second; only the lower bound is certain


def test_a_total_limit_is_shared() -> None:
    limit = RateLimit(1000)
    began = time.monotonic()
    limit.reserve(500)
    second = limit.reserve(500)
    # Both may go when 1000 bytes at 1000 a second may, however long ago the first was asked for.
    assert time.monotonic() - began + second >= 0.99


def test_delay(client: Client) -> None:
    client.play({"path": ANY_SHARD, "delay_s": 0.2})
    start = time.monotonic()
    client.get(SHARD_URL)
    assert time.monotonic() - start >= 0.2


def test_the_faults_file_is_read_again_when_it_changes(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "faults.json"
    for client in serve(Hub(root, faults_file=file)):
        assert client.get(SHARD_URL).status == 200
        file.write_text('{"rules": [{"path": "*", "status": 503}]}')
        assert client.get(SHARD_URL).status == 503
        file.write_text('{"rules": "wrong"}')
        assert client.get(SHARD_URL).status == 503, "a wrong file keeps the faults before it"
        assert "stay in force" in client.get("/_control").json()["error"]
        file.write_text("{}")
        os.utime(file, ns=(1, 1))
        assert client.get(SHARD_URL).status == 200
        file.write_text('{"rules": [{"path": "*", "status": 404}]}')
        assert client.get(SHARD_URL).status == 404
        file.unlink()
        assert client.get(SHARD_URL).status == 200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "found list, wanted an object"),
        ({"rule": []}, "unknown key rule"),
        ({"rules": {}}, "wanted rules as a list"),
        ({"rules": [{"status": 1}]}, "rule 0: wanted an object with a path"),
        ({"rules": [{"path": "*"}, {"path": "*", "stats": 1}]}, "rule 1: unknown key stats"),
        ({"rules": [{"path": "*", "seen": 1}]}, "unknown key seen"),
        ({"rules": [{"path": "*", "status": "503"}]}, "status is '503', wanted int"),
        ({"rules": [{"path": "*", "times": True}]}, "times is True, wanted int"),
        ({"rules": [{"path": "*", "cut_after": -1}]}, "cut_after is -1, wanted 0 or more"),
        ({"rules": [{"path": "*", "bytes_per_s": 0}]}, "wanted bytes per second above 0"),
        ({"total_bytes_per_s": "1M"}, "total_bytes_per_s: found '1M'"),
        ({"access": {"a/b": {"kind": "closed"}}}, "kind gated or private"),
        ({"access": {"a/b": {"kind": "gated", "token": "t"}}}, "wanted kind and token_sha256"),
    ],
)
def test_a_wrong_fault_set_is_refused(client: Client, content: object, message: str) -> None:
    with pytest.raises(FaultError) as refused:
        parse(content)
    assert message in str(refused.value)
    answer = client.ask("POST", "/_control", json.dumps(content).encode())
    assert answer.status == 400
    assert message in answer.json()["error"]


def test_a_missing_faults_file_means_no_faults(tmp_path: Path) -> None:
    faults = Faults(tmp_path / "none.json")
    assert faults.current().rules == []
    assert faults.report()["error"] is None
