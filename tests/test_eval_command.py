"""`fastdisco eval` from end to end: what it prints, writes, refuses and resumes."""

import argparse
import io
import json
import pickle
import shutil
import signal
import tarfile

import numpy as np
import pytest
import torch
from conftest import ROOT, ranks
from test_formats import save, small_swav

from fastdisco import cli, config, data, models
from fastdisco.commands import kept, networks
from fastdisco.common import dist
from fastdisco.common.errors import UserError
from fastdisco.data import loader as loading
from fastdisco.evals import knn, passes, results
from fastdisco.evals.linear import Heads, Rate
from fastdisco.evals.protocols import Protocol


def a_run(textures, out, seed=0, **more):
    """The folder of a run that saved random weights."""
    overrides = [
        f"data.train={textures}/train",
        f"data.val={textures}/val",
        f"run.out={out}",
        f"run.name=run{seed}",
        *(f"{k}={v}" for k, v in more.items()),
    ]
    cfg = config.load(ROOT / "tests/tiny.yaml", overrides)
    torch.manual_seed(seed)
    net = models.of(cfg)
    # Random weights make features of 0.002, on which a classifier learns its biases only.
    net.backbone.bn2.weight.data *= 300
    step = out / f"run{seed}" / "checkpoints/step_00000001"
    step.mkdir(parents=True)
    torch.save({"student": net.state_dict()}, step / "state.pt")
    (step.parent / "last").write_text(step.name)
    (out / f"run{seed}/config.yaml").write_text(config.dump(cfg))
    return out / f"run{seed}"


@pytest.fixture(scope="module")
def run(textures, tmp_path_factory):
    return a_run(textures, tmp_path_factory.mktemp("runs"))


LINEAR = ["linear.epochs=3", "linear.batch=16", "linear.lr=1"]


def evaluate(capsys, *arguments, code=0):
    """The values of the last line, and all that was said."""
    assert cli.main(["eval", *map(str, arguments)]) == code, capsys.readouterr().err
    out, err = capsys.readouterr()
    return (json.loads(out.splitlines()[-1]) if code == 0 else None), out + err


def test_knn_is_that_of_training_and_more(run, textures, capsys):
    values, _ = evaluate(capsys, "knn", run)
    net, cfg = models.from_run(run)
    lists = [data.listing(textures / p) for p in ("train", "val")]
    cpu = torch.device("cpu")
    with torch.no_grad():
        want = knn.score(net.features, *lists, cfg.data, cfg.view, cfg.eval, 0, cpu)
    assert values["eval/knn_top1"] == want["knn_top1"]
    ks = [k for k in values if "_k" in k]
    assert ks == [f"eval/knn_top1_k{k}_t0.07" for k in (1, 5, 10, 20)]
    (result,) = results.read_all(run / "eval")
    assert result.values["knn_top1_k5_t0.07"] == values["eval/knn_top1_k5_t0.07"]
    found = result.predictions["knn_top1_k5_t0.07"]
    assert (found == result.labels).mean() == values["eval/knn_top1_k5_t0.07"]
    assert result.labels.tolist() == lists[1].labels.tolist()
    assert result.protocol["network"]["arch"] == cfg.student.arch
    assert result.protocol["data"]["train"]["images"] == 60


