"""What a server, a network, a kill and other processes can do to a fetch: the cache holds whole
objects or none, and each is fetched once."""

import hashlib
import multiprocessing
import os
import signal
import time

import object_storage
import pytest
from image_sets import refuse

from fastdisco.common.errors import UserError
from fastdisco.common.urls import Url
from fastdisco.data import cache as caches
from fastdisco.data import objects
from fastdisco.data.cache import Cache, Wanted

BYTES = os.urandom(300_000)
URL = Url("s3://things/x.tar")


@pytest.fixture(scope="module")
def server():
    with object_storage.served() as proxy:
        yield proxy


@pytest.fixture
def proxy(server, monkeypatch, tmp_path):
    object_storage.prepared(monkeypatch, server, tmp_path / "cache")
    monkeypatch.setattr(objects, "PIECE", 100_000)
    objects.client("s3").create_bucket(Bucket="things")
    objects.write(URL, BYTES)
    server.asked.clear()
    yield server
    server.fail(None)


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache/objects", 10**9)


def wanted(sha256=None):
    about = objects.listed(URL.parent)[URL.name]
    fetch = lambda to: objects.download(about, to, sha256)
    return Wanted(about.etag, str(about.url), about.size, fetch)


def made(name, size, calls=None):
    """An object that is made, not fetched."""

    def fetch(to):
        if calls is not None:
            calls.append(name)
        to.write_bytes(name.encode() * size)

    return Wanted(name, name, size, fetch)


def there(cache):
    return sorted(p.stem for p in cache.folder.glob("*.tar"))


# ---- the server and the network


@pytest.mark.parametrize("fault", ["cut", "short", "throttled"])
def test_a_fault_that_passes_is_not_noticed(proxy, cache, fault):
    want = wanted(hashlib.sha256(BYTES).hexdigest())
    proxy.fail(fault, times=1)
    with cache.hold([want]):
        assert cache.path(want).read_bytes() == BYTES


@pytest.mark.parametrize(
    "fault, says",
    [
        ("cut", "stopped before the end of bytes"),
        ("short", "stopped before the end of bytes"),
        ("throttled", "asks for fewer requests"),
        ("flipped", "not those that were stored"),
    ],
)
def test_a_fault_that_stays_is_told_and_leaves_nothing(proxy, cache, fault, says):
    want = wanted()
    proxy.fail(fault)
    refuse(cache.hold, [want], parts=["s3://things/x.tar", says])
    assert not there(cache) and not list(cache.folder.glob("*.part"))
    proxy.fail(None)
    cache.hold([want]).release()
    assert cache.path(want).read_bytes() == BYTES


def test_slow_reads_are_waited_for(proxy, cache):
    want = wanted()
    proxy.fail("slow")
    cache.hold([want]).release()
    assert cache.path(want).read_bytes() == BYTES


def test_an_object_that_is_replaced_is_not_mixed(proxy, cache):
    want = wanted()
    objects.write(URL, BYTES[::-1])
    refuse(cache.hold, [want], parts=["was replaced while it was read"])
    assert not there(cache)


def test_another_content_than_was_packed_is_told(proxy, cache):
    refuse(cache.hold, [wanted("0" * 64)], parts=["not those that were stored (sha256"])
    assert not there(cache)


def test_a_disk_without_room_is_told(proxy, cache):
    def full(to):
        raise OSError(28, "No space left on device")

    refuse(cache.hold, [Wanted("a", "s3://things/a", 5, full)], parts=["No space left", "cache_gb"])
    assert not there(cache)


# ---- the bound


def test_the_least_recently_used_go_first(tmp_path):
    cache = Cache(tmp_path / "c", 100)
    for n, name in enumerate("abc"):
        cache.hold([made(name, 30)]).release()
        os.utime(cache.folder / f"{name}.lock", (n, n))
    # `a` is used again, so `b` is the oldest.
    cache.hold([made("a", 30)]).release()
    cache.hold([made("d", 30)]).release()
    assert there(cache) == ["a", "c", "d"]
    assert sum(p.stat().st_size for p in cache.folder.glob("*.tar")) <= 100


