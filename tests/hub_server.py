"""A hub on this machine: the part of the Hub's protocol that huggingface_hub uses to create a repository, commit to
it and read from it, with faults on demand. Repositories live in memory; a Space's name there begins with spaces/."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_good"


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    variables: dict[str, dict[str, str]] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        content = b"".join(name.encode() + data for name, data in sorted(files.items()))
        sha = hashlib.sha1(b"%d" % len(self.commits) + content).hexdigest()
        self.commits[sha], self.refs[ref] = files, sha
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.refs.get(revision, revision)]


@dataclass
class Hub:
    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    drop_uploads: int = 0  # so many uploads are cut before an answer
    truncate: int = 0  # so many downloads of weights are cut in the middle
    log: list[str] = field(default_factory=list)


def oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".png", ".jpg"))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def log_message(self, *arguments):
        pass

    def answer(self, status: int, content: object = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body)), "Content-Type": "application/json"} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.log.append(f"{self.command} {path}")
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return action(self, **match.groupdict())
        self.answer(404, {"error": f"no route for {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    @property
    def logged_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repo(self, name: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self.logged_in):
            self.answer(401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        return repo

    def snapshot(self, name: str, revision: str) -> tuple[Repo, str] | None:
        repo = self.repo(name)
        if repo is None:
            return None
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            self.answer(404, {"error": f"Invalid rev id: {revision}"}, X_Error_Code="RevisionNotFound")
            return None
        return repo, sha

    # who asks: a device's login, which its user grants at once

    def device(self) -> None:
        self.body()
        page = f"{self.hub.url}/device"
        codes = {"device_code": "d", "user_code": "ABCD", "verification_uri": page, "interval": 0, "expires_in": 60}
        self.answer(200, codes)

    def token(self) -> None:
        self.body()
        self.answer(200, {"access_token": TOKEN, "token_type": "bearer", "expires_in": 3600})

    def whoami(self) -> None:
        if not self.logged_in:
            return self.answer(401, {"error": "Invalid username or password."})
        self.answer(200, {"type": "user", "name": "me", "orgs": [], "auth": {"type": "oauth"}})

    # writing

    def create(self) -> None:
        wanted = json.loads(self.body())
        if not self.logged_in:
            return self.answer(401, {"error": "Invalid username or password."})
        space = "spaces/" if wanted.get("type") == "space" else ""
        name = f"{space}{wanted.get('organization') or 'me'}/{wanted['name']}"
        status = 409 if name in self.hub.repos else 200
        if status == 200:
            private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            repo = self.hub.repos[name] = Repo(private=private)
            card = {"README.md": b"---\ntitle: A new Space\n---\n"} if space else {}
            repo.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"} | card)
        self.answer(status, {"url": f"{self.hub.url}/{name}", "id": name, "name": name})

    def validate_yaml(self) -> None:
        self.body()
        self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        files = json.loads(self.body())["files"]
        if not self.logged_in:
            return self.answer(403, {"error": "You don't have the rights to write here"})
        found = self.snapshot(name, revision)
        if found is None:
            return
        there = found[0].files(found[1])
        answers = []
        for file in files:
            path = file["path"]
            entry = {"path": path, "uploadMode": "lfs" if is_large(path) else "regular", "shouldIgnore": False}
            if path in there:
                data = there[path]
                entry["oid"] = hashlib.sha256(data).hexdigest() if is_large(path) else oid(data)
            answers.append(entry)
        self.answer(200, {"files": answers})

    def batch(self, name: str) -> None:
        wanted = json.loads(self.body())["objects"]
        answers = []
        for each in wanted:
            actions = {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}
            answers.append(each if each["oid"] in self.hub.objects else each | {"actions": actions})
        self.answer(200, {"transfer": "basic", "objects": answers}, Content_Type="application/vnd.git-lfs+json")

    def put(self, digest: str) -> None:
        content = self.body()
        if self.hub.drop_uploads:
            self.hub.drop_uploads -= 1
            self.close_connection = True
            return self.connection.close()
        if hashlib.sha256(content).hexdigest() != digest:
            return self.answer(400, {"error": "wrong content"})
        self.hub.objects[digest] = content
        self.answer(200)

    def commit(self, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines()]
        found = self.snapshot(name, revision)
        if found is None:
            return
        repo, parent = found
        files, header = dict(repo.files(parent)), lines[0]["value"]
        if header.get("parentCommit", parent) != parent:
            return self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        proposed = "create_pr=1" in self.path
        sha = repo.commit(files, "refs/pr/1" if proposed else revision)
        answer = {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha}
        if proposed:
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/1"
        self.answer(200, answer)

    def variables(self, name: str) -> None:
        repo = self.repo(name)
        if repo is None:
            return
        if self.command != "GET":
            given = json.loads(self.body())
            repo.variables.pop(given["key"], None)
            if self.command == "POST":
                repo.variables[given["key"]] = {"value": given["value"]}
        self.answer(200, repo.variables)

    # reading

    def info(self, name: str, revision: str = "main") -> None:
        found = self.snapshot(name, revision or "main")
        if found is None:
            return
        repo, sha = found
        siblings = [{"rfilename": path} for path in repo.files(sha)]
        name = name.removeprefix("spaces/")
        self.answer(200, {"id": name, "sha": sha, "private": repo.private, "gated": repo.gated, "siblings": siblings})

    def tree(self, name: str, revision: str) -> None:
        found = self.snapshot(name, revision)
        if found is None:
            return
        entries = []
        for path, data in found[0].files(found[1]).items():
            entry = {"type": "file", "path": path, "size": len(data), "oid": oid(data)}
            if is_large(path):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            entries.append(entry)
        self.answer(200, entries)

    def resolve(self, name: str, revision: str, path: str) -> None:
        found = self.snapshot(name, revision)
        if found is None:
            return
        repo, sha = found
        if repo.gated and not self.logged_in:
            message = f"Access to model {name} is restricted."
            return self.answer(403, {"error": message}, X_Error_Code="GatedRepo", X_Repo_Commit=sha)
        data = repo.files(sha).get(path)
        if data is None:
            return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        tag = hashlib.sha256(data).hexdigest() if is_large(path) else oid(data)
        headers = {"ETag": f'"{tag}"', "X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        begin = int(start[1]) if start else 0
        if start:
            headers["Content_Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        if self.command == "GET" and self.hub.truncate and path.endswith(".safetensors"):
            self.hub.truncate -= 1
            self.send_response(206 if start else 200)
            for key, value in (headers | {"Content_Length": str(len(data) - begin)}).items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(data[begin : (begin + len(data)) // 2])
            self.wfile.flush()
            self.close_connection = True
            return
        self.answer(206 if start else 200, data[begin:], **headers, Content_Type="application/octet-stream")


NAME = r"(?P<name>(?:spaces/)?[^/]+/[^/]+)"
API = rf"/api/(?:models/)?{NAME}"
ROUTES = [
    ("POST", r"/oauth/device", Handler.device),
    ("POST", r"/oauth/token", Handler.token),
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("POST", rf"{API}/preupload/(?P<revision>.+)", Handler.preupload),
    ("POST", rf"{API}/commit/(?P<revision>.+)", Handler.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/lfs/(?P<digest>\w+)", Handler.put),
    ("GET POST DELETE", rf"{API}/variables", Handler.variables),
    ("GET", rf"{API}/tree/(?P<revision>.+)", Handler.tree),
    ("GET", rf"{API}(/revision/(?P<revision>.+))?", Handler.info),
    ("GET HEAD", rf"/{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]


@contextmanager
def serve():
    """A running hub; its `url` is the client's HF_ENDPOINT."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.hub = Hub(url=f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
