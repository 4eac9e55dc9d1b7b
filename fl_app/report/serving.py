"""Reports in a browser: a small server for this machine alone. Free of torch."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote

from fl_app.report.collect import collect
from fl_app.report.render import Listed, render, render_list
from fl_app.report.source import read_source
from fl_app.report.verdict import main_attack, verdict_of
from fl_app.util.reading import BrokenFileError, read_bytes
from fl_app.util.text import printable

_PICTURE = re.compile(r"reconstructions/[^./\\\0][^/\\\0]*\.png")
_MOST_BYTES = 2**28  # of a picture
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Serving:
    """A server of some runs' reports on the loopback, to be used as a context.

    Reports are made when they are asked for. It answers what comes by its own address alone: a
    page elsewhere, by whatever name it reaches this machine (DNS rebinding), neither names
    this host nor knows the key in that address, and nor does who scans the ports.

    Parameters
    ----------
    runs : sequence of Path
        Runs' folders: one is shown, of more there is a list.
    port : int
        0: any that is free.
    """

    def __init__(self, runs: Sequence[Path], port: int = 0) -> None:
        self._runs = {str(number): run for number, run in enumerate(runs)}
        self._key = secrets.token_urlsafe(16)
        serving = self

        class Handler(_Handler):
            pages = serving

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._host = f"127.0.0.1:{self._server.server_port}"

    @property
    def address(self) -> str:
        """What a browser is to open."""
        one = "0/" if len(self._runs) == 1 else ""
        return f"http://{self._host}/{self._key}/{one}"

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.server_close()

    def serve(self) -> None:
        """Answer requests until `stop`, or Ctrl-C."""
        self._server.serve_forever()

    def stop(self) -> None:
        """End `serve`, which runs in another thread."""
        self._server.shutdown()

    def answer(self, host: str | None, path: str) -> tuple[HTTPStatus, str, bytes]:
        """Return the status, the type and the content of what a request asks for.

        Parameters
        ----------
        host : str or None
            The request's header ``Host``.
        path : str
            As it was sent.
        """
        if host != self._host:
            return _nothing(HTTPStatus.MISDIRECTED_REQUEST)
        parts = unquote(path.partition("?")[0]).split("/", 3)
        if len(parts) < 3 or not secrets.compare_digest(parts[1].encode(), self._key.encode()):
            return _nothing(HTTPStatus.NOT_FOUND)
        if parts[2:] == [""]:
            return _page(render_list([self._listed(*each) for each in self._runs.items()]))
        run = self._runs.get(parts[2])
        if run is None or len(parts) < 4:
            return _nothing(HTTPStatus.NOT_FOUND)
        if not parts[3]:
            return _page(render(collect(run)))
        return _picture(run, parts[3])

    def _listed(self, number: str, run: Path) -> Listed:
        source = read_source(run)
        found = verdict_of(source, main_attack(source))
        data = "own data" if source.described else source.setting("dataset", "name")
        facts = (source.setting("started")[:16].replace("T", " "), data,
                 source.setting("model", "name"))  # fmt: skip
        return Listed(run.name, f"{quote(number)}/", printable(", ".join(filter(None, facts))),
                      found.level, found.sentence)  # fmt: skip


def _page(text: str) -> tuple[HTTPStatus, str, bytes]:
    return HTTPStatus.OK, "text/html; charset=utf-8", text.encode()


def _nothing(status: HTTPStatus) -> tuple[HTTPStatus, str, bytes]:
    return status, "text/plain; charset=utf-8", f"{status.phrase}\n".encode()


def _picture(run: Path, name: str) -> tuple[HTTPStatus, str, bytes]:
    """Return a picture of a run, by a path as its log may hold it, and nothing else."""
    file, folder = run / name, run / "reconstructions"
    if not _PICTURE.fullmatch(name) or file.is_symlink() or folder.is_symlink():
        return _nothing(HTTPStatus.NOT_FOUND)
    try:
        return HTTPStatus.OK, "image/png", read_bytes(file, _MOST_BYTES)
    except BrokenFileError:
        return _nothing(HTTPStatus.NOT_FOUND)


class _Handler(BaseHTTPRequestHandler):
    """Passes GET on to `Serving`, and logs nothing: paths hold the key."""

    pages: Serving
    server_version, sys_version = "flowleak", ""
    timeout = 30  # seconds that a silent connection is kept

    def do_GET(self) -> None:
        try:
            status, kind, content = self.pages.answer(self.headers.get("Host"), self.path)
        except Exception:  # whatever a file makes of it, the server goes on
            status, kind, content = _nothing(HTTPStatus.INTERNAL_SERVER_ERROR)
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)),
                            **_HEADERS}.items():  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
