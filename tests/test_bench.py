"""The benches' harness: rows, rounds, result files, and the tables and pictures made from them."""

import ast
import hashlib
import io
import json
import re
import statistics
import sys

import numpy as np
import pytest
import yaml
from conftest import ROOT, run
from PIL import Image

from fastdisco import config

sys.path.insert(0, str(ROOT / "bench"))
import report
import testbeds
from harness import command, pictures, readers, results, rounds, runs, synthetic, tables
from pictures import accuracy, throughput


def result(folder, bench, device, rows, **more):
    folder.mkdir(exist_ok=True)
    about = dict(
        bench=bench,
        date="2026-01-02",
        commit="abc1234",
        command="bench/x.py",
        cpu="a chip",
        cores=2,
        gpus=[],
        versions={"torch": "2.14.1"},
    )
    (folder / f"{bench}-{device}.json").write_text(
        json.dumps(about | dict(device=device, summary=rows, samples=[]) | more)
    )


def test_a_row_has_a_value_or_a_reason():
    assert results.row("a", 1.0, "s", None, "lower") == dict(
        name="a", value=1.0, unit="s", aim=None, better="lower"
    )
    assert results.row("a", None, "s", 2, "lower", "no GPU here")["reason"] == "no GPU here"
    for value, reason in ((None, None), (1.0, "why")):
        with pytest.raises(AssertionError):
            results.row("a", value, "s", None, "lower", reason)


def test_a_row_of_rounds_has_median_and_quartiles():
    got = results.row_of_rounds("a", [3.0, 1.0, 2.04, 5.0, 4.0], 1, "s", None, "lower")
    assert got == results.row("a", 3.0, "s", None, "lower") | {"quartiles": [1.5, 4.5]}


def test_a_jpeg_has_the_lowest_quality_of_enough_bytes():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    sizes = {}
    for quality in range(30, 99):
        f = io.BytesIO()
        image.save(f, "JPEG", quality=quality)
        sizes[quality] = len(f.getvalue())
    for size in (0, sizes[50], sizes[60] + 1, sizes[97] + 1, 10**6):
        assert len(synthetic.jpeg(image, size)) == next(
            (n for n in sizes.values() if n >= size), sizes[98]
        )


def test_a_result_says_how_to_repeat_it(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    path = results.write(
        "probe", "cpu", [results.row("a", 1.5, "s", 2, "lower")], {"raw": [1, 2]}, extra=7
    )
    found = json.loads(path.read_text())
    assert path.name == "probe-cpu.json" and found["summary"] == [
        dict(name="a", value=1.5, unit="s", aim=2, better="lower")
    ]
    assert found["samples"] == {"raw": [1, 2]} and found["extra"] == 7
    assert {"torch", "triton", "deepspeed", "timm", "python"} <= found["versions"].keys() and any(
        "dali" in v for v in found["versions"]
    )
    assert (
        found["cores"] >= 1
        and found["cpu"]
        and re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])
        and found["command"]
    )
    assert "host" not in found and re.fullmatch(
        r"[0-9a-f]{7,}(-dirty)?", found["commit"] or "0000000"
    )


def test_tables_between_the_markers(tmp_path):
    result(
        tmp_path,
        "speed",
        "cpu",
        [
            dict(name="ips", value=1234.5678, unit="images/s", aim=1000, better="higher"),
            dict(
                name="gpu_ips",
                value=None,
                unit="images/s",
                aim=None,
                better="higher",
                reason="no GPU here",
            ),
        ],
    )
    result(
        tmp_path,
        "speed",
        "h100",
        [dict(name="ips", value=0.0, unit="images/s", aim=None, better="higher")],
        gpus=["NVIDIA H100"],
    )
    result(
        tmp_path, "speedy", "cpu", [dict(name="other", value=1, unit="s", aim=None, better="lower")]
    )
    marked = (
        "before\n<!-- bench:speed -->\nold\n<!-- /bench:speed -->\nafter\n"
        "<!-- bench:none -->\n<!-- /bench:none -->\n"
    )
    text = tables.fill(marked, tmp_path)
    lines = text.splitlines()
    assert lines[0] == "before" and "after" in lines and "old" not in text and "other" not in text
    assert "| ips | 1235 | images/s | 1000 |" in lines
    assert "| gpu_ips | not measured: no GPU here | images/s |  |" in lines
    assert "| ips | 0 | images/s |  |" in lines  # nought is a measurement
    assert (
        "a chip, 2 cores" in text
        and "NVIDIA H100" in text
        and "`bench/x.py`" in text
        and "abc1234" in text
    )
    assert text.endswith("<!-- bench:none -->\nNot measured yet.\n<!-- /bench:none -->\n")
    assert tables.fill(text, tmp_path) == text


