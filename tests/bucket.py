"""A bucket in memory: the calls of Cloud Storage's JSON API that a run makes.

gcsfs, tensorstore and google-cloud-storage speak to it over HTTP as to the service,
which is told by environment variables. As in the service an object appears whole, with
a new generation, there are no directories, and nothing can be renamed or appended to.
"""

import contextlib
import http.server
import itertools
import json
import re
import sys
import threading
import urllib.parse
from pathlib import Path

from crossmae_jax import paths

NAME = "bucket"


class Bucket:
    """The objects by name; a test may change them behind the program's back.

    Attributes:
      refused: uploads of names that match are answered with "forbidden".
      received: method and path of all calls so far.
      written: names of objects in the order in which they were written.
    """

    def __init__(self, url):
        self.url = url
        self.refused = None
        self.received, self.written = [], []
        self._objects = {}
        self._uploads = {}
        self._generations = itertools.count(1_000)
        self._lock = threading.Lock()

    def names(self, prefix=""):
        with self._lock:
            return sorted(name for name in self._objects if name.startswith(prefix))

    def read(self, name):
        return self._objects[name][0]

    def write(self, name, data):
        with self._lock:
            self._objects[name] = (data, next(self._generations))
            self.written.append(name)

    def delete(self, name):
        with self._lock:
            return self._objects.pop(name, None)

    def put(self, folder, directory):
        """Copies the files of a directory to a folder."""
        for path in paths.files(Path(directory)):
            self.write(f"{folder}/{path.relative_to(directory)}", path.read_bytes())

    def largest(self, prefix):
        """Returns the name of the largest object whose name begins so."""
        return max(self.names(prefix), key=lambda name: len(self.read(name)))

    def flip(self, name):
        """Changes one bit in the middle of an object."""
        data = bytearray(self.read(name))
        data[len(data) // 2] ^= 1
        self.write(name, bytes(data))

    def describe(self, name):
        data, generation = self._objects[name]
        return {
            "kind": "storage#object", "bucket": NAME, "name": name, "metageneration":
            "1", "generation": str(generation), "size": str(len(data)),
            "contentType": "application/octet-stream", "storageClass": "STANDARD",
            "timeCreated": "2024-01-01T00:00:00.000Z",
            "updated": "2024-01-01T00:00:00.000Z",
        }

    def list(self, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        for name in self.names(prefix):
            if name < query.get("startOffset", ""):
                continue
            if "endOffset" in query and name >= query["endOffset"]:
                continue
            head, cut, _ = name[len(prefix):].partition(delimiter or "\0")
            if delimiter and cut:
                prefixes.add(prefix + head + cut)
            else:
                items.append(self.describe(name))
        return {
            "kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)
        }


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *arguments):
        pass

    def _answer(self, status, content=b"", **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _refuse(self, status, reason):
        self._answer(status, {"error": {"code": status, "message": reason}})

    def _handle(self):
        bucket = self.server.bucket
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, _, query = self.path.partition("?")
        query = dict(urllib.parse.parse_qsl(query))
        bucket.received.append(f"{self.command} {urllib.parse.unquote(path)}")
        if found := re.fullmatch(r"/(?:upload|resumable)/storage/v1/b/(\w+)/o", path):
            return self._upload(bucket, query, body)
        if found := re.fullmatch(
            r"(?:/download)?/storage/v1/b/(\w+)(?:(/o)(?:/([^/]+)(/.*)?)?)?", path
        ):
            where, listing, name, rest = found.groups()
            if where != NAME:
                return self._refuse(404, f"There is no bucket {where}.")
            if not listing:
                return self._answer(200, {
                    "kind": "storage#bucket", "name": NAME, "id": NAME,
                    "location": "US", "storageClass": "STANDARD",
                })
            if name is None:
                return self._answer(200, bucket.list(query))
            return self._object(
                bucket, urllib.parse.unquote(name), rest, query
            )
        return self._refuse(501, f"{self.command} {self.path} is not known here.")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _object(self, bucket, name, rest, query):
        if name not in bucket.names(name):
            return self._refuse(404, f"No such object: {name}")
        data, generation = bucket._objects[name]
        headers = {
            "x_goog_generation": str(generation), "x_goog_metageneration": "1",
            "ETag": f'"{generation}"', "x_goog_stored_content_length": str(len(data)),
        }
        if rest:
            to = re.fullmatch(r"/rewriteTo/b/\w+/o/([^/]+)", rest)
            if to is None:
                return self._refuse(501, f"{rest} is not known here.")
            to = urllib.parse.unquote(to[1])
            bucket.write(to, data)
            return self._answer(200, {"done": True, "resource": bucket.describe(to)})
        if self.command == "DELETE":
            bucket.delete(name)
            return self._answer(204)
        if query.get("alt") != "media":
            return self._answer(200, bucket.describe(name))
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._answer(304)
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self._answer(200, data, **headers)
        if not wanted[1]:
            first, last = max(len(data) - int(wanted[2]), 0), len(data) - 1
        else:
            first = int(wanted[1])
            last = min(int(wanted[2] or len(data)), len(data) - 1)
        if first >= len(data):
            return self._refuse(416, f"{first} lies behind the end, {len(data)}.")
        headers["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
        return self._answer(206, data[first:last + 1], **headers)

    def _upload(self, bucket, query, body):
        kind, name = query.get("uploadType"), query.get("name")
        if kind == "multipart":
            mark = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1]
            parts = body.split(f"--{mark}".encode())
            about, data = (
                re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in parts[1:3]
            )
            name = json.loads(about)["name"]
            data = data.removesuffix(b"\n").removesuffix(b"\r")
        elif kind == "resumable" and "upload_id" not in query:
            name = name or json.loads(body)["name"]
            key = str(next(bucket._generations))
            bucket._uploads[key] = (name, bytearray())
            return self._answer(200, {}, Location=(
                f"{bucket.url}/upload/storage/v1/b/{NAME}/o?uploadType=resumable"
                f"&upload_id={key}"
            ))
        elif kind == "resumable":
            name, collected = bucket._uploads[query["upload_id"]]
            collected += body
            total = self.headers["Content-Range"].rpartition("/")[2]
            if total == "*" or len(collected) < int(total):
                return self._answer(308, Range=f"bytes=0-{len(collected) - 1}")
            data = bytes(collected)
        else:
            data = body
        if bucket.refused and re.search(bucket.refused, name):
            return self._refuse(403, f"Writing {name} is not allowed.")
        exists = name in bucket.names(name)
        if query.get("ifGenerationMatch") == "0" and exists:
            return self._refuse(412, f"{name} exists.")
        bucket.write(name, data)
        return self._answer(200, bucket.describe(name))


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        # gcsfs hangs up on what it no longer needs.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def serve():
    """Yields an empty bucket that is served as long as the context lasts."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.bucket = Bucket(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.bucket
        finally:
            server.shutdown()
            thread.join()


def environment(url):
    """Returns the variables that send every client to a bucket served there."""
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,  # ArrayRecord's
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "no secret",
        "GOOGLE_CLOUD_PROJECT": "none",
        # Asks the service by gRPC for kinds of buckets that this is none of.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
