"""`tinyllama watch`: the report of a run as a live page, served on 127.0.0.1 until interrupted.

The script of the page requests the page again every few seconds (page.js). For each answer, the server reads only the
new rows of metrics.jsonl. The server writes no files and sends nothing to the network.
"""

import contextlib
import os
import re
import threading
import time
import webbrowser
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from tinyllama.errors import InputError, first_line, translate_damage_errors
from tinyllama.formatting import echo, visible
from tinyllama.report.content import MetricsReader, RunData, read_run
from tinyllama.report.page import POLICY, Picker, render_page
from tinyllama.runs.listing import RunStatus, read_run_status, runs_in
from tinyllama.runs.run_dir import RunDir

_HOST, _MAX_PORT = "127.0.0.1", 65_535
_STATUS_SECONDS = 10.0
"""Time after which the states of the runs in the picker are read again."""


def watch(runs: Sequence[Path] = (), port: int | None = None, browser: bool = True) -> None:
    """Serve the live page of runs, by default of the newest run in `runs`, until interrupted.

    Raises InputError if there is no run to show, or if the port is invalid or in use.
    """
    if port is not None and not 1 <= port <= _MAX_PORT:
        raise InputError(f"--port {port}: not a port; give 1 to {_MAX_PORT}, or omit --port for a free one")
    page = LivePage([RunDir.open(path) for path in runs] or [_newest_run(Path("runs"))])
    try:
        server = _Server(page, port or 0)
    except OSError as error:
        raise InputError(f"--port {port}: {error.strerror}; give another, or omit --port for a free one") from None
    with server, contextlib.suppress(KeyboardInterrupt):
        address = f"http://{_HOST}:{server.server_port}/"
        echo(f"watching {', '.join(page.selected)}: {address} (Ctrl-C ends it)")
        # Without a display, webbrowser would start a text browser in the terminal.
        if browser and {"BROWSER", "DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
            # Some browsers return only when the user closes them, so the page must be served in the meantime.
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        server.serve_forever()


def _newest_run(folder: Path) -> RunDir:
    found = [(run.events_path.stat().st_mtime, run) for run in runs_in(folder) if run.events_path.is_file()]
    if not found:
        raise InputError(f"{folder}: no run here; start one with `tinyllama train RECIPE`, or name a run's folder")
    return max(found, key=lambda pair: pair[0])[1]


class LivePage:
    """Live page of the given runs; its picker lists all runs in the folders of the given runs."""

    def __init__(self, runs: Sequence[RunDir]) -> None:
        self.given = [RunDir(run.path.absolute()) for run in runs]
        self.lock = threading.Lock()
        self.readers: dict[RunDir, MetricsReader] = {}
        self.runs: dict[str, RunDir] = {}
        self.statuses: dict[str, RunStatus] = {}
        self.status_time = -_STATUS_SECONDS
        self._find_runs()
        self.selected = [name for run in self.given for name, other in self.runs.items() if run == other]
        """Names of the given runs. The page shows the first run, compared with the others."""

    def render(self, query: str, is_live: bool = True) -> str:
        """Return the page that a query selects: `run=NAME`, and `compare=NAME` for each run to compare with.

        If `is_live` is false, return the report that `tinyllama report` writes. Names of no run become problems.
        """
        fields = parse_qs(query)
        names = [*fields.get("run", self.selected[:1])[:1], *fields.get("compare", [])]
        names = list(dict.fromkeys(names if fields else self.selected))
        with self.lock:
            self._find_runs()
            found, problems = list[RunData](), list[str]()
            for name in names:
                try:
                    found.append(self._read(name))
                except (InputError, OSError) as error:
                    problems.append(f"{name}: cannot be shown: {first_line(error)}")
                    if name == names[0]:
                        break
            picker = Picker(self.statuses, names[0], names[1:], problems)
            try:
                with translate_damage_errors(Path(names[0])):
                    return render_page(found[0] if found else None, found[1:], picker if is_live else None)
            except InputError as error:
                problems.append(first_line(error))
                return render_page(None, picker=picker)

    def _read(self, name: str) -> RunData:
        if name not in self.runs:
            raise InputError(f"no run of this name in {', '.join({str(run.path.parent) for run in self.given})}")
        run = self.runs[name]
        with translate_damage_errors(run.path):
            return read_run(run.path, self.readers.setdefault(run, MetricsReader(run)))

    def _find_runs(self) -> None:
        """Update the list of runs and their states."""
        if time.monotonic() - self.status_time < _STATUS_SECONDS:
            return
        folders = dict.fromkeys(run.path.parent for run in self.given)
        started = [run for folder in folders for run in runs_in(folder) if run.is_started]
        runs = list(dict.fromkeys([*self.given, *started]))
        names = [run.name for run in runs]
        self.runs = {visible(run.name if names.count(run.name) == 1 else str(run.path)): run for run in runs}
        self.statuses = {name: read_run_status(run) for name, run in self.runs.items()}
        self.status_time = time.monotonic()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, page: LivePage, port: int) -> None:
        self.page = page
        super().__init__((_HOST, port), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 30

    def do_GET(self) -> None:
        """Answer with the live page (`/`) or the report as a file (`/report.html`)."""
        # Refuse other host names, since a website may resolve its own name to this machine (DNS rebinding).
        if not re.fullmatch(r"(127\.0\.0\.1|localhost)(:\d+)?", self.headers.get("Host", "")):
            self.send_error(400, "this page is available at 127.0.0.1 only")
            return
        address = urlsplit(self.path)
        if address.path not in ("/", "/report.html"):
            self.send_error(404)
            return
        data = self.server.page.render(address.query, is_live=address.path == "/").encode()
        with contextlib.suppress(ConnectionError):  # the browser has closed the page
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Content-Security-Policy", f"{POLICY}; frame-ancestors 'none'")
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:
        """Print nothing, since a page sends a request every few seconds."""
