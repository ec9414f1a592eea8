"""Pipes, sockets and devices where a file is expected, and files that are cut short while they are
read: told in one sentence, never waited for, never ended by a signal."""

import os
import shutil
import socket

import numpy as np
import pytest
from image_sets import one_sentence

from fastdisco import data, models
from fastdisco.config import UserError
from fastdisco.data import check
from fastdisco.teacher import cache_files


@pytest.fixture
def images(folder, tmp_path):
    shutil.copytree(folder / "train", tmp_path / "train")
    return tmp_path / "train"


def pipe(path):
    os.mkfifo(path)


def unix_socket(path):
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(path))


def device(path):
    path.symlink_to("/dev/zero")


def linked(path):
    os.mkfifo(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


@pytest.mark.parametrize("kind", [pipe, unix_socket, device, linked])
def test_a_special_file_is_no_image(images, kind):
    kind(images / "class1/zz.jpg")
    with pytest.raises(UserError) as e:
        data.listing(images)
    one_sentence(e, "class1/zz.jpg", "pipe")


def test_a_link_to_nothing_stays_for_the_check_to_tell(images):
    (images / "class1/zz.jpg").symlink_to("nowhere")
    assert len(data.listing(images).files) == 44


def test_a_pipe_in_a_list_or_instead_of_an_image_later_is_bad_but_not_waited_for(images):
    listing = data.listing(images)
    (images / listing.files[5]).unlink()
    os.mkfifo(images / listing.files[5])
    with pytest.raises(OSError, match="pipe"):
        listing.read(5)
    (images / "list.txt").write_text("".join(f"{name} 0\n" for name in listing.files[:9]))
    bad = check.check([images / "list.txt"], fast=True)
    assert [(f.name, f.kind) for f in bad] == [(listing.files[5], "unreadable")]


@pytest.mark.parametrize("name", ["quarantine.txt", "manifest.json"])
def test_other_files_of_a_data_set(images, name):
    os.mkfifo(images / name)
    if name == "manifest.json":
        # Whose it is cannot be known, so the class folders are read.
        assert len(data.listing(images).files) == 43
        return
    with pytest.raises(UserError) as e:
        data.listing(images, name)
    one_sentence(e, name, "pipe")


def test_teachers_and_caches(tmp_path):
    os.mkfifo(tmp_path / "t.pth")
    with pytest.raises(UserError) as e:
        models.read(tmp_path / "t.pth")
    one_sentence(e, "t.pth", "pipe")
    for text in ("[" * 5000, "3", "[1]", '"x"', ""):
        (tmp_path / "cache.json").write_text(text)
        with pytest.raises(UserError) as e:
            cache_files.header(tmp_path)
        one_sentence(e, "cache.json")
    (tmp_path / "cache.json").unlink()
    os.mkfifo(tmp_path / "cache.json")
    with pytest.raises(UserError) as e:
        cache_files.header(tmp_path)
    one_sentence(e, "cache.json", "pipe")


@pytest.mark.parametrize("name", ["z.f16", "sums.u32"])
def test_a_cache_that_is_cut_short_while_it_is_replayed(tmp_path, name):
    files = cache_files.Files(tmp_path, slots=1024, row=(2, 8))
    files.allocate(2, {"version": 1})
    files.open(write=True)
    rows = np.random.default_rng(0).normal(size=(5, 2, 8)).astype(np.float16)
    where = np.array([3, 900, 7, 1023, 0])
    files.write(1, where, rows)
    files.flush()
    files.open()
    assert np.array_equal(files.rows(1, where), rows)
    assert np.flatnonzero(files.good(1, 256)).tolist() == sorted(where)
    assert not files.good(0, 256).any() and np.flatnonzero(files.sums(1)).tolist() == sorted(where)
    os.truncate(tmp_path / name, 5000)
    with pytest.raises(UserError) as e:
        files.sums(1), files.rows(1, where)
    one_sentence(e, name, "cut short")
    # The disk shows the rest as it is.
    assert np.array_equal(files.rows(0, np.array([0])), np.zeros((1, 2, 8), np.float16))
