"""Data sets of tars in object storage: the same images and views as on disk, and what is refused."""

import shutil
import time
from pathlib import Path

import numpy as np
import object_storage
import pytest
from image_sets import make, refuse, stream
from PIL import Image

from fastdisco import data
from fastdisco.common.errors import UserError
from fastdisco.config import Data
from fastdisco.data import check, objects, pack
from fastdisco.data.source import listing

URL = "s3://pictures/set"


@pytest.fixture(scope="module")
def server():
    with object_storage.served() as proxy:
        yield proxy


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(48):
        folder = root / f"class{i % 3}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(folder / f"{i}.jpg")
    return root


@pytest.fixture(scope="module")
def tars(images, tmp_path_factory):
    """Four tars or so on disk."""
    folder = tmp_path_factory.mktemp("tars") / "set"
    pack.pack(images, folder, shard_mb=0.06)
    return folder


@pytest.fixture
def proxy(server, monkeypatch, tmp_path, tars):
    """A server whose bucket `pictures` holds the tars in set/, with what packing wrote."""
    object_storage.prepared(monkeypatch, server, tmp_path / "cache")
    object_storage.empty("pictures")
    put(tars, URL)
    server.asked.clear()
    yield server
    server.fail(None)


def put(folder, url):
    for path in folder.iterdir():
        objects.upload(path, objects.Url(url) / path.name)


def again(proxy):
    """Forgets what boto3 has cached, such as credentials."""
    objects.client.cache_clear()


# ---- the same data


def test_tars_there_are_the_tars_here(proxy, tars):
    here, there = listing(tars), listing(URL)
    assert there.fingerprint == here.fingerprint and there.classes == here.classes
    assert str(there.source) == URL
    # No tar is read for the listing of a packed set.
    assert proxy.reads() == 0
    assert all(there.read(i) == here.read(i) for i in range(len(here.files)))


def test_views_are_those_of_the_folder_and_the_second_time_nothing_is_asked_for(proxy, tars):
    assert len(list(tars.glob("*.tar"))) >= 3
    here, order = stream(make(listing(tars), epochs=2))
    there = make(listing(URL), epochs=2)
    got, order_there = stream(there)
    assert order_there == order and got == here
    reads = proxy.reads()
    assert 0 < reads <= len(list(tars.glob("*.tar")))
    proxy.asked.clear()
    again, _ = stream(there.__class__(there.listing, there.crops, 8, 0, 2, 1, 1, there.device))
    assert again == here and not proxy.asked