def test_a_short_table_has_what_is_measured_and_names_the_page_with_all(tmp_path):
    rows = [
        results.row("a", 1.5, "s", None, "lower"),
        results.row("b", None, "s", None, "lower", "no GPU here"),
    ]
    result(tmp_path, "speed", "cpu", rows)
    result(tmp_path, "speed", "h100", rows[:1])
    text = tables.fill("<!-- bench:speed full:docs/x.md -->\n<!-- /bench:speed -->\n", tmp_path)
    assert (
        text.count("| a | 1.5 | s |  |") == 2
        and "| b |" not in text
        and text.count("Rows not measured yet: 1, see [docs/x.md](docs/x.md).") == 1
    )
    assert tables.fill(text, tmp_path) == text
    for _, bench, _, page, _ in tables.MARKED.findall((ROOT / "README.md").read_text()):
        assert not page or f"<!-- bench:{bench} -->" in (ROOT / page).read_text()


def test_a_row_that_another_device_measured_is_not_told_as_open(tmp_path):
    open_row = results.row("b", None, "s", None, "lower", "no GPU here")
    result(tmp_path, "speed", "cpu", [results.row("a", 1.5, "s", None, "lower"), open_row])
    result(tmp_path, "speed", "gpu", [results.row("b", 2.5, "s", None, "lower")])
    empty = "<!-- bench:speed -->\n<!-- /bench:speed -->\n"
    text = tables.fill(empty, tmp_path)
    assert "not measured" not in text and "| b | 2.5 | s |  |" in text
    late = results.row("b", None, "s", None, "lower", "the time was up")
    result(tmp_path, "speed", "gpu", [late])
    text = tables.fill(empty, tmp_path)
    assert "no GPU here" not in text and "| b | not measured: the time was up | s |  |" in text
    (tmp_path / "speed-gpu.json").unlink()
    assert "| b | not measured: no GPU here | s |  |" in tables.fill(empty, tmp_path)


def test_a_table_for_readers_has_words_in_its_rows(tmp_path, monkeypatch):
    read = [("how fast", "{:.1f} s", "a"), ("on a GPU", "{:.1f} s", "b"), ("gone", "{}", "c")]
    monkeypatch.setattr(readers, "READ", {"speed": read})
    rows = [
        results.row("a", 1.55, "s", 1, "lower"),
        results.row("b", None, "s", None, "lower", "no GPU here"),
    ]
    result(tmp_path, "speed", "cpu", rows)
    text = tables.fill("<!-- bench:speed readers:docs/x.md -->\n<!-- /bench:speed -->\n", tmp_path)
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table[2:] == ["| how fast | 1.6 s |", "| on a GPU | not measured yet |"]
    assert "a chip, 2 cores" in text and "every figure: [docs/x.md](docs/x.md)." in text
    assert tables.fill(text, tmp_path) == text


def test_the_readmes_tables_are_for_readers():
    """At most ten rows in words: no names of rows, no aims."""
    text = (ROOT / "README.md").read_text()
    assert all(m[2] == "readers" for m in tables.MARKED.findall(text)) and "| aim |" not in text
    for bench, rows in readers.READ.items():
        names = {r["name"] for r in json.loads(_kept(bench).read_text())["summary"]}
        assert len(rows) <= 10 and {name for _, _, name in rows} <= names
        assert not names & {what for what, _, _ in rows}


def _kept(bench):
    return ROOT / f"bench/results/{bench}-cpu.json"


