"""A stub of a Kubernetes API server, for running the real helm and kubectl against. Not a cluster.

It answers discovery, stores what it is sent, and runs a check on each object, which is where tests
hang their validators. No admission, no controllers, no schema of its own: nothing here ever starts
a pod. Two things it must do because helm does them: read Secrets in Kubernetes' protobuf, and
answer a watch. A patch of lists replaces them, which is right for the kinds of this chart.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml
from infra.chart_tools.protobuf_secret import read_secret

Object = dict[str, Any]

CORE = {
    "v1": ["Namespace", "Pod", "Service", "ServiceAccount", "Secret", "ConfigMap",
           "PersistentVolumeClaim", "Event"],
    "networking.k8s.io/v1": ["NetworkPolicy", "Ingress"],
    "policy/v1": ["PodDisruptionBudget"],
    "rbac.authorization.k8s.io/v1": ["Role", "RoleBinding"],
}  # fmt: skip
RAY = {"ray.io/v1": ["RayCluster", "RayJob"]}
WATCH_TURNS = 100  # Of a tenth of a second.
MONITORING = {"monitoring.coreos.com/v1": ["PodMonitor", "PrometheusRule"]}


def plural(kind: str) -> str:
    """The plural under which the API server lists a kind."""
    lower = kind.lower()
    if lower.endswith("y"):
        return lower[:-1] + "ies"
    return lower + ("es" if lower.endswith("s") else "s")


def merge_patch(target: Any, patch: Any) -> Any:
    """JSON merge patch; directives of strategic patches (`$...`) are left out."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        elif not key.startswith("$"):
            merged[key] = merge_patch(merged.get(key), value)
    return merged


