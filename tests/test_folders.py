"""Folders and lists as they lie on real disks: the root of a data set, folders of systems, other
extensions, names of any bytes, lists from elsewhere, and a quarantine that outlives its files."""

import os
import shlex
import shutil
import subprocess

import numpy as np
import pytest
from conftest import ROOT
from image_sets import CPU, make, one_sentence
from PIL import Image

from fastdisco import cli, data
from fastdisco.config import UserError
from fastdisco.data import check, source


def picture(path, seed=0):
    """A small JPEG there, whatever its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    with path.open("wb") as f:
        Image.fromarray(pixels).save(f, "JPEG")


def pictures(root, *names):
    for i, name in enumerate(names):
        picture(root / name, i)


def refused(path, *parts, **kw):
    with pytest.raises(UserError) as e:
        data.listing(path, **kw)
    one_sentence(e, str(path), *parts)


# ---- the wrong folder


@pytest.mark.parametrize(
    "names",
    [
        ("train/a/1.jpg", "val/a/2.jpg"),
        ("train/a/1.jpg", "Validation/2.jpg"),
        ("train/a/1.jpg", "val/2.jpg", "test/3.jpg", "meta/4.jpg"),
        ("train2017/1.jpg", "val2017/2.jpg"),
        ("train/a/1.jpg", "train/b/1.jpg"),
        ("train/1.tar", "val/1.tar"),
    ],
)
def test_the_root_of_a_data_set_is_not_its_training_images(tmp_path, names):
    pictures(tmp_path, *names)
    first = names[0].split("/")[0]
    refused(tmp_path, f"give {tmp_path}/{first}", "data set")


def test_a_folder_within_the_folder_is_named(tmp_path):
    pictures(tmp_path, "ILSVRC2012/n1/1.jpg", "ILSVRC2012/n2/2.jpg")
    refused(tmp_path, f"give {tmp_path}/ILSVRC2012", "ILSVRC2012")
    # Nested deeper within a class is fine: Tiny ImageNet has n1/images/.
    assert data.listing(tmp_path / "ILSVRC2012").classes == ["n1", "n2"]


def test_train_may_be_the_vehicle(tmp_path):
    names = ["bus/1.jpg", "train/1.jpg", "train/2.jpg"]
    pictures(tmp_path, *names)
    assert data.listing(tmp_path).files == names


def test_folders_of_systems_are_no_classes_and_hold_no_images(tmp_path):
    good = ["a/1.jpg", "b/2.jpg"]
    system = ["@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information"]
    system += ["#recycle", "@Recycle", "__pycache__"]
    pictures(tmp_path, *good, *(f"{name}/x.jpg" for name in system))
    pictures(tmp_path, "a/@eaDir/1.jpg/SYNOPHOTO_THUMB_XL.jpg", "b/__MACOSX/x.jpg")
    listing = data.listing(tmp_path)
    assert listing.files == good and listing.classes == ["a", "b"]
    passed = dict(listing.passed_over)
    assert passed["@eaDir/"] == 2 and passed["lost+found/"] == 1


def test_folders_of_systems_beside_tars_do_not_matter(tmp_path):
    pictures(tmp_path / "d", "a/1.jpg", "b/2.jpg")
    assert cli.main(["data", "pack", str(tmp_path / "d"), str(tmp_path / "tars")]) == 0
    pictures(tmp_path / "tars", "@eaDir/000000.tar/SYNOFILE_THUMB_M.jpg")
    assert len(data.listing(tmp_path / "tars").files) == 2
    pictures(tmp_path / "tars", "c/1.jpg")
    refused(tmp_path / "tars", "holds tars and also folders")


# ---- files passed over


def test_jpegs_and_jpeg_2000s_of_other_extensions_are_taken(tmp_path):
    pictures(tmp_path, "a/1.jfif", "a/2.JPE", "a/3.jif")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    for extension in ("j2k", "j2c", "jpc", "jpf", "jpx", "jp2"):
        raw = extension in ("j2k", "j2c", "jpc")
        with (tmp_path / f"a/4.{extension}").open("wb") as f:
            Image.fromarray(pixels).save(f, "JPEG2000", no_jp2=raw)
    listing = data.listing(tmp_path)
    assert len(listing.files) == 9 and listing.passed_over == ()
    assert sum(len(b.index) for b in data.EvalLoader(listing, 8, 8, 3, 1, CPU)) == 9
    assert check.check([tmp_path]) == [] and check.check([tmp_path], fast=True) == []


def test_what_is_passed_over_is_counted_by_extension(tmp_path, capsys):
    pictures(tmp_path, "a/1.jpg", "b/1.jpg", "a/2.avif", "b/d/3.AVIF", "b/4.gif", "b/README")
    pictures(tmp_path, "loose.jpg", "notes.txt", "a/.hidden.jpg")
    listing = data.listing(tmp_path)
    assert dict(listing.passed_over) == {
        ".avif": 2,
        ".gif": 1,
        "without extension": 1,
        "images beside the class folders": 1,
    }
    for command in (["data", "check", str(tmp_path)], ["data", "pack", str(tmp_path)]):
        target = [str(tmp_path.with_name("packed"))] if command[1] == "pack" else ["--fast"]
        assert cli.main([*command, *target]) == 0
        assert "2 .avif" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "c").mkdir()
    picture(tmp_path / "c/1.heic")
    refused(tmp_path, "no image in the class folder c but 1 .heic;")


# ---- names


def test_names_that_are_not_utf8_are_read(tmp_path, capsys):
    """Latin-1 names, as old archives unpack to."""
    folder = os.fsencode(tmp_path) + b"/caf\xe9 a"
    os.mkdir(folder)
    for i, name in enumerate((b"1.jpg", b"gr\xfc\xdfe 2.jpg", b"zwei  x .jpg", b"\xf0.jpg")):
        picture(tmp_path / os.fsdecode(folder) / os.fsdecode(name), i)
    listing = data.listing(tmp_path)
    assert sorted(next(make(listing, batch=4)).index.tolist()) == [0, 1, 2, 3]
    loader = data.EvalLoader(listing, 8, 8, 3, 1, CPU, indices=[3, 0, 1, 2])
    rows = np.concatenate([b.views[0].numpy() for b in loader])
    other = tmp_path / "other"
    for i in range(4):
        copy = other / "a" / f"{i}.jpg"
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(listing.read(i))
    plain = data.EvalLoader(data.listing(other), 8, 8, 3, 1, CPU, indices=[3, 0, 1, 2])
    assert (rows == np.concatenate([b.views[0].numpy() for b in plain])).all()


def test_a_bad_image_of_such_a_name_is_named_so_that_a_shell_finds_it(tmp_path, capfd):
    name = os.fsdecode(b"a/caf\xe9's.jpg")
    pictures(tmp_path, "a/1.jpg", name)
    (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(UserError) as e:
        next(make(data.listing(tmp_path), batch=2))
    command = str(e.value).split("`")[1]
    shown = command.replace("fastdisco", "printf '%s\\n'", 1)
    words = subprocess.run(["bash", "-c", shown], capture_output=True).stdout.split(b"\n")
    assert words[-2] == os.fsencode(name)


def test_a_root_that_is_not_utf8_is_refused(tmp_path):
    root = tmp_path / os.fsdecode(b"caf\xe9")
    pictures(root, "a/1.jpg")
    with pytest.raises(UserError) as e:
        data.listing(root)
    one_sentence(e, "not UTF-8", "rename")


@pytest.mark.parametrize("name", ["#a/1.jpg", "\\a/1.jpg", "-a/1.jpg", "\\#a/1.jpg"])
def test_names_that_look_like_something_else_can_be_left_out(tmp_path, name):
    """A comment, an escape, an option."""
    pictures(tmp_path, name, "b/1.jpg")
    (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(UserError) as e:
        next(make(data.listing(tmp_path, "quarantine.txt"), batch=2))
    assert cli.main(shlex.split(str(e.value).split("`")[1])[1:]) == 2
    listing = data.listing(tmp_path, "quarantine.txt")
    assert [listing.files[i] for i in listing.left_out] == [name]
    assert list(source.read_quarantine(tmp_path / "quarantine.txt")) == [name]
    # A later check keeps the line.
    check.check([tmp_path], only=["b/1.jpg"])
    assert list(source.read_quarantine(tmp_path / "quarantine.txt")) == [name]


# ---- lists


def test_a_list_names_what_looks_like_a_comment_by_a_backslash(tmp_path):
    pictures(tmp_path, "#a/1.jpg", "\\b/1.jpg", "c/1.jpg")
    path = tmp_path / "list.txt"
    path.write_text("# a comment\n#c/1.jpg gone\n\\#a/1.jpg 0\n\\\\b/1.jpg 1\nc/1.jpg 1\n")
    assert data.listing(path).files == ["#a/1.jpg", "\\b/1.jpg", "c/1.jpg"]
    # Taken for a comment, it would be lost in silence.
    path.write_text("c/1.jpg 1\n#a/1.jpg 0\n")
    refused(path, "line 2", "`\\#a/1.jpg 0`")


def test_a_list_may_have_a_byte_order_mark_and_names_of_any_bytes(tmp_path):
    names = ["a/1.jpg", os.fsdecode(b"a/\xfc.jpg")]
    pictures(tmp_path, *names)
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbfa/1.jpg one\r\na/\xfc.jpg two\r\n")
    listing = data.listing(path)
    assert listing.files == names and listing.classes == ["one", "two"]
    path.write_text("a/1.jpg one\n", encoding="utf-16")
    refused(path, "UTF-16", "UTF-8")


@pytest.mark.parametrize(
    "line", ["n01440764_10026.JPEG", "my photo.jpg", "3 a/1.jpg", "a/1.jpg,3", "a/1.jpg\t"]
)
def test_a_list_without_classes_says_how(tmp_path, line):
    path = tmp_path / "list.txt"
    path.write_text(f"# names\n{line}\n")
    refused(path, "line 2", "<image> <class>", "SimCLR", "sed -E")


def test_the_command_for_simclrs_lists_works(tmp_path):
    pictures(tmp_path, "n01/n01_1.JPEG", "n02/n02_2.JPEG")
    path = tmp_path / "1percent.txt"
    path.write_text("n01_1.JPEG\nn02_2.JPEG\n")
    with pytest.raises(UserError) as e:
        data.listing(path)
    command = str(e.value).split("`")[-2].replace("NEW.txt", f"{tmp_path}/new.txt")
    subprocess.run(["bash", "-c", command], check=True)
    listing = data.listing(tmp_path / "new.txt")
    assert listing.files == ["n01/n01_1.JPEG", "n02/n02_2.JPEG"]
    assert listing.classes == ["n01", "n02"]


def test_flat_images_and_numbers_beside_class_folders_say_how(tmp_path):
    pictures(tmp_path, "train/n01/1.jpg", "train/n02/2.jpg", "val/1.jpg", "val/2.jpg")
    refused(tmp_path / "val", "2 images lie in it directly", "list", "docs/data.md")
    path = tmp_path / "val.txt"
    path.write_text("val/1.jpg 0\nval/2.jpg 1\n")
    train = data.listing(tmp_path / "train")
    with pytest.raises(UserError) as e:
        data.same_classes(train, data.listing(path))
    one_sentence(e, "numbers", "n01, n02")


# ---- the quarantine


def test_a_quarantine_outlives_its_files(tmp_path, capsys):
    pictures(tmp_path, "a/1.jpg", "a/2.jpg", "b/3.jpg")
    (tmp_path / "quarantine.txt").write_text("\ufeffa/1.jpg\tdamaged\na/2.jpg\tdamaged\n")
    (tmp_path / "a/1.jpg").unlink()
    for quarantine in ("quarantine.txt", tmp_path / "q.txt"):
        if quarantine == tmp_path / "q.txt":
            text = (tmp_path / "quarantine.txt").read_text().lstrip("\ufeff")
            quarantine.write_text(text.replace("a/", f"{tmp_path.resolve()}/a/"))
        listing = data.listing(tmp_path, quarantine)
        assert [listing.files[i] for i in listing.left_out] == ["a/2.jpg"]
        assert "a/1.jpg" in " ".join(capsys.readouterr().out.split())
    # Two lists in one folder share its quarantine.
    for name, line in (("train.txt", "a/2.jpg 0"), ("val.txt", "b/3.jpg 0")):
        (tmp_path / name).write_text(f"{line}\nb/3.jpg 1\n" if name == "train.txt" else f"{line}\n")
    assert data.listing(tmp_path / "train.txt", "quarantine.txt").left_out.tolist() == [0]
    assert data.listing(tmp_path / "val.txt", "quarantine.txt").left_out.tolist() == []
    # A whole check of one keeps the other's lines and drops those of files that are gone.
    check.check([tmp_path / "val.txt"])
    assert list(source.read_quarantine(tmp_path / "quarantine.txt")) == ["a/2.jpg"]


# ---- what is no pack


def test_a_manifest_of_another_tool_makes_no_pack(tmp_path):
    pictures(tmp_path, "a/1.jpg", "b/1.jpg")
    for text in ('{"name": "app"}', "[]", "no JSON"):
        (tmp_path / "manifest.json").write_text(text)
        assert data.listing(tmp_path).files == ["a/1.jpg", "b/1.jpg"]


# ---- train and val


def test_validation_images_that_are_training_images_are_refused(tmp_path):
    names = [f"{c}/{i}.jpg" for c in "ab" for i in range(3)]
    pictures(tmp_path / "train", *names)
    train = data.listing(tmp_path / "train")

    def refuse(other, count):
        with pytest.raises(UserError) as e:
            data.apart(train, other)
        one_sentence(e, "data.val", f"{count} of its", "kNN")

    refuse(train, 6)
    (tmp_path / "link").symlink_to(tmp_path / "train")
    refuse(data.listing(tmp_path / "link"), 6)
    (tmp_path / "val.txt").write_text("train/a/1.jpg a\ntrain/b/1.jpg b\n")
    refuse(data.listing(tmp_path / "val.txt"), 2)
    # The same names are not the same images: a copy is told by its bytes.
    shutil.copytree(tmp_path / "train", tmp_path / "copy")
    refuse(data.listing(tmp_path / "copy"), 6)
    for i, name in enumerate(names):
        picture(tmp_path / "val" / name, 100 + i)
    data.apart(train, data.listing(tmp_path / "val"))


def test_a_run_says_once_what_is_passed_over_and_that_the_queue_is_larger_than_an_epoch(
    folder, tmp_path, capsys
):
    from fastdisco import config
    from fastdisco.run.remarks import remarks

    root = tmp_path / "train"
    shutil.copytree(folder / "train", root)
    (root / "class0/x.avif").write_bytes(b"")

    def said(*overrides):
        path = str(ROOT / "tests/tiny.yaml")
        cfg = config.load(path, [f"data.train={root}", *overrides])
        return list(remarks(cfg, data.listing(root), None))

    passed, queue = said("method.queue=41")
    assert passed == f"{root}: passed over: 1 .avif"
    assert queue.startswith("method.queue: 41 is more than the 40 images of an epoch")
    unused = ("method.queue=41", "method.contrast=0", f"teacher.file={tmp_path}/teacher.pt")
    assert said("method.queue=40") == said(*unused) == [passed]
    arguments = ["--config", str(ROOT / "tests/tiny.yaml"), f"run.out={tmp_path}"]
    arguments += [f"data.train={root}", "method.queue=41"]
    assert cli.main(["train", "--dry-run", *arguments]) == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("remark ")]
    assert [x.split(maxsplit=1)[1] for x in lines] == [passed, queue]


def test_a_run_says_that_its_prototypes_never_learn(folder):
    from fastdisco import config
    from fastdisco.run.remarks import remarks

    def said(epochs, **method):
        blocks = {"run": {"name": "x", "epochs": epochs}, "method": {"prototypes": 24} | method}
        blocks |= {
            "data": {"train": f"{folder}/train", "batch": 8},
            "student": {"arch": "resnet18"},
            "optim": {"warmup_epochs": 0},
        }
        cfg = config.validate(blocks, "here")
        return list(remarks(cfg, data.listing(folder / "train"), None))

    # Five steps an epoch.
    (told,) = said(4, name="swav")
    assert "freeze_steps" in told and "for 5005 steps" in told and "ends after 20" in told
    assert len(said(4, name="swav", freeze_steps=20)) == 1
    assert said(4, name="swav", freeze_steps=19) == said(2, name="dino") == []
    (told,) = said(1, name="dino")
    assert "freeze_epochs" in told and "for 5 steps" in told


def test_every_command_that_scores_by_neighbours_looks(folder, tmp_path, capsys):
    config = ["--config", str(ROOT / "tests/tiny.yaml"), f"run.out={tmp_path}"]
    same = [f"data.train={folder}/train", f"data.val={folder}/train"]
    assert cli.main(["train", "--dry-run", *config, *same]) == 2
    assert "43 of its 43 images are also images of" in capsys.readouterr().err