def test_check_tells_a_stale_file(tmp_path, monkeypatch, capsys):
    folder, readme, doc = (
        tmp_path / "results",
        tmp_path / "README.md",
        tmp_path / "docs" / "speed.md",
    )
    doc.parent.mkdir()
    readme.write_text("<!-- bench:speed -->\n<!-- /bench:speed -->\n")
    doc.write_text("no table here\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", folder)
    row = dict(name="ips", value=1, unit="images/s", aim=None, better="higher")
    result(folder, "speed", "cpu", [row])
    assert report.main(["--check"]) == 1 and "README.md" in capsys.readouterr().out
    assert "ips" not in readme.read_text()  # a check writes nothing
    assert (
        report.main([]) == 0
        and report.main(["--check"]) == 0
        and "| ips | 1 |" in readme.read_text()
    )
    result(folder, "speed", "cpu", [row | {"value": 2}])
    assert report.main(["--check"]) == 1
    assert doc.read_text() == "no table here\n"


def test_the_projects_own_tables_are_fresh():
    assert "stale" not in run(sys.executable, "bench/report.py", "--check")


def test_every_arm_runs_once_a_round_in_an_order_drawn_anew():
    calls = []
    arms = {name: (lambda name=name: calls.append(name) or len(calls)) for name in "abc"}
    found = rounds.interleaved(arms, 6, warm_up=1)
    turns = ["".join(calls[3 * r : 3 * r + 3]) for r in range(7)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns) and len(set(turns)) > 2
    # The first round does not count; the others' values stand in their order.
    assert found == {n: [i for i, c in enumerate(calls, 1) if c == n and i > 3] for n in "abc"}
    before = calls.copy()
    calls.clear()
    rounds.interleaved(arms, 6, warm_up=1)
    assert calls == before  # as another rank has it


def test_of_two_arms_each_is_first_as_often():
    calls = []
    arms = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    rounds.interleaved(arms, 4)
    assert "".join(calls) == "abbaabba"


def test_rounds_end_where_they_are_told_to():
    assert rounds.interleaved({"a": lambda: 1}, 9, stop=lambda r: r == 3) == {"a": [1, 1, 1]}


def test_seconds_of_a_call():
    clock = iter([10.0, 16.0])
    calls = []
    assert rounds.seconds(lambda: calls.append(1), 4, lambda: next(clock)) == 1.5
    assert len(calls) == 4


def test_a_result_goes_where_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    path = results.write("probe", "cpu", [results.row("a", 1, "s", 2, "lower")], [], more=3)
    assert path == tmp_path / "probe-cpu.json" and json.loads(path.read_text())["more"] == 3
    assert results.write("probe", "cpu", [], [], tmp_path / "b").parent == tmp_path / "b"


def test_the_command_of_a_training_parses(folder, tmp_path):
    line = runs.command(ROOT / "tests/tiny.yaml", f"data.train={folder}/train", "run.epochs=3")
    assert line[0] == sys.executable and (ROOT / line[1]).exists()
    assert config.load(line[line.index("--config") + 1], line[4:]).run.epochs == 3


# ---- pictures

KEPT = sorted((ROOT / "bench" / "results").glob("*.json"))
DRAWN = [p for p in KEPT if (ROOT / f"bench/pictures/{p.stem.split('-')[0]}.py").exists()]


def test_every_picture_is_drawn_from_the_result_beside_it():
    assert pictures.stale(ROOT / "bench" / "results") == []
    found = sorted((ROOT / "bench" / "results").glob("*.png"))
    # One has the name of its result, several have a name of their own behind it.
    own = lambda png, p: png.stem == p.stem or png.stem.startswith(f"{p.stem}-")
    sources = {png: next(p for p in DRAWN if own(png, p)) for png in found}
    assert {"accuracy-cpu", "throughput-cpu"} <= {p.stem for p in sources.values()}
    for png, source in sources.items():
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        with Image.open(png) as image:
            assert digest in image.text.values()