def test_what_is_in_use_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(caches, "PATIENCE", 0.3)
    cache = Cache(tmp_path / "c", 100)
    with cache.hold([made("a", 60)]):
        os.utime(cache.folder / "a.lock", (0, 0))
        cache.hold([made("b", 30)]).release()
        cache.hold([made("c", 30)]).release()
        assert there(cache) == ["a", "c"]
        refuse(cache.hold, [made("d", 50)], parts=["data.cache_gb", "in use", "d needs"])
        assert not cache.fetch_ahead(made("d", 50))
    cache.hold([made("d", 50)]).release()
    assert there(cache) == ["c", "d"]
    refuse(cache.hold, [made("e", 101)], parts=["data.cache_gb", "less than what is read at once"])


def test_what_is_being_fetched_counts(tmp_path):
    cache = Cache(tmp_path / "c", 100)

    def fetch(to):
        # While this one of 60 comes, no other of 60 has room.
        assert not cache.fetch_ahead(made("b", 60))
        to.write_bytes(bytes(60))

    cache.hold([Wanted("a", "a", 60, fetch)]).release()
    assert there(cache) == ["a"]


# ---- several processes, and kills


def child(folder, pause):
    """A process that fetches an object of 10 bytes, half of it before a pause."""
    # Forked: a new Python would import torch first.
    process = multiprocessing.get_context("fork").Process(target=use, args=(folder, pause))
    process.start()
    return process


def use(folder, pause):
    def fetch(to):
        with open(folder / "calls", "a") as f:
            f.write("x")
        with open(to, "r+b") as f:
            f.write(b"half!")
            f.flush()
            (folder / "begun").touch()
            time.sleep(pause)
            f.write(b"whole")

    cache, want = Cache(folder / "c", 100), Wanted("a", "a", 10, fetch)
    with cache.hold([want]):
        assert cache.path(want).read_bytes() == b"half!whole"


def ended(process):
    process.join()
    return process.exitcode


def test_processes_fetch_an_object_once(tmp_path):
    some = [child(tmp_path, 0.5) for _ in range(3)]
    assert [ended(p) for p in some] == [0, 0, 0]
    assert (tmp_path / "calls").read_text() == "x"


def test_a_killed_fetch_leaves_no_file_and_no_lock(tmp_path):
    p = child(tmp_path, 1000)
    while not (tmp_path / "begun").exists():
        assert p.is_alive()
        time.sleep(0.01)
    p.kill()
    assert ended(p) == -signal.SIGKILL
    cache = Cache(tmp_path / "c", 100)
    assert not there(cache) and list(cache.folder.glob("*.part"))
    # Its part no longer takes room, and the object is fetched anew.
    cache.hold([made("b", 100)]).release()
    assert there(cache) == ["b"] and not list(cache.folder.glob("*.part"))
    assert ended(child(tmp_path, 0)) == 0
    assert there(cache) == ["a"]


def test_a_thread_fetches_ahead(proxy, tmp_path):
    from fastdisco.data.remote import _Ahead

    cache, calls = Cache(tmp_path / "c", 1000), []
    _Ahead(cache).give([made(name, 10, calls) for name in "abc"])
    end = time.monotonic() + 60
    while len(there(cache)) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    assert calls == ["a", "b", "c"] and there(cache) == ["a", "b", "c"]
    cache.hold([made(name, 10, calls) for name in "abc"]).release()
    assert calls == ["a", "b", "c"]


def test_the_error_of_a_thread_ahead_is_told_by_the_one_who_needs_it(proxy, cache):
    from fastdisco.data.remote import _Ahead

    want = wanted()
    proxy.fail("denied")
    _Ahead(cache).give([want])
    with pytest.raises(UserError, match="access is denied"):
        cache.hold([want])
