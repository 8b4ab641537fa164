"""A Hugging Face Hub on loopback: the routes, headers and redirects that huggingface_hub's
downloads use.

HEAD and GET /{repo}/resolve/{revision}/{file}: small files come at once with their git blob id as
ETag; .safetensors are redirected, with X-Linked-Etag (sha256) and X-Linked-Size, to a second server
that stands for the CDN and knows Range. Errors carry X-Error-Code. What shall go wrong is put into
`faults`, file name -> list of faults, taken one by one: an HTTP status, "cut" (the connection ends
halfway), "short" (half of the file, said to be all), "damaged" (a byte flipped), "drip" (a byte
now and then).
"""

import hashlib
import re
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """`with Hub({"owner/name": folder}) as hub:` serves the folders; hub.url is its address,
    hub.log what was asked: (method, host, file, Range header, Authorization header)."""

    def __init__(self, repos: dict[str, Path]):
        self.repos, self.faults, self.log, self.blobs = repos, {}, [], {}
        self.private, self.gated, self.revisions = set(), set(), []
        self.servers = [
            ThreadingHTTPServer(("127.0.0.1", 0), self._handler(host)) for host in ("hub", "cdn")
        ]
        self.url, self.cdn = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)

    def __enter__(self):
        for server in self.servers:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def asked(self, method="GET"):
        """The files that were asked for, in order; the redirects to the CDN count once."""
        return [
            name
            for how, host, name, *_ in self.log
            if how == method and (host == "cdn" or not is_large(name))
        ]

    def _handler(self, host):
        return type("HostHandler", (Handler,), {"hub": self, "host": host})

    def fault(self, name):
        faults = self.faults.get(name)
        return faults.pop(0) if faults else None


def is_large(name):
    return name.endswith(".safetensors")


class Handler(BaseHTTPRequestHandler):
    """Answers for one host of a Hub; `hub` and `host` are set by it."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        if self.host == "cdn":
            path, name = self.hub.blobs[self.path.removeprefix("/")]
            self.note(name)
            return self.send(path, self.hub.fault(name))
        if "/resolve/" not in self.path:  # what the library asks on its own account
            return self.refuse(404, None, "Not found")
        repo, _, rest = self.path.removeprefix("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        self.note(name)
        self.hub.revisions.append(revision)
        folder = self.hub.repos.get(repo)
        if refusal := self.refusal(repo, folder, revision, name):
            return self.refuse(*refusal)
        if not is_large(name):
            return self.send(folder / name, self.hub.fault(name))
        status = (
            self.hub.fault(name)
            if isinstance(next(iter(self.hub.faults.get(name, [])), None), int)
            else None
        )
        if status is not None:
            return self.refuse(status, None, "fault")
        data = (folder / name).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        self.hub.blobs[digest] = (folder / name, name)
        self.send_response(302)
        self.send_header("Location", f"{self.hub.cdn}/{digest}")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Linked-Etag", f'"{digest}"')
        self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def refusal(self, repo, folder, revision, name):
        """(status, error code, message) of what may not be had, or None."""
        token = self.headers.get("Authorization")
        if token not in (None, "Bearer right"):
            return 401, None, "Invalid credentials in Authorization header"
        if folder is None or (repo in self.hub.private and token is None):
            return 401, "RepoNotFound", "Repository not found"
        if repo in self.hub.gated and token is None:
            return 401, "GatedRepo", f"Access to model {repo} is restricted"
        if revision not in ("main", COMMIT):
            return 404, "RevisionNotFound", "Invalid rev id"
        if not (folder / name).is_file():
            return 404, "EntryNotFound", "Entry not found"
        return None

    def note(self, name):
        self.hub.log.append(
            (
                self.command,
                self.host,
                name,
                self.headers.get("Range"),
                self.headers.get("Authorization"),
            )
        )

    def refuse(self, status, code, message):
        self.send_response(status)
        if code is not None:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, path, fault):
        if isinstance(fault, int):
            return self.refuse(fault, None, "fault")
        data = path.read_bytes()
        first = int((re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        if fault == "damaged":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if fault == "short":
            data = data[: len(data) // 2]
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        blob = b"blob %d\0" % len(data) + data
        self.send_header("ETag", f'"{hashlib.sha1(blob).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        if self.command == "GET" and fault == "drip":
            with suppress(OSError):  # until the other side has had enough
                for byte in data[first:]:
                    self.wfile.write(bytes([byte]))
                    threading.Event().wait(0.2)
        elif self.command == "GET":
            self.wfile.write(data[first : len(data) // 2] if fault == "cut" else data[first:])
            self.close_connection = fault == "cut"
