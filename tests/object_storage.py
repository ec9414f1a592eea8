"""moto's S3 server on loopback, and a proxy before it that misbehaves as it is told."""

import collections
import contextlib
import functools
import http.client
import http.server
import socket
import threading
import time

import pytest

KEYS = dict(
    AWS_ACCESS_KEY_ID="testing",
    AWS_SECRET_ACCESS_KEY="testing",
    AWS_DEFAULT_REGION="us-east-1",
    AWS_EC2_METADATA_DISABLED="true",
    AWS_CONFIG_FILE="/dev/null",
    AWS_SHARED_CREDENTIALS_FILE="/dev/null",
    # boto3 waits longer before each further one.
    AWS_MAX_ATTEMPTS="2",
)
REFUSALS = dict(
    expired=(400, "ExpiredToken"),
    wrong_key=(403, "InvalidAccessKeyId"),
    wrong_secret=(403, "SignatureDoesNotMatch"),
    denied=(403, "AccessDenied"),
    throttled=(503, "SlowDown"),
)


class Proxy(http.server.ThreadingHTTPServer):
    """Hands requests on to the server behind it, except as `fault` says.

    fault   None; a key of REFUSALS; `cut`: GET ends after half of the body and the connection
            closes; `short`: GET answers with less bytes than asked for; `slow`: 16 pieces, 20 ms
            apart; `flipped`: one bit of a GET is another
    times   how many requests get the fault, then it goes away
    only    the fault is for paths that hold this text
    asked   how often each (method, path) was asked for"""

    daemon_threads = True

    def __init__(self, behind):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behind, self.fault, self.times, self.only = behind, None, 10**9, ""
        self.asked, self.mutex = collections.Counter(), threading.Lock()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    def fail(self, fault, times=10**9, only=""):
        self.fault, self.times, self.only = fault, times, only

    def reads(self):
        """Of tars: GET requests until now."""
        return sum(
            n for (method, path), n in self.asked.items() if method == "GET" and ".tar" in path
        )

    def handle_error(self, request, client_address):
        pass  # a client that was killed


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _fault(self):
        server = self.server
        with server.mutex:
            server.asked[self.command, self.path.partition("?")[0]] += 1
            due = server.fault and server.only in self.path and server.times > 0
            server.times -= bool(due)
            return server.fault if due else None

    def _any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self._fault()
        if fault in REFUSALS:
            status, code = REFUSALS[fault]
            text = f"<Error><Code>{code}</Code><Message>as told</Message></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text)
            return
        with contextlib.closing(http.client.HTTPConnection(*self.server.behind)) as there:
            headers = {k: v for k, v in self.headers.items() if k != "Host"}
            there.request(self.command, self.path, body, headers)
            answer = there.getresponse()
            content = answer.read()
        self._answer(answer, content, fault if self.command == "GET" else None)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _any

    def _answer(self, answer, content, fault):
        if fault == "flipped":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if fault == "short":
            content = content[: len(content) // 2]
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else len(content)
        if answer.status != 204:
            self.send_header("Content-Length", str(length or 0))
        self.end_headers()
        if self.command == "HEAD":
            return
        pieces = 16 if fault == "slow" else 2
        step = max(1, -(-len(content) // pieces))
        for n, start in enumerate(range(0, len(content), step)):
            if fault == "cut" and n:
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            time.sleep(0.02 * (fault == "slow"))
            self.wfile.write(content[start : start + step])

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def served():
    """(moto's address, the proxy before it)"""
    pytest.importorskip("boto3", reason="boto3 is not installed (extra s3)")
    pytest.importorskip("moto.server", reason="moto[server] is not installed (extra dev)")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    proxy = Proxy(server.get_host_and_port())
    thread = threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        server.stop()


@functools.cache
def _loader(paths=None):
    from botocore.loaders import create_loader

    return create_loader(paths)


def prepared(monkeypatch, proxy, cache):
    """The environment of a user of the proxy; the proxy is well again."""
    import botocore.session

    from fastdisco.data import objects

    # Every test has a client of its own, which else reads the megabytes that describe S3 anew.
    monkeypatch.setattr(botocore.session, "create_loader", _loader)

    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
    monkeypatch.setenv("FASTDISCO_CACHE", str(cache))
    monkeypatch.setattr(objects, "TRIES", 2)
    proxy.fail(None)
    proxy.asked.clear()
    objects.client.cache_clear()


def empty(bucket):
    """Makes the bucket, or takes everything out of it: pages of at most 1000 objects at once."""
    from fastdisco.data import objects

    client = objects.client("s3")
    client.create_bucket(Bucket=bucket)
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        if keys := [{"Key": each["Key"]} for each in page.get("Contents", [])]:
            client.delete_objects(Bucket=bucket, Delete={"Objects": keys})