@pytest.mark.parametrize("path", DRAWN, ids=lambda p: p.name)
def test_a_picture_is_the_same_bytes_each_time(path):
    assert pictures.drawn(path) == pictures.drawn(path)


def test_a_picture_shows_the_figures_of_its_result():
    """The bars' lengths are the summary's values, or the medians of the samples."""
    kept = {p.stem: json.loads(p.read_text()) for p in DRAWN}
    result = kept["accuracy-cpu"]
    value = {r["name"]: r["value"] for r in result["summary"]}
    for axis, key in zip(accuracy.draw(result).axes, ("knn", "linear")):
        shown = [bar.get_width() for bar in axis.patches]
        names = ("teacher", "alone", "alone_equal_time", "disco", "seed")
        assert shown == pytest.approx([value[f"{name}_{key}"] for name in names], abs=0.006)
        lines = [line.get_xdata() for line in axis.lines if line.get_linestyle() == "--"]
        dashed = [x[0] for x in lines if len(x)]  # one is there for the legend
        before = [value[f"untrained_{net}_{key}"] for net in ("teacher", *["student"] * 4)]
        assert dashed == pytest.approx(before, abs=0.006)
    result = kept["throughput-cpu"]
    (axis,) = throughput.draw(result).axes
    took = result["samples"]["16"]
    arms = ("teacher", "student", "ema", "loss", "optimizer", "loader", "full", "cached")
    want = [1e3 * statistics.median(took[name]) for name in (*arms, "official")]
    assert [bar.get_width() for bar in axis.patches] == pytest.approx(want)


def test_a_stale_picture_is_told_and_drawn_anew(tmp_path, monkeypatch, capsys):
    kept = ROOT / "bench/results/accuracy-cpu.json"
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").touch()
    content = json.loads(kept.read_text())
    path = tmp_path / "accuracy-cpu.json"
    path.write_text(json.dumps(content))
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.main(["--check"]) == 1 and "accuracy-cpu.png" in capsys.readouterr().out
    assert report.main([]) == 0 and report.main(["--check"]) == 0
    drawn = path.with_suffix(".png").read_bytes()
    content["samples"]["disco"][0]["knn"] += 0.2
    path.write_text(json.dumps(content))
    assert report.main(["--check"]) == 1 and path.with_suffix(".png").read_bytes() == drawn
    assert report.main([]) == 0 and path.with_suffix(".png").read_bytes() != drawn
    result(tmp_path, "speed", "cpu", [])  # has no picture, and wants none
    assert report.main(["--check"]) == 0
    (tmp_path / "speed-cpu.png").write_bytes(drawn)
    assert report.main(["--check"]) == 1 and "speed-cpu.png" in capsys.readouterr().out


def test_rows_follow_from_the_samples_beside_them():
    """The summaries that are kept are those that the benches make of the samples that are kept."""
    import accuracy
    import demo
    from losses import rows

    kept = {p.name: json.loads(p.read_text()) for p in KEPT}
    samples = {name: result["samples"] for name, result in kept.items()}
    for name, summary in {
        "accuracy-cpu.json": lambda x: accuracy.summary(x, {}, "cifar10"),
        "demo-cpu.json": demo.summary,
        "kernels-cpu.json": lambda x: rows.summary(x, gpu=False),
    }.items():
        assert summary(samples[name]) == kept[name]["summary"], name
    # Of a GPU some rows are left out on purpose, with another reason than the bench's.
    made = rows.summary(samples["kernels-gpu.json"], gpu=True)
    pairs = list(zip(kept["kernels-gpu.json"]["summary"], made, strict=True))
    assert all(mine == its for mine, its in pairs if mine["value"] is not None)
    assert sum(mine["value"] is not None for mine, _ in pairs) >= 10


def test_no_file_of_the_benches_is_longer_than_300_lines():
    long = {
        str(p): n
        for p in (ROOT / "bench").rglob("*.py")
        if (n := len(p.read_text().split("\n"))) > 301
    }
    assert not long


