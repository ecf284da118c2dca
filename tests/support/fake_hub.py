"""A hub on this machine: just enough of the protocol to take an upload, and to refuse one."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeHub:
    """``with FakeHub() as hub``: ``hub.endpoint``, ``hub.repos`` (name → private), ``hub.files`` (path → bytes)."""

    def __init__(self, refuse: int | None = None) -> None:
        self.repos: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def answer(self, content: dict, status: int = 200) -> None:
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                name = self.path.removeprefix("/api/models/").split("/")
                self.answer({"id": "/".join(name[:2]), "sha": "0" * 40, "siblings": [], "private": True})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.tokens.add(self.headers.get("Authorization"))
                if refuse:
                    return self.answer({"error": "not today"}, refuse)
                if self.path == "/api/repos/create":
                    wanted = json.loads(body)
                    name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
                    hub.repos[name] = wanted.get("private", False) or wanted.get("visibility") == "private"
                    return self.answer({"url": f"{hub.endpoint}/{name}", "id": name})
                if "/preupload/" in self.path:
                    files = [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for f in json.loads(body)["files"]
                    ]
                    return self.answer({"files": files})
                if "/commit/" not in self.path:  # the check of the model card
                    return self.answer({"warnings": [], "errors": []})
                for line in filter(None, body.decode().split("\n")):
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        hub.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                return self.answer(
                    {"commitUrl": f"{hub.endpoint}/me/tiny/commit/{'1' * 40}", "commitOid": "1" * 40, "success": True}
                )

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
