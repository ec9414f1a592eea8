"""A bucket on loopback, served by moto, for what reads from object storage."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fastdisco.common.urls import Url


@contextlib.contextmanager
def bucket(cache: Path) -> Iterator[Url]:
    """The address of an empty bucket; processes that are started meanwhile reach it, and keep its
    tars in `cache`."""
    from moto.server import ThreadedMotoServer

    from fastdisco.data import objects

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ.update(
        AWS_ENDPOINT_URL=f"http://{host}:{port}",
        AWS_ACCESS_KEY_ID="bench",
        AWS_SECRET_ACCESS_KEY="bench",
        AWS_DEFAULT_REGION="us-east-1",
        FASTDISCO_CACHE=str(cache),
    )
    objects.client("s3").create_bucket(Bucket="bench")
    try:
        yield Url("s3://bench")
    finally:
        server.stop()
