"""What an evaluation is asked for and cannot do is refused before it begins, and nothing that it is
told is passed over in silence."""

import os

import pytest
from test_eval_command import a_run, cifar_archive, evaluate

from fastdisco.commands.measure import Work
from fastdisco.common.errors import UserError
from fastdisco.evals import results


@pytest.fixture(scope="module")
def run(textures, tmp_path_factory):
    return a_run(textures, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def no_pass(monkeypatch):
    def refuse(*args, **more):
        raise AssertionError("images are read")

    monkeypatch.setattr(Work, "pass_over", refuse)


@pytest.mark.parametrize("below", ["", "/deeper/still"])
def test_a_file_in_place_of_the_folder_of_results(run, capsys, tmp_path, no_pass, below):
    (tmp_path / "file").touch()
    _, said = evaluate(capsys, "knn", run, f"--out={tmp_path}/file{below}", code=2)
    assert f"{tmp_path}/file: is no folder" in said and "give another --out" in said


def test_a_folder_of_results_that_cannot_be_written_to(run, capsys, tmp_path, no_pass, monkeypatch):
    # Root may write anywhere.
    before = os.access
    monkeypatch.setattr(os, "access", lambda p, how: str(p) != str(tmp_path) and before(p, how))
    _, said = evaluate(capsys, "knn", run, f"--out={tmp_path}/eval", code=2)
    assert f"{tmp_path}: cannot be written to" in said
    assert not list(tmp_path.iterdir())


def test_lists_are_not_drawn(run, textures, capsys, tmp_path, no_pass):
    (tmp_path / "1percent.txt").write_text("train000.png\n")
    lists = f"semi.lists={tmp_path}/1percent.txt"
    _, said = evaluate(capsys, "semi", run, f"--out={tmp_path}/out", lists, "--tries=3", code=2)
    assert "semi: lists are not drawn, so there is one try; leave tries or lists out" in said
    # The default, written out.
    with pytest.raises(AssertionError, match="images are read"):
        evaluate(capsys, "semi", run, f"--out={tmp_path}/out", lists, "semi.tries=1")


def test_fine_tuning_takes_its_own_presets_alone(run, capsys, tmp_path):
    tune = ["semi.finetune=true", "semi.epochs=1", "semi.batch=8", "semi.lr=0.01"]
    _, said = evaluate(capsys, "semi", run, f"--out={tmp_path}", *tune, "semi.preset=swav", code=2)
    assert "semi.preset: swav is no fine-tuning; give finetune-1 or finetune-10" in said
    more = "semi.preset=finetune-10", "semi.shares=0.04"
    evaluate(capsys, "semi", run, f"--out={tmp_path}", *tune, *more)
    (result,) = results.read_all(tmp_path)
    own = result.protocol["finetune"]
    assert own["preset"] == "finetune-10" and own["protocol"]["trunk_lr"] == 0.01


def test_an_archive_has_validation_images_of_its_own(run, textures, capsys, tmp_path, no_pass):
    archive = cifar_archive(tmp_path / "cifar-100-python.tar.gz")
    sets = [f"transfer.train={archive}", f"transfer.val={textures}/val"]
    _, said = evaluate(capsys, "transfer", run, f"--out={tmp_path}/out", *sets, code=2)
    assert "transfer.val: " in said and "leave it out" in said


def test_an_unpacked_archive_is_told_from_a_data_set(run, capsys, tmp_path, no_pass):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").touch()
    sets = [f"transfer.train={folder}"]
    _, said = evaluate(capsys, "transfer", run, f"--out={tmp_path}/out", *sets, code=2)
    assert "transfer.val: give the validation images of that data set" in said
    assert "or CIFAR's archive itself" in said


def test_tries_and_finetune_are_options_too(run, capsys, tmp_path):
    more = ["semi.shares=0.2", "semi.epochs=1", "semi.batch=8", "semi.lr=0.01"]
    values, _ = evaluate(capsys, "semi", run, "--tries=2", f"--out={tmp_path}/a", *more)
    assert "eval/semi-20pct/linear_top1_preset_last_deviation" in values
    values, _ = evaluate(capsys, "semi", run, "--finetune", f"--out={tmp_path}/b", *more)
    assert "eval/finetune-20pct-try0/finetune_top1_last" in values
    _, said = evaluate(capsys, "semi", run, "--tries=0", f"--out={tmp_path}/c", code=2)
    assert "semi.tries: " in said


@pytest.mark.parametrize(
    "what, override",
    [("linear", "linear.batch=0"), ("semi", "semi.size=7"), ("transfer", "transfer.epochs=no")],
)
def test_a_key_of_the_protocol_is_named_with_its_block(run, capsys, tmp_path, what, override):
    _, said = evaluate(capsys, what, run, f"--out={tmp_path}", override, code=2)
    assert f"error: {override.partition('=')[0]}: " in said


@pytest.mark.parametrize(
    "override, why",
    [
        (
            "linear.preset=disko",
            "linear.preset: no protocol is called 'disko'; did you mean disco?",
        ),
        ("linear.epochs=0", "linear.epochs: "),
        (
            "transfer.size=40",
            "transfer.size: a centre crop of 40 does not fit into a short side of 32",
        ),
    ],
)
def test_all_refuses_a_mistyped_protocol_at_once(run, capsys, tmp_path, no_pass, override, why):
    _, said = evaluate(capsys, "all", run, f"--out={tmp_path}", override, code=2)
    assert why in said and "left out" not in said


def test_a_student_alone_needs_a_teacher_and_labels(run, textures, capsys, tmp_path):
    alone = f"health.alone={run}"
    _, said = evaluate(capsys, "health", run, f"--out={tmp_path}/out", alone, code=2)
    assert "health.alone: there is no teacher to compare with; give health.teacher" in said
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (textures / "val").rglob("*.png"):
        (flat / path.name).write_bytes(path.read_bytes())
    more = [f"health.teacher={run}", f"data.val={flat}"]
    _, said = evaluate(capsys, "health", run, f"--out={tmp_path}/out", alone, *more, code=2)
    assert "health.alone: " in said and "has no classes" in said


def test_a_file_in_place_of_the_folder_of_embeddings(run, capsys, tmp_path, no_pass):
    (tmp_path / "file").touch()
    more = f"embed.out={tmp_path}/file"
    _, said = evaluate(capsys, "embed", run, f"--out={tmp_path}/out", more, code=2)
    assert f"{tmp_path}/file: is no folder" in said and "give another embed.out" in said


def test_only_the_rank_that_writes_needs_the_folder(run, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    (tmp_path / "file").touch()
    results.refuse_unwritable(tmp_path / "file")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="is no folder"):
        results.refuse_unwritable(tmp_path / "file")
