"""Object storage by the S3 interface: listing, reading, writing, and what its errors mean.

boto3 is imported inside functions: only those who give an s3:// or gs:// address need it.
Credentials and region are found as boto3 always finds them; AWS_ENDPOINT_URL names another server
than Amazon's."""

import contextlib
import functools
import hashlib
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

from fastdisco.common.errors import UserError
from fastdisco.common.heart import beat
from fastdisco.common.urls import Url

GOOGLE = "https://storage.googleapis.com"  # speaks S3, with HMAC keys as credentials
PIECE = 16 << 20  # bytes of one request for a part of a large object
CONNECTIONS = 8  # requests at once for one object
TRIES = 4  # for a piece whose connection broke
# ETags of objects that were uploaded in one piece, unless encrypted by a key service, are their MD5.
_MD5 = re.compile(r"[0-9a-f]{32}")
_KEYS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
# S3's codes -> what was found, and what to do.
_MEANINGS = {
    "InvalidAccessKeyId": ("the access key is not known there", _KEYS),
    "SignatureDoesNotMatch": ("the secret key is wrong", _KEYS),
    "ExpiredToken": ("the credentials have expired", "get new ones, then the same command goes on"),
    "InvalidToken": ("the session token is not valid", "set AWS_SESSION_TOKEN anew, or unset it"),
    "AccessDenied": ("access is denied", "give these credentials the right to it"),
    "NoSuchBucket": ("there is no such bucket", "correct its name, or create it"),
    "InvalidBucketName": ("that is no name of a bucket", "correct it"),
    "NoSuchKey": ("there is no such object", "correct its name, or put it back"),
    "PreconditionFailed": ("it was replaced while it was read", "give the same command again"),
    "PermanentRedirect": ("the bucket is in another region", "set AWS_DEFAULT_REGION to that"),
}
_MEANINGS["ExpiredTokenException"] = _MEANINGS["RequestExpired"] = _MEANINGS["ExpiredToken"]
# An answer to HEAD has no text, so its status alone is the code.
_MEANINGS |= {"403": _MEANINGS["AccessDenied"], "404": _MEANINGS["NoSuchKey"]}
_MEANINGS["412"] = _MEANINGS["PreconditionFailed"]


class Object(NamedTuple):
    """An object as a listing shows it."""

    url: Url
    size: int  # bytes
    etag: str  # without its quotes; another content has another


# ---- looking


def listed(folder: Url) -> dict[str, Object]:
    """{name: object} of the objects right in the folder, sorted by name.  Raises UserError."""
    if not folder.bucket:
        raise UserError(f"{folder}: names no bucket; give {folder.scheme}://BUCKET/FOLDER")
    found = {}
    for page in _pages(folder):
        for each in page.get("Contents", []):
            name = each["Key"].removeprefix(folder.prefix)
            # Some tools put an empty object in place of the folder itself.
            if name:
                found[name] = Object(folder / name, each["Size"], each["ETag"].strip('"'))
    return dict(sorted(found.items()))


def folders(folder: Url) -> list[str]:
    """The names of the folders right in the folder, sorted.  Raises UserError."""
    found = [each["Prefix"] for page in _pages(folder) for each in page.get("CommonPrefixes", [])]
    return sorted(prefix.removeprefix(folder.prefix).rstrip("/") for prefix in found)


def _pages(folder: Url) -> Iterator[dict[str, Any]]:
    if not folder.bucket:
        raise UserError(f"{folder}: names no bucket; give {folder.scheme}://BUCKET/FOLDER")
    with told(folder):
        pages = client(folder.scheme).get_paginator("list_objects_v2")
        where = dict(Bucket=folder.bucket, Prefix=folder.prefix, Delimiter="/")
        yield from pages.paginate(**where)


# ---- reading


def read(wanted: Object) -> bytes:
    """A small object's content.  Raises UserError."""
    return _piece(wanted, 0, wanted.size)[0] if wanted.size else b""


def download(wanted: Object, to: Path, sha256: str | None = None) -> None:
    """Writes the object's bytes to the file, which is on disk then.

    Raises UserError unless they are whole: as many as listed, of the listed ETag, and of the given
    SHA-256.  A wrong file may be left."""
    starts = range(0, wanted.size, PIECE)
    encrypted = False
    with contextlib.ExitStack() as stack:
        f = stack.enter_context(open(to, "r+b" if to.exists() else "w+b"))
        os.ftruncate(f.fileno(), wanted.size)
        pool = stack.enter_context(ThreadPoolExecutor(CONNECTIONS))

        def fetch(start: int) -> bool:
            content, keyed = _piece(wanted, start, min(PIECE, wanted.size - start))
            view = memoryview(content)
            while view:
                written = os.pwrite(f.fileno(), view, start)
                view, start = view[written:], start + written
            return keyed

        try:
            for keyed in pool.map(fetch, starts):
                encrypted |= keyed
                beat()
        except BaseException:
            # The pieces that are not begun are not worth waiting for.
            pool.shutdown(cancel_futures=True)
            raise
        os.fsync(f.fileno())
    _verify(wanted, to, sha256, encrypted)