def test_all_does_what_the_data_allow_from_one_pass(run, capsys, tmp_path, monkeypatch):
    passes = []
    before = data.EvalLoader.__iter__

    def counted(self):
        passes.append((str(self.listing.source.name), len(self.indices)))
        return before(self)

    monkeypatch.setattr(data.EvalLoader, "__iter__", counted)
    values, said = evaluate(
        capsys,
        "all",
        run,
        f"--out={tmp_path}",
        *LINEAR,
        "probe.held=0.1",
        "probe.epochs=3",
        "semi.epochs=2",
        "semi.lr=0.1",
        "semi.shares=[0.2, 0.01]",
    )
    # The linear evaluation sees its crops in a loader of its own.
    assert sorted(passes) == [("train", 60), ("val", 30)]
    names = {k.removeprefix("eval/") for k in values}
    assert names >= {
        "knn_top1",
        "recall_at_1",
        "map",
        "feature_std",
        "rankme",
        "alignment",
        "uniformity",
        "tsne_trustworthiness",
        "ridge_top1_selected",
        "logistic_top1_selected",
        "sgd_top1_selected",
        "semi-20pct-try0/linear_top1_preset_last",
        "linear_top1_preset_last",
    }
    assert "semi: left out:" not in said
    # The table at the end: each value, and the time once for each evaluation.
    table = said[said.index("evaluation ") :].splitlines()
    assert table[0].split() == ["evaluation", "value", "number", "seconds"]
    rows = [line.split() for line in table if line.startswith(("knn ", "retrieve "))]
    assert [row[:2] for row in rows][-5:-1] == [
        ["retrieve", "recall_at_1"],
        ["retrieve", "recall_at_5"],
        ["retrieve", "recall_at_10"],
        ["retrieve", "map"],
    ]
    assert f"{100 * values['eval/recall_at_1']:.2f}" == rows[-5][2] and float(rows[-5][3]) >= 0
    assert values["eval/ridge_top1_selected"] > 0.34
    assert len(results.read_all(tmp_path)) == 10


def trained_by_torch(run, lr):
    """Predictions for the validation images after three epochs, with torch's layer and optimizer,
    one loader for each batch."""
    net, cfg = models.from_run(run)
    train, val = (data.listing(p) for p in (cfg.data.train, cfg.data.val))
    crop = config.Crop(size=32, scale=(0.08, 1), jitter_p=0, gray_p=0, blur_p=0)
    loader = data.TrainLoader(train, [crop], 16, 0, 3, 1, 1, torch.device("cpu"))
    layer = torch.nn.Linear(net.backbone.head_hidden_size, 3)
    layer.weight.data = Heads([Rate(lr, 0)], layer.in_features, 3, Protocol(), 0).weight[0]
    layer.bias.data.zero_()
    sgd = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9)
    for epoch in range(3):
        for images in np.split(loading.order(0, epoch, train), [16, 32, 48]):
            batch = next(loader.views_of(images, epoch))
            with torch.no_grad():
                x = net.features(batch.views[0])
            loss = torch.nn.functional.cross_entropy(layer(x), batch.label)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
    with torch.no_grad():
        batches = data.EvalLoader(val, 32, 32, 30, 1, torch.device("cpu"))
        return layer(net.features(next(iter(batches)).views[0])).argmax(1)


def test_linear_is_what_torch_trains(run, capsys, tmp_path):
    values, _ = evaluate(capsys, "linear", run, f"--out={tmp_path}", *LINEAR)
    (result,) = results.read_all(tmp_path)
    found = result.predictions["linear_top1_preset_last"]
    assert found.tolist() == trained_by_torch(run, 1.0).tolist()
    assert (found == result.labels).mean() == values["eval/linear_top1_preset_last"]
    assert len(set(found.tolist())) > 1 and "eval/linear_top1_selected" not in values


def test_a_grid_of_rates_is_chosen_on_images_held_out(run, capsys, tmp_path):
    more = ["linear.lrs=[0.1, 1.0]", "linear.weight_decays=[0, 0.001]", "linear.held=0.1"]
    values, _ = evaluate(capsys, "linear", run, f"--out={tmp_path}", *LINEAR, *more)
    (result,) = results.read_all(tmp_path)
    own = result.protocol["linear"]
    assert own["preset"] == "disco" and own["held"] == 0.1
    assert own["rates"] == [[1.0, 0.0], [0.1, 0.0], [0.1, 0.001], [1.0, 0.001]]
    assert own["protocol"]["milestones"][:2] == [5, 10] and own["protocol"]["size"] == 32
    assert values["eval/linear_top1_best_on_val"] >= values["eval/linear_top1_selected"]
    found = result.predictions["linear_top1_selected"]
    assert (found == result.labels).mean() == values["eval/linear_top1_selected"]
    assert result.intervals.keys() == {"linear_top1_selected", "linear_top1_preset_last"}


def stop_after(monkeypatch, steps):
    """SIGTERM reaches the process in the middle of the training."""
    left, before = [steps], Heads.step

    def step(self, *args):
        left[0] -= 1
        if left[0] == 0:
            signal.raise_signal(signal.SIGTERM)
        return before(self, *args)

    monkeypatch.setattr(Heads, "step", step)


