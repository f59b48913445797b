"""A local stand-in for the model hub: as much of its HTTP interface as a download asks for."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" + "0" * 34


@contextmanager
def hub_with(hub_id: str, directory: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve ``directory`` as ``hub_id``; yields the endpoint and the paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            asked.append(path)
            headers = {}
            if path.startswith(f"/api/models/{hub_id}/tree/"):
                content = json.dumps(
                    [
                        {"type": "file", "path": name, "size": size, "oid": "0" * 40}
                        for name, size in _files(directory).items()
                    ]
                ).encode()
            elif path.startswith(f"/api/models/{hub_id}"):
                siblings = [{"rfilename": name} for name in _files(directory)]
                content = json.dumps({"id": hub_id, "sha": COMMIT, "siblings": siblings}).encode()
            elif path.startswith(f"/{hub_id}/resolve/{COMMIT}/"):
                content = (directory / path.rpartition("/")[2]).read_bytes()
                etag = hashlib.sha256(content).hexdigest()
                headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _files(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
