"""Reports in a browser of this machine, and nobody else's."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.reports import Pretence

from fl_app.report.serving import Serving


@contextmanager
def served(*runs: Path) -> Iterator[Serving]:
    with Serving(runs) as serving:
        thread = threading.Thread(target=serving.serve)
        thread.start()
        try:
            yield serving
        finally:
            serving.stop()
            thread.join()


def get(serving: Serving, path: str, host: str = "") -> http.client.HTTPResponse:
    """Ask for a path below the page's own, or a whole one that starts with a slash."""
    address, _, rest = serving.address.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(address, timeout=60)
    whole = path if path.startswith("/") else f"/{rest}{path}"
    connection.putrequest("GET", whole, skip_host=True)
    connection.putheader("Host", host or address)
    connection.endheaders()
    return connection.getresponse()


def test_a_runs_report_and_its_pictures_are_served(tmp_path: Path) -> None:
    run = Pretence(clients=1).write(tmp_path)
    picture = next((run / "reconstructions").glob("*.png"))
    with served(run) as serving:
        page = get(serving, "")
        assert page.status == 200 and "The server could identify" in page.read().decode()
        assert page.headers["X-Content-Type-Options"] == "nosniff"
        assert page.headers["Cache-Control"] == "no-store"
        found = get(serving, f"reconstructions/{picture.name}")
        assert (found.status, found.headers["Content-Type"]) == (200, "image/png")
        assert found.read() == picture.read_bytes()


def test_nothing_else_is_served(tmp_path: Path) -> None:
    run = Pretence(clients=1).write(tmp_path)
    (tmp_path / "secret.png").write_bytes(b"secret")
    (run / "reconstructions" / "link.png").symlink_to(tmp_path / "secret.png")
    (run / "reconstructions" / "folder.png").mkdir()
    truth = next((run / "truth").iterdir()).name
    with served(run) as serving:
        key = serving.address.split("/")[3]
        for path in (
            "config.yaml", "leakage.jsonl", "reconstructions", "reconstructions/",
            "reconstructions/../config.yaml", "reconstructions/..%2fconfig.yaml",
            "reconstructions/%2e%2e/%2e%2e/secret.png", "../../secret.png",
            "reconstructions/link.png", "reconstructions/folder.png", "reconstructions/%00.png",
            f"truth/{truth}", f"reconstructions/../truth/{truth}",
            "/", "//", "/0/", f"/{key}", f"/{key}x/0/", f"/{key}/1/", f"/{key}/..", f"/{key}/0",
        ):  # fmt: skip
            answer = get(serving, path)
            assert answer.status == 404, path
            assert b"secret" not in answer.read()
        for host in ("evil.example", "localhost", "127.0.0.1", "evil.example:80"):
            assert get(serving, "", host).status == 421


def test_it_is_on_the_loopback_alone_by_a_key_of_its_own(tmp_path: Path) -> None:
    run = Pretence(clients=0).write(tmp_path)
    with served(run) as one, served(run) as other:
        assert one.address.startswith("http://127.0.0.1:")
        assert one.address.split("/")[3] != other.address.split("/")[3]
        assert one._server.server_address[0] == "127.0.0.1"


def test_all_runs_are_listed_and_lead_to_their_reports(tmp_path: Path) -> None:
    evil = "<script>alert(1)<"
    Pretence(clients=0).write(tmp_path, name="empty")
    Pretence(clients=1).write(tmp_path, name="second").rename(tmp_path / evil)
    with served(tmp_path / "empty", tmp_path / evil) as serving:
        page = get(serving, "").read().decode()
        assert "The server could identify" in page and "no attack yet" in page
        assert "&lt;script&gt;alert(1)&lt;" in page and "<script" not in page
        for link in ("0/", "1/"):
            assert f'href="{link}"' in page and get(serving, link).status == 200


def test_a_page_that_can_not_be_made_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Pretence(clients=1).write(tmp_path)

    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    with served(run) as serving:
        with monkeypatch.context() as patch:
            patch.setattr("fl_app.report.serving.collect", broken)
            assert get(serving, "").status == 500
        assert get(serving, "").status == 200