class StubApi:
    """The server's state: objects by path, refusals to play, and the requests that came."""

    def __init__(self, kinds: dict[str, list[str]], version: str = "v1.35.0") -> None:
        self.kinds = kinds
        self.version = version
        self.objects: dict[str, Object] = {}
        self.requests: list[str] = []
        self.check: Callable[[Object], list[str]] = lambda _: []
        # (method, part of the path) -> status that is answered instead, as often as it comes.
        self.refusals: dict[tuple[str, str], int] = {}
        self.stopped = threading.Event()
        self._revision = 0

    def of_kind(self, kind: str) -> dict[str, Object]:
        """Stored objects of a kind by name."""
        found = [o for o in self.objects.values() if o["kind"] == kind]
        return {o["metadata"]["name"]: o for o in found}

    def store(self, path: str, body: Object) -> Object:
        """Put an object where a request named it, with what a server adds."""
        self._revision += 1
        old = self.objects.get(path, {})
        metadata = {**body["metadata"], "resourceVersion": str(self._revision)}
        metadata["uid"] = old.get("metadata", {}).get("uid", f"uid-{self._revision}")
        metadata.setdefault("creationTimestamp", "2026-01-01T00:00:00Z")
        metadata.setdefault("namespace", path.split("/namespaces/")[-1].split("/")[0])
        stored = {**body, "metadata": metadata}
        if stored["kind"] == "Pod":  # The one thing that helm waits for: a test's end.
            stored["status"] = {"phase": "Succeeded"}
        self.objects[path] = stored
        return stored

    def discovery(self, path: str) -> Object | None:
        """Answer to a discovery path; None for other paths."""
        if path.startswith("/openapi/v3"):
            return self._openapi(path)
        if path == "/version":
            major, minor = self.version.removeprefix("v").split(".")[:2]
            return {"major": major, "minor": minor, "gitVersion": self.version}
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            versions = [v for v in self.kinds if v != "v1"]
            entries = [
                {"name": v.split("/")[0],
                 "versions": [{"groupVersion": v, "version": v.split("/")[1]}],
                 "preferredVersion": {"groupVersion": v, "version": v.split("/")[1]}}
                for v in versions
            ]  # fmt: skip
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": entries}
        version = path.removeprefix("/apis/").removeprefix("/api/")
        if version not in self.kinds:
            return None
        verbs = ["create", "delete", "get", "list", "patch", "update", "watch"]
        resources = [
            {"name": plural(kind), "singularName": kind.lower(), "kind": kind, "verbs": verbs,
             "namespaced": kind != "Namespace"}
            for kind in self.kinds[version]
        ]  # fmt: skip
        return {"kind": "APIResourceList", "groupVersion": version, "resources": resources}

    def _openapi(self, path: str) -> Object:
        """Just enough for clients to see that the server itself looks for unknown fields."""
        prefixes = {("api/v1" if v == "v1" else f"apis/{v}"): v for v in self.kinds}
        if path == "/openapi/v3":
            links = {p: {"serverRelativeURL": f"/openapi/v3/{p}"} for p in prefixes}
            return {"paths": links}
        prefix = path.removeprefix("/openapi/v3/")
        group, _, version = prefixes.get(prefix, "v1").rpartition("/")
        paths = {}
        for kind in self.kinds.get(prefixes.get(prefix, ""), []):
            patch = {
                "parameters": [{"name": "fieldValidation", "in": "query"}],
                "responses": {},
                "x-kubernetes-group-version-kind": {
                    "group": group, "version": version, "kind": kind,
                },
            }  # fmt: skip
            paths[f"/{prefix}/namespaces/{{namespace}}/{plural(kind)}/{{name}}"] = {"patch": patch}
        return {"openapi": "3.0.0", "info": {"title": "stub", "version": "0"}, "paths": paths}

    def kind_at(self, path: str) -> str | None:
        """Kind of the collection or object at a path; None where the server knows none."""
        for version, kinds in self.kinds.items():
            prefix = "/api/v1/" if version == "v1" else f"/apis/{version}/"
            if path.startswith(prefix):
                words = path.removeprefix(prefix).split("/")
                words = words[2:] if words[0] == "namespaces" and len(words) > 2 else words
                return next((kind for kind in kinds if plural(kind) == words[0]), None)
        return None

    def listed(self, path: str, query: dict[str, list[str]]) -> list[Object]:
        """Objects under a collection that match the label and name selectors of the query."""
        found = [o for p, o in self.objects.items() if p.rpartition("/")[0] == path]
        for term in ",".join(query.get("labelSelector", [])).split(","):
            key, is_equal, value = term.partition("=")
            if is_equal:
                found = [o for o in found if o["metadata"].get("labels", {}).get(key) == value]
        for term in query.get("fieldSelector", []):
            name = term.removeprefix("metadata.name=")
            found = [o for o in found if o["metadata"]["name"] == name]
        return found

    @contextmanager
    def running(self, folder: Path) -> Iterator[Path]:
        """Serve on a free port; yields a kubeconfig."""
        handler = type("Handler", (_Handler,), {"api": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "stub",
            "clusters": [{"name": "stub", "cluster": {"server": address}}],
            "users": [{"name": "stub", "user": {}}],
            "contexts": [{"name": "stub", "context": {"cluster": "stub", "user": "stub"}}],
        }
        path = folder / "kubeconfig"
        path.write_text(yaml.safe_dump(config))
        path.chmod(0o600)
        try:
            yield path
        finally:
            self.stopped.set()
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    """One request; `api` is set by `StubApi.running`."""

    api: StubApi
    protocol_version = "HTTP/1.1"
    # Else each answer waits 40 ms for the client to acknowledge its head.
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        """Requests are kept in `StubApi.requests`."""

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path, query = url.path.rstrip("/"), parse_qs(url.query)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.api.requests.append(f"{self.command} {self.path}")
        for (method, part), status in self.api.refusals.items():
            if method == self.command and part in path:
                return self._refuse(status, "Refused", "refused by the stub")
        if self.command == "GET" and (found := self.api.discovery(path)) is not None:
            return self._send(200, found)
        kind = self.api.kind_at(path)
        if kind is None:
            return self._refuse(404, "NotFound", "the server could not find the resource")
        act = {"GET": self._get, "DELETE": self._delete}.get(self.command)
        if act is not None:
            return act(path, query, kind)
        return self._write(path, body, kind)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer

    def _get(self, path: str, query: dict[str, list[str]], kind: str) -> None:
        if path in self.api.objects:
            return self._send(200, self.api.objects[path])
        if not path.endswith("/" + plural(kind)):
            return self._refuse(404, "NotFound", f'{plural(kind)} "{Path(path).name}" not found')
        version = next(v for v, kinds in self.api.kinds.items() if kind in kinds)
        if query.get("watch"):
            return self._watch(path, query, version, kind)
        items = self.api.listed(path, query)
        found = {"kind": f"{kind}List", "apiVersion": version, "items": items}
        return self._send(200, {**found, "metadata": {"resourceVersion": "1"}})

    def _watch(self, path: str, query: dict[str, list[str]], version: str, kind: str) -> None:
        """Send what is there, that it was all, and for a few seconds what changes."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        seen: dict[str, str] = {}
        for turn in range(WATCH_TURNS):
            events = []
            for item in self.api.listed(path, query):
                name, revision = item["metadata"]["name"], item["metadata"]["resourceVersion"]
                if seen.get(name) != revision:
                    events.append({"type": "MODIFIED" if name in seen else "ADDED", "object": item})
                    seen[name] = revision
            if turn == 0 and query.get("sendInitialEvents") == ["true"]:
                end = {"resourceVersion": "1", "annotations": {"k8s.io/initial-events-end": "true"}}
                mark = {"apiVersion": version, "kind": kind, "metadata": end}
                events.append({"type": "BOOKMARK", "object": mark})
            try:
                self.wfile.write(b"".join(json.dumps(e).encode() + b"\n" for e in events))
                self.wfile.flush()
            except OSError:  # The client has seen enough.
                return
            if self.api.stopped.wait(0.1):
                return

    def _delete(self, path: str, _: dict[str, list[str]], kind: str) -> None:
        if self.api.objects.pop(path, None) is None:
            return self._refuse(404, "NotFound", f'{plural(kind)} "{Path(path).name}" not found')
        return self._send(200, {"kind": "Status", "apiVersion": "v1", "status": "Success"})

    def _write(self, path: str, body: bytes, kind: str) -> None:
        content = self.headers.get("Content-Type", "")
        if "protobuf" in content:
            sent = read_secret(body)
        else:
            sent = yaml.safe_load(body) if "yaml" in content else json.loads(body)
        if self.command == "POST":
            path = f"{path}/{sent['metadata']['name']}"
            if path in self.api.objects:
                return self._refuse(409, "AlreadyExists", f"{path} already exists")
        elif self.command == "PATCH" and "apply-patch" not in content:
            if path not in self.api.objects:
                return self._refuse(404, "NotFound", f"{path} not found")
            sent = merge_patch(self.api.objects[path], sent)
        faults = self.api.check(sent)
        if faults:
            return self._refuse(422, "Invalid", f"{kind} is invalid: {'; '.join(faults)}")
        status = 201 if path not in self.api.objects else 200
        return self._send(status, self.api.store(path, sent))

    def _refuse(self, code: int, reason: str, message: str) -> None:
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure"}
        self._send(code, {**status, "reason": reason, "message": message, "code": code})

    def _send(self, code: int, body: Object) -> None:
        self._bytes(code, json.dumps(body).encode())

    def _bytes(self, code: int, content: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