def _verify(wanted: Object, file: Path, sha256: str | None, encrypted: bool) -> None:
    md5 = wanted.etag if _MD5.fullmatch(wanted.etag) and not encrypted else None
    for name, digest in (("sha256", sha256), ("md5", md5)):
        if digest is None:
            continue
        # An ETag is not there for security, where MD5 may be forbidden.
        found = hashlib.new(name, usedforsecurity=name != "md5")
        with file.open("rb") as f:
            while block := f.read(1 << 20):
                found.update(block)
        if found.hexdigest() != digest:
            raise UserError(
                f"{wanted.url}: its bytes are not those that were stored ({name} "
                f"{found.hexdigest()[:12]}... instead of {digest[:12]}...); upload it again",
                anywhere=True,
            )
        return


def _piece(wanted: Object, start: int, size: int) -> tuple[bytes, bool]:
    """`size` bytes from `start` on, and whether the object is encrypted by a key service."""
    from botocore import exceptions

    url, end = wanted.url, start + size - 1
    # Else a replaced object would be read half old, half new.
    where = dict(Bucket=url.bucket, Key=_key(url), IfMatch=f'"{wanted.etag}"')
    broken = (
        exceptions.IncompleteReadError,
        exceptions.ReadTimeoutError,
        exceptions.ResponseStreamingError,
        exceptions.ConnectionClosedError,
    )
    got = 0
    for attempt in range(TRIES):
        # boto3 itself repeats what fails before the answer's first byte.
        with told(url):
            answer = client(url.scheme).get_object(**where, Range=f"bytes={start}-{end}")
            with contextlib.suppress(*broken):
                content = answer["Body"].read()
                got = len(content)
                if got == size:
                    return content, answer.get("ServerSideEncryption", "AES256") != "AES256"
        time.sleep(0.1 * 2**attempt)
    raise UserError(
        f"{url}: the server stopped before the end of bytes {start} to {end} ({got} came, {TRIES} "
        "times tried); look at the network and the server, then give the same command again",
        anywhere=True,
    )


# ---- writing


def upload(file: Path, to: Url) -> None:
    """Raises UserError."""
    from boto3.exceptions import S3UploadFailedError

    with told(to):
        try:
            client(to.scheme).upload_file(str(file), to.bucket, _key(to))
        except S3UploadFailedError as e:
            # It hides the error that tells more.
            raise e.__context__ or e from None


def write(to: Url, content: bytes) -> None:
    """Writes a small object: completely or not at all.  Raises UserError."""
    with told(to):
        client(to.scheme).put_object(Bucket=to.bucket, Key=_key(to), Body=content)


def remove(url: Url) -> None:
    """Nothing happens where there is no such object.  Raises UserError."""
    with told(url):
        client(url.scheme).delete_object(Bucket=url.bucket, Key=_key(url))


# ---- the server


@functools.cache
def client(scheme: str) -> Any:
    """boto3's client, which threads share.  Raises UserError where boto3 is not installed."""
    try:
        import boto3
        from botocore.config import Config
    except ImportError:
        raise UserError(
            f"{scheme}://: needs boto3, which is not installed; pip install 'fastdisco[s3]'"
        ) from None
    retries: dict[str, Any] = {"mode": "standard"}
    if "AWS_MAX_ATTEMPTS" not in os.environ:
        # A throttled training waits longer than boto3's 3 attempts.
        retries["total_max_attempts"] = 8
    # Other servers know no checksums of Amazon's newer kind.
    needed = "when_required"
    settings = Config(
        retries=cast(Any, retries),
        max_pool_connections=4 * CONNECTIONS,
        request_checksum_calculation=needed,
        response_checksum_validation=needed,
    )
    elsewhere = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    endpoint = GOOGLE if scheme == "gs" and not elsewhere else None
    session = boto3.session.Session()
    # A server that is not Amazon's has no regions, but signatures name one.
    region = session.region_name or "us-east-1"
    with told(f"{scheme}://"):
        return session.client("s3", endpoint_url=endpoint, region_name=region, config=settings)


@contextlib.contextmanager
def told(what: Url | str) -> Iterator[None]:
    """Makes UserErrors of boto3's errors about the address."""
    try:
        from botocore import exceptions
    except ImportError:
        client("s3")
        raise
    try:
        yield
    except exceptions.ClientError as e:
        raise _meaning(what, e) from None
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError):
        raise UserError(
            f"{what}: there are no credentials for it; {_KEYS}", anywhere=True
        ) from None
    except (exceptions.ConnectionError, exceptions.HTTPClientError) as e:
        endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
        about = f" (AWS_ENDPOINT_URL is {endpoint})" * bool(endpoint)
        raise UserError(
            f"{what}: the server cannot be reached{about}: {_first(e)}; look at network and address",
            anywhere=True,
        ) from None
    # ValueError: an endpoint that is no address.
    except (exceptions.BotoCoreError, ValueError) as e:
        raise UserError(
            f"{what}: cannot be used: {_first(e)}; look at the settings of boto3", anywhere=True
        ) from None


def _meaning(what: Url | str, error: Any) -> UserError:
    answer = error.response
    code = str(answer.get("Error", {}).get("Code", ""))
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code in ("SlowDown", "503", "ServiceUnavailable", "RequestLimitExceeded", "429"):
        found = "the server asks for fewer requests, also after waiting (503)"
        remedy = "wait, raise AWS_MAX_ATTEMPTS, or use fewer nodes"
    elif code in _MEANINGS:
        found, remedy = _MEANINGS[code]
    else:
        found = f"the server refuses it ({code or status}: {_first(error)})"
        remedy = "look at the address and at the server's rules"
    return UserError(f"{what}: {found}; {remedy}", anywhere=True)


def _first(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _key(url: Url) -> str:
    return url.prefix.removesuffix("/")