def test_the_evaluation_does_not_depend_on_the_runs_seed(textures, run, capsys, tmp_path):
    arguments = [*LINEAR, "linear.lrs=[0.1, 1.0]", "linear.held=0.1", "--only=linear"]
    a, b = (
        evaluate(capsys, "all", run, f"--out={tmp_path}/{s}", *arguments, f"run.seed={s}")[0]
        for s in (0, 1)
    )
    assert a == b


def test_a_stopped_linear_evaluation_continues_to_the_same_numbers(
    run, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(kept, "LOOK", 1)
    arguments = ["linear", run, *LINEAR, "linear.lrs=[0.1, 1.0]", "linear.held=0.1"]
    want, _ = evaluate(capsys, *arguments, f"--out={tmp_path}/whole")
    with monkeypatch.context() as m:
        stop_after(m, 6)
        assert cli.main(["eval", *map(str, arguments), f"--out={tmp_path}/cut"]) == 75
    assert "stopped as asked" in capsys.readouterr().out
    assert [p.suffix for p in (tmp_path / "cut").iterdir()] == [".pt"]
    values, said = evaluate(capsys, *arguments, f"--out={tmp_path}/cut")
    assert "continues after epoch 1, step 2" in said and values == want
    whole, cut = (results.read_all(tmp_path / n)[0] for n in ("whole", "cut"))
    assert whole.hash == cut.hash
    assert np.array_equal(
        whole.predictions["linear_top1_selected"], cut.predictions["linear_top1_selected"]
    )
    assert not list((tmp_path / "cut").glob("*.pt"))


def on_a_rank(run, out):
    dist.defaults()
    arguments = [str(run), f"--out={out}", *LINEAR, "linear.lrs=[0.1, 1.0]", "linear.held=0.1"]
    code = cli.main(["eval", "all", *arguments, "--only=knn,retrieve,health,probe,linear"])
    return code


def test_two_ranks_write_what_one_writes(run, tmp_path):
    assert on_a_rank(run, tmp_path / "one") == 0
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert ranks(2, on_a_rank, run, tmp_path / "two") == [0, 0]
    one, two = (results.read_all(tmp_path / n) for n in ("one", "two"))
    assert [r.what for r in one] == [r.what for r in two] and len(one) == 7
    for a, b in zip(one, two):
        assert a.hash == b.hash, a.what
        for key in a.values:
            assert b.values[key] == pytest.approx(a.values[key], abs=1e-5), key


def test_semi_of_a_list_and_of_several_draws(run, textures, capsys, tmp_path):
    names = [f"train{i:03}.png" for i in range(0, 60, 4)]
    (tmp_path / "1percent.txt").write_text("\n".join(names) + "\n")
    settings = ["semi.epochs=2", "semi.batch=8", "semi.lr=0.1"]
    values, said = evaluate(
        capsys,
        "semi",
        run,
        f"--out={tmp_path}/a",
        f"semi.lists=[{tmp_path}/1percent.txt]",
        *settings,
    )
    assert "has 15 names, the published list 12811" in said
    assert "eval/semi-1percent/linear_top1_preset_last" in values
    values, _ = evaluate(
        capsys, "semi", run, f"--out={tmp_path}/b", "semi.shares=[0.2]", "semi.tries=3", *settings
    )
    each = [values[f"eval/semi-20pct-try{i}/linear_top1_preset_last"] for i in range(3)]
    assert values["eval/semi-20pct/linear_top1_preset_last_mean"] == pytest.approx(np.mean(each))
    deviation = np.std(each, ddof=1)
    assert values["eval/semi-20pct/linear_top1_preset_last_deviation"] == pytest.approx(deviation)


def test_semi_by_fine_tuning_is_named_apart(run, capsys, tmp_path):
    more = ["semi.finetune=true", "semi.epochs=2", "semi.batch=8", "semi.shares=[0.2, 0.04]"]
    more += ["semi.lr=0.01"]
    values, _ = evaluate(capsys, "semi", run, f"--out={tmp_path}", *more)
    assert values.keys() == {
        f"eval/finetune-{share}pct-try0/finetune_{name}"
        for share in (4, 20)
        for name in ("top1_last", "top5_last", "top1_best_on_val")
    }
    four, twenty = results.read_all(tmp_path)[::-1]
    for result, preset, trunk in ((four, "finetune-1", 0.02), (twenty, "finetune-10", 0.01)):
        own = result.protocol["finetune"]
        assert own["preset"] == preset and own["protocol"]["trunk_lr"] == trunk
        assert own["protocol"]["lr"] == 0.01 and own["protocol"]["milestones"] == [12, 16]
        found = result.predictions["finetune_top1_last"]
        assert (found == result.labels).mean() == result.values["finetune_top1_last"]


def test_transfer_to_another_set(run, textures, capsys, tmp_path):
    for part in ("train", "val"):
        shutil.copytree(textures / part, tmp_path / f"other/{part}")
        (tmp_path / f"other/{part}/class0").rename(tmp_path / f"other/{part}/zebra")
    values, _ = evaluate(
        capsys,
        "transfer",
        run,
        f"--out={tmp_path}/out",
        f"transfer.train={tmp_path}/other/train",
        f"transfer.val={tmp_path}/other/val",
        "transfer.epochs=2",
        "transfer.batch=16",
        "transfer.lr=0.1",
    )
    assert values.keys() >= {"eval/transfer-other/linear_top1_preset_last"}
    (result,) = results.read_all(tmp_path / "out")
    protocol = result.protocol["linear"]["protocol"]
    assert (protocol["val_interpolation"], protocol["schedule"]) == ("cubic", "constant")
    said = evaluate(capsys, "transfer", run, code=2)[1]
    assert "transfer.train: give another data set" in said


def cifar_archive(path):
    """CIFAR-100's python archive, of three classes, 20 and 10 images."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w:gz") as tar:

        def add(name, content):
            raw = pickle.dumps(content, protocol=2)
            info = tarfile.TarInfo(f"cifar-100-python/{name}")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))

        for name, n in (("train", 20), ("test", 10)):
            pixels = rng.integers(0, 256, size=(n, 3072), dtype=np.uint8)
            add(name, {b"data": pixels, b"fine_labels": [i % 3 for i in range(n)]})
        add("meta", {b"fine_label_names": [b"a", b"b", b"c"]})
    return path


def test_transfer_to_cifars_archive(run, capsys, tmp_path):
    archive = cifar_archive(tmp_path / "cifar-100-python.tar.gz")
    more = ["transfer.epochs=2", "transfer.batch=8", "transfer.lr=0.1"]
    arguments = ["transfer", run, f"--out={tmp_path}/out", f"transfer.train={archive}", *more]
    values, said = evaluate(capsys, *arguments)
    assert "packed into" in said
    name = "eval/transfer-cifar_100_python/linear_top1_preset_last"
    assert evaluate(capsys, *arguments)[0][name] == values[name]
    (result,) = results.read_all(tmp_path / "out")
    sizes = [result.protocol["data"][part]["images"] for part in ("train", "val")]
    assert sizes == [20, 10]


def test_health_beside_a_teacher(textures, run, capsys, tmp_path):
    other = a_run(textures, tmp_path, seed=1)
    values, _ = evaluate(
        capsys, "health", run, f"--out={tmp_path}", f"health.teacher={run}", f"health.alone={other}"
    )
    assert values["eval/teacher_cka"] == pytest.approx(1)
    assert values["eval/teacher_neighbours"] == 1
    assert values["eval/teacher_cosine"] == pytest.approx(1)
    assert values["eval/teacher_gap"] == 0
    values, _ = evaluate(capsys, "health", run, f"--out={tmp_path}", f"health.teacher={other}")
    assert 0 < values["eval/teacher_cka"] < 1 and values["eval/teacher_cosine"] < 0.9


def test_networks_with_no_teacher_and_with_two_stand_in_one_table(textures, run, capsys, tmp_path):
    other = a_run(textures, tmp_path, seed=1)
    folders = [tmp_path / name for name in ("alone", "first", "second")]
    teachers = ([], [f"health.teacher={run}"], [f"health.teacher={other}"])
    for folder, teacher in zip(folders, teachers):
        evaluate(capsys, "health", run, f"--out={folder}", *teacher)
    assert cli.main(["eval", "table", *map(str, folders), "--format=csv"]) == 0
    rows = [line.split(",") for line in capsys.readouterr().out.splitlines()]
    of = {name: values for name, *values in rows}
    assert len(set(of["rankme"])) == 1 and of["teacher_cka"][:2] == ["", "1"]
    assert 0 < float(of["teacher_cka"][2]) < 1


def test_embed_writes_features_by_name(run, textures, capsys, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in sorted((textures / "val/class0").iterdir())[:5]:
        shutil.copy(path, flat)
    values, _ = evaluate(
        capsys, "embed", run, f"--out={tmp_path}/a", f"embed.data={flat}", f"embed.out={tmp_path}/e"
    )
    x = np.load(tmp_path / "e/features.npy")
    names = (tmp_path / "e/names.txt").read_text().split()
    assert names == sorted(p.name for p in flat.iterdir()) and len(x) == 5
    assert np.load(tmp_path / "e/embedding.npy").shape == (5, values["eval/embedding_width"])
    net, cfg = models.from_run(run)
    images = data.listing(textures / "val")
    at = [images.files.index(f"class0/{n}") for n in names]
    loader = data.EvalLoader(
        images, cfg.data.eval_resize, cfg.data.eval_size, 8, 1, torch.device("cpu"), at
    )
    with torch.no_grad():
        want = net.features(next(iter(loader)).views[0])
    np.testing.assert_allclose(x, want, atol=1e-5)


def test_the_table_and_the_comparison(textures, run, capsys, tmp_path):
    other = a_run(textures, tmp_path, seed=2)
    for r in (run, other):
        evaluate(capsys, "knn", r, f"--out={tmp_path}/{r.name}-results")
    folders = [tmp_path / f"{r.name}-results" for r in (run, other)]
    assert cli.main(["eval", "table", *map(str, folders), "--format=markdown"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("| value | run0-results | run2-results |")
    assert "\n| knn_top1_k1_t0.07 | " in out
    assert cli.main(["eval", "table", *map(str, folders), "--rows=networks", "--format=csv"]) == 0
    assert capsys.readouterr().out.startswith("network,knn_top1_k1_t0.07,")
    assert cli.main(["eval", "table", str(folders[0]), "--versus", str(folders[1])]) == 0
    out = capsys.readouterr().out
    a, b = (results.read_all(f)[0] for f in folders)
    difference = a.values["knn_top1_k1_t0.07"] - b.values["knn_top1_k1_t0.07"]
    assert f"knn_top1_k1_t0.07: {difference:+.2%}" in out
    evaluate(capsys, "knn", other, f"--out={folders[1]}", "data.eval_resize=40")
    assert cli.main(["eval", "table", *map(str, folders)]) == 2
    said = capsys.readouterr().err
    assert "they differ in view.resize (" in said
    mended = next(p for p in folders[1].glob("*.json") if '"resize": 32' in p.read_text())
    assert cli.main(["eval", "table", str(folders[0]), str(mended)]) == 0


def test_timm_and_a_file_of_weights(textures, capsys, tmp_path):
    sets = [
        f"data.train={textures}/train",
        f"data.val={textures}/val",
        "data.eval_size=32",
        "data.eval_resize=32",
        "data.threads=1",
        f"--out={tmp_path}/out",
    ]
    untrained, _ = evaluate(capsys, "knn", "timm:resnet18", "--untrained", *sets)
    torch.manual_seed(0)
    import timm

    full = timm.create_model("resnet18", num_classes=7)
    torch.save({"state_dict": full.state_dict()}, tmp_path / "weights.pth")
    evaluate(capsys, "knn", "timm:resnet18", f"--weights={tmp_path}/weights.pth", *sets)
    kinds = {r.protocol["network"]["source"] for r in results.read_all(tmp_path / "out")}
    assert kinds == {"untrained", "a file of weights"} and untrained["eval/knn_top1"] > 0.2
    said = evaluate(capsys, "knn", "timm:resnet18", *sets, code=2)[1]
    assert "give its weights as --weights FILE, or --untrained" in said
    said = evaluate(capsys, "knn", "timm:resnet18", "--untrained", code=2)[1]
    assert "data.val: give the images" in said


def test_a_teachers_file(textures, capsys, tmp_path):
    file = save(tmp_path, small_swav()[0])
    sets = [f"data.{k}={textures}/{k}" for k in ("train", "val")]
    small = ["data.eval_size=32", "data.eval_resize=32", "data.threads=1", f"run.out={tmp_path}"]
    values, _ = evaluate(capsys, "all", file, *sets, *small, "--only=knn,health")
    assert 0 < values["eval/knn_top1"] < 1 and values["eval/rankme"] > 1
    (_, result) = results.read_all(tmp_path / "eval" / file.name)
    assert "SwAV" in result.protocol["network"]["source"]
    assert result.protocol["network"]["arch"] == "resnet18"


def test_class_tokens_of_the_last_blocks(textures, capsys, tmp_path):
    args = argparse.Namespace(
        network="timm:vit_tiny_patch16_224", weights=None, untrained=True, out=tmp_path
    )
    sizes = ["data.eval_size=32", "data.eval_resize=32"]
    network = networks.read(args, [f"data.val={textures}/val", *sizes])
    body, x, tokens = network.net.backbone, torch.randn(2, 3, 32, 32), []
    hooks = [b.register_forward_hook(lambda m, i, o: tokens.append(o)) for b in body.blocks[-4:]]
    with torch.no_grad():
        body(x)
        for h in hooks:
            h.remove()
        want = torch.cat([body.norm(t)[:, 0] for t in tokens], 1)
        torch.testing.assert_close(network.encoder(4)(x), want)
        assert want.shape[1] == 4 * network.about["features"]
    args.network = "timm:resnet18"
    with pytest.raises(UserError, match="resnet18 has no class tokens of 4 blocks"):
        networks.read(args, [f"data.val={textures}/val", *sizes]).encoder(4)


def test_fewer_images_than_ranks_are_refused(run, monkeypatch):
    _, cfg = models.from_run(run)
    val, view = data.listing(cfg.data.val), passes.of_config(cfg)
    monkeypatch.setattr(dist, "world", lambda: 31)
    with pytest.raises(UserError, match="30 images are fewer than 31 ranks"):
        passes.features(lambda x: {}, val, val.kept, view, cfg.data, torch.device("cpu"))


def test_refusals(run, textures, capsys, tmp_path):
    def refused(*arguments):
        return evaluate(capsys, *arguments, f"--out={tmp_path}", code=2)[1]

    train = textures / "train"
    assert "are also images of" in refused("knn", run, f"data.val={train}")
    one = tmp_path / "one"
    shutil.copytree(textures / "val", one)
    shutil.rmtree(one / "class1")
    assert "its classes are not those of" in refused("knn", run, f"data.val={one}")
    shutil.rmtree(one / "class2")
    assert "all 10 images are of one class" in refused("retrieve", run, f"data.val={one}")
    said = refused("all", run, f"data.val={one}", "--only=retrieve,knn")
    assert "retrieve: left out: " in said and "are of one class" in said
    assert "200 neighbours" in refused("knn", run, "knn.k=[200]")
    assert "did you mean linear.epochs?" in refused("linear", run, "linear.epoch=3")
    assert "did you mean knn.temp?" in refused("knn", run, "knn.temps=[1]")
    assert "did you mean disco?" in refused("linear", run, "linear.preset=disko")
    assert "is none to choose the learning rate on" in refused(
        "linear", run, "linear.lrs=[1, 2]", "linear.held=0.001"
    )
    assert not list(tmp_path.glob("*.json"))


def test_a_broken_network_or_checkpoint_is_refused(run, textures, capsys, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    state = broken / "checkpoints/step_00000001/state.pt"
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    said = evaluate(capsys, "knn", broken, code=2)[1]
    assert "not a readable torch checkpoint" in said
    (broken / "checkpoints/last").write_text("step_00000009")
    assert "holds no state.pt" in evaluate(capsys, "knn", broken, code=2)[1]
    found = torch.load(run / "checkpoints/step_00000001/state.pt", weights_only=True)
    weights = found["student"]
    for key in weights:
        if key.startswith("backbone.") and key.endswith((".weight", ".bias")):
            weights[key].zero_()
    shutil.rmtree(broken)
    shutil.copytree(run, broken)
    torch.save({"student": weights}, state)
    said = evaluate(capsys, "knn", broken, code=2)[1]
    assert "the features are the same for all" in said