def test_tars_are_fetched_ahead(proxy, tars):
    loader = make(listing(URL), epochs=1)
    next(loader)
    end, cache = time.monotonic() + 60, loader.listing.remote.cache.folder
    while len(list(cache.glob("*.tar"))) < len(list(tars.glob("*.tar"))):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_cache_may_have_a_relative_path(proxy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = listing(URL, images=Data(train=URL, cache="here"))
    monkeypatch.chdir("/")
    assert found.read(0) and list(tmp_path.glob("here/objects/*.tar"))


def test_a_cache_that_is_smaller_than_the_data_gives_the_same_views(proxy, tars, tmp_path):
    sizes = sorted(p.stat().st_size for p in tars.glob("*.tar"))
    # The two tars of a pipeline and one that is fetched ahead.
    limit = sum(sizes[-3:])
    assert limit < sum(sizes)
    small = Data(train=URL, cache=tmp_path / "small", cache_gb=limit / 1e9)
    there, _ = stream(make(listing(URL, images=small), epochs=3))
    assert there == stream(make(listing(tars), epochs=3))[0]
    kept = sum(p.stat().st_size for p in (tmp_path / "small/objects").glob("*.tar"))
    assert 0 < kept <= limit
    tiny = Data(train=URL, cache=tmp_path / "tiny", cache_gb=sizes[0] / 1e9)
    with pytest.raises(UserError, match=r"data.cache_gb: .* less than what is read at once"):
        stream(make(listing(URL, images=tiny), epochs=1))


def test_patterns_name_tars(proxy, tars):
    for pattern in ("{000000..000001}.tar", "00000[01].tar"):
        with pytest.raises(UserError, match="are missing or twice"):
            listing(f"{URL}/{pattern}")
    assert list(listing(f"{URL}/*.tar").files) == list(listing(tars).files)
    refuse(listing, f"{URL}/x-{{0..9}}.tar", parts=[f"{URL}/x-0.tar: no such tar"])


def test_googles_addresses_are_read_by_the_same_interface(proxy, tars):
    assert listing("gs://pictures/set").fingerprint == listing(tars).fingerprint


def test_the_server_is_googles_where_no_other_is_named(proxy, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    again(proxy)
    assert objects.client("gs").meta.endpoint_url == "https://storage.googleapis.com"
    assert "amazonaws.com" in objects.client("s3").meta.endpoint_url
    objects.client.cache_clear()


def test_evaluation_and_check_read_it(proxy, tars, tmp_path):
    here, there = (
        [b.views[0] for b in data.EvalLoader(listing(x), 24, 24, 8, 1, "cpu")] for x in (tars, URL)
    )
    assert all((a == b).all() for a, b in zip(here, there, strict=True))
    refuse(check.check, [Path(URL)], parts=[URL, "--out FOLDER"])
    assert check.check([Path(URL)], out=tmp_path / "report") == []


def test_foreign_tars_are_indexed_once(proxy, tars, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for tar in tars.glob("*.tar"):
        shutil.copy(tar, foreign / tar.name)
    put(foreign, "s3://pictures/foreign")
    proxy.asked.clear()
    found = listing("s3://pictures/foreign")
    assert found.fingerprint == listing(foreign).fingerprint
    reads = proxy.reads()
    assert reads == len(found.places.tars)
    assert listing("s3://pictures/foreign").files == found.files and proxy.reads() == reads


def test_a_quarantine_beside_the_tars_counts(proxy, tars):
    name = listing(tars).files[3]
    objects.write(objects.Url(URL) / "quarantine.txt", f"{name}\tbroken\n".encode())
    assert listing(URL, "quarantine.txt").left_out.tolist() == [3]


def test_an_absolute_quarantine_names_addresses(proxy, tars, tmp_path):
    name = listing(tars).files[5]
    (tmp_path / "q.txt").write_text(f"{URL}/{name}\tbroken\n")
    assert listing(URL, tmp_path / "q.txt").left_out.tolist() == [5]


# ---- packing to it


def test_packing_writes_the_same_objects_as_files(proxy, images, tars):
    url = objects.Url("s3://pictures/packed")
    manifest = pack.pack(images, url, shard_mb=0.06)[url]
    found = objects.listed(url)
    assert sorted(found) == sorted(p.name for p in tars.iterdir())
    assert all(objects.read(found[p.name]) == p.read_bytes() for p in tars.iterdir())
    proxy.asked.clear()
    # Once more: nothing is written.
    assert pack.pack(images, url, shard_mb=0.06)[url]["tars"] == manifest["tars"]
    assert not [key for key in proxy.asked if key[0] == "PUT"]
    refuse(pack.pack, images, url, seed=1, shard_mb=0.06, parts=[str(url), "another seed"])


def test_a_pack_that_ended_midway_goes_on(proxy, images, tars):
    url = objects.Url("s3://pictures/packed")
    proxy.fail("denied", only="packed/000001.tar")
    refuse(pack.pack, images, url, shard_mb=0.06, parts=["packed/000001.tar", "access is denied"])
    proxy.fail(None)
    refuse(listing, url, parts=[str(url), "packing it was not finished"])
    proxy.asked.clear()
    pack.pack(images, url, shard_mb=0.06)
    assert not [path for _, path in proxy.asked if path.endswith("packed/000000.tar")]
    assert listing(url).fingerprint == listing(tars).fingerprint


def test_nothing_is_packed_beside_other_objects(proxy, images):
    objects.write(objects.Url("s3://pictures/other/x.txt"), b"x")
    refuse(pack.pack, images, "s3://pictures/other", parts=["s3://pictures/other", "not empty"])


# ---- what is refused


@pytest.mark.parametrize(
    "fault, says",
    [
        ("expired", "the credentials have expired"),
        ("wrong_key", "the access key is not known"),
        ("wrong_secret", "the secret key is wrong"),
        ("denied", "access is denied"),
        ("throttled", "asks for fewer requests"),
    ],
)
def test_a_refusal_is_one_sentence(proxy, fault, says):
    proxy.fail(fault)
    refuse(listing, URL, parts=[URL, says])


def test_credentials_that_expire_while_tars_are_read(proxy):
    found = listing(URL)
    proxy.fail("expired", only=".tar")
    refuse(found.read, 0, parts=[".tar: the credentials have expired", "goes on"])
    proxy.fail(None)
    assert found.read(0)


def test_no_credentials(proxy, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    again(proxy)
    refuse(listing, URL, parts=[URL, "no credentials", "AWS_ACCESS_KEY_ID"])


def test_what_is_not_there(proxy):
    refuse(listing, "s3://nobucket/set", parts=["s3://nobucket/set", "no such bucket"])
    refuse(listing, "s3://pictures/nothing", parts=["s3://pictures/nothing", "there is nothing"])
    refuse(listing, "s3://pictures/set/9.tar", parts=["s3://pictures/set/9.tar", "no such tar"])
    refuse(listing, "s3://pictures", parts=["s3://pictures: no tars are there", "data pack"])
    refuse(listing, "s3:///", parts=["names no bucket"])
    objects.remove(objects.Url(URL) / "000001.tar")
    refuse(listing, URL, parts=[URL, "000001.tar", "missing"])


def test_a_tar_that_vanishes_after_the_listing(proxy):
    found = listing(URL)
    objects.remove(objects.Url(URL) / "000000.tar")
    with pytest.raises(UserError, match=r"set/000000.tar: there is no such object"):
        stream(make(found, epochs=1))


def test_no_server(proxy, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    again(proxy)
    refuse(listing, URL, parts=[URL, "cannot be reached", "AWS_ENDPOINT_URL"])


def test_without_boto3(proxy, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "boto3", None)
    again(proxy)
    refuse(listing, URL, parts=["boto3", "fastdisco[s3]"])


def test_a_configuration_keeps_the_address():
    images = Data(train=URL, cache="/x", cache_gb=3)
    assert images.model_dump(mode="json")["train"] == URL and str(images.train) == URL