@pytest.mark.parametrize(
    "path",
    [p for p in sorted((ROOT / "bench").glob("*.py")) if "__main__" in p.read_text()],
    ids=lambda p: p.name,
)
def test_every_bench_says_how_it_is_called(path):
    """The commands in a file's head name the file, and its help is that head, line by line."""
    source = path.read_text()
    head = ast.get_docstring(ast.parse(source), clean=False)
    assert f"    python bench/{path.name}" in head and "parser(__doc__)" in source
    assert head in command.parser(head).format_help()


@pytest.mark.parametrize("path", KEPT, ids=lambda p: p.name)
def test_every_kept_result_is_whole(path):
    for row in json.loads(path.read_text())["summary"]:
        assert {"name", "value", "unit", "aim", "better"} <= row.keys() and row["better"] in (
            "higher",
            "lower",
        )
        assert row["value"] is not None or row["reason"]


def parts_of_make_gpu():
    """(names, test files by part, words of the bench's command by part)"""
    text = (ROOT / "Makefile").read_text()
    given = lambda kind: {
        part: words.split()
        for part, words in re.findall(rf"^{kind}-([\w-]+) := (.*)$", text, re.MULTILINE)
    }
    names = re.search(r"^PARTS := (.*)$", text, re.MULTILINE)[1].split()
    return names, given("tests"), given("bench")


def test_every_part_of_make_gpu_is_tests_or_a_bench_with_an_estimate_under_9_minutes():
    names, tests, benches = parts_of_make_gpu()
    assert sorted(names) == sorted([*tests, *benches]) and len(set(names)) == len(names)
    rows = re.findall(
        r"^\| `PART=([\w-]+)` \|.*\| (\d+) \|$", (ROOT / "docs/speed.md").read_text(), re.MULTILINE
    )
    assert [part for part, _ in rows] == names
    assert all(int(minutes) < 9 for _, minutes in rows)
    for file, *_ in benches.values():
        assert (ROOT / "bench" / file).exists()
    halves = [benches[f"testbeds-{i}"][2:] for i in (1, 2)]
    assert sorted(halves[0] + halves[1]) == sorted(testbeds.RUNS)


def test_a_bench_in_pieces_keeps_what_the_same_commit_measured(tmp_path, monkeypatch):
    assert results.earlier("probe", "cpu", tmp_path) == {}
    results.write("probe", "cpu", [], {"a": {"x": 1}}, tmp_path)
    assert results.earlier("probe", "cpu", tmp_path) == {"a": {"x": 1}}
    path = tmp_path / "probe-cpu.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"commit": "another"}))
    assert results.earlier("probe", "cpu", tmp_path) == {}


def test_every_gpu_test_is_in_a_part_of_make_gpu():
    _, tests, _ = parts_of_make_gpu()
    files = [name for listed in tests.values() for name in listed]
    marked = {
        f"tests/{p.name}"
        for p in (ROOT / "tests").glob("test_*.py")
        if re.search(r"^@pytest\.mark\.gpu|marks=pytest\.mark\.gpu", p.read_text(), re.MULTILINE)
    }
    assert (
        len(files) == len(set(files))
        and marked <= set(files)
        and all((ROOT / name).exists() for name in files)
    )


def test_the_demos_arms_share_every_setting_but_the_distillation():
    """student.yaml with and without a teacher differ in the teacher alone, the teacher's recipe in
    network, length and step size."""
    folder = ROOT / "configs" / "demo"
    flat = lambda name, *more: config.flatten(
        config.load(folder / name, more).model_dump(mode="json")
    )
    disco, alone, teacher = (
        flat("student.yaml"),
        flat("student.yaml", "teacher=null"),
        flat("teacher.yaml"),
    )
    differ = lambda a, b: {k for k in a | b if a.get(k) != b.get(k)}
    assert {k.split(".")[0] for k in differ(disco, alone)} == {"teacher"}
    assert differ(alone, teacher) <= {"run.name", "run.epochs", "student.arch", "optim.lr"}
    assert disco["bn.groups"] > 1 and disco["teacher.arch"] == teacher["student.arch"]
    # The paper's weight.
    assert (
        yaml.safe_load((folder / "student.yaml").read_text())["method"]
        .keys()
        .isdisjoint({"distill"})
    )
