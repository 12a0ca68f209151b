"""A stand-in for W&B's servers on this machine: enough of their protocol for `wandb sync` of a run without files. It keeps the rows it is sent."""

from __future__ import annotations

import gzip
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROJECT = {"id": "P", "name": "emdiff", "entity": {"id": "E", "name": "me"}}


class Handler(BaseHTTPRequestHandler):
    """One request; `self.server.rows` are the history rows in the order of their line numbers."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:  # noqa: N802
        """Streams of rows, and GraphQL; anything else, such as W&B's telemetry, is not found."""
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        raw = gzip.decompress(raw) if self.headers.get("Content-Encoding") == "gzip" else raw
        known = {"graphql": self.query, "file_stream": self.stream}.get(self.path.split("/")[-1])
        text = json.dumps(known(json.loads(raw)) if known else {}).encode()
        self.send_response(200 if known else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def stream(self, body: dict[str, Any]) -> dict[str, Any]:
        """Keep history rows at the lines they are for."""
        history = body.get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
        rows = self.server.rows
        rows[history["offset"] : history["offset"] + len(history["content"])] = [json.loads(line) for line in history["content"]]
        return {"exitcode": None, "limits": {}}

    def query(self, body: dict[str, Any]) -> dict[str, Any]:
        """Answer a GraphQL query; views of the entity "refused" are."""
        if "upsertView" in body.get("query", "") and body["variables"]["entityName"] == "refused":
            return {"data": None, "errors": [{"message": "permission denied", "path": ["upsertView"]}]}
        return {"data": self.data(body)}

    def data(self, body: dict[str, Any]) -> dict[str, Any]:
        """What the run looks like by now; a view is accepted and kept."""
        rows, name, variables = self.server.rows, body.get("operationName") or "", body.get("variables") or {}
        bucket = {"id": "R", "name": variables.get("name"), "displayName": "", "sweepName": None, "historyLineCount": len(rows), "project": PROJECT}
        if name == "UpsertBucket":
            return {"upsertBucket": {"bucket": bucket, "inserted": not rows}}
        if name == "RunResumeStatus" and rows:
            tail = {"historyTail": json.dumps([json.dumps(rows[-1])]), "summaryMetrics": json.dumps(rows[-1]), "eventsTail": "[]", "config": "{}"}
            more = {"eventsLineCount": 0, "logLineCount": 0, "tags": [], "notes": None, "wandbConfig": json.dumps({"t": 1})}
            return {"model": {**PROJECT, "bucket": {**bucket, **tail, **more}}}
        if "upsertView" in body.get("query", ""):
            self.server.views.append(variables)
            return {"upsertView": {"view": {"id": "V", "name": variables["name"]}, "inserted": True}}
        viewer = {"id": "U", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
        files = {"runID": "R", "uploadHeaders": [], "files": []}
        return {"model": None, "viewer": viewer, "serverInfo": {"features": []}, "createRunFiles": files}


@contextmanager
def wandb_server():
    """Yield a server that listens on this machine alone; its address is `server.url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.rows, server.views, server.url = [], [], f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
