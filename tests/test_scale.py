"""bench/scale.py: the model of a step on many devices, against cases whose answer is known."""

import json
import math
import sys

import pytest
from conftest import ROOT

from fastdisco import config
from fastdisco.common.errors import UserError

sys.path.insert(0, str(ROOT / "bench"))
import scale
from pictures import scale as pictures
from scaling import curve, devices, ranks, work
from scaling.devices import Machine, Measured, Peak
from scaling.links import Link, Steps, ring_all_reduce, tree_all_reduce
from scaling.networks import Work, layers
from scaling.overlap import Layer, buckets, exposed, finished
from scaling.predict import predict
from scaling.stragglers import empirical, expected_max, normal

FREE = float("inf")
FLAT = Steps(0.0, 1e-5, 1e-5)


def link(per_node=64, inside=1e9, outside=1e9, ring=FLAT, tree=FLAT):
    return Link(per_node, inside, outside, ring, tree)


# ---- links


def test_a_ring_sends_twice_n_minus_1_nths_of_the_bytes():
    for n in (2, 3, 8, 64):
        want = 2 * (n - 1) / n * 1e8 / 1e9 + 2 * (n - 1) * 1e-5
        assert ring_all_reduce(link(), n, 1e8) == pytest.approx(want)
    assert ring_all_reduce(link(), 1, 1e8) == 0 == link().all_gather(1, 1e8)


def test_a_gather_sends_every_others_bytes():
    assert link().all_gather(5, 1e6) == pytest.approx(4 * 1e6 / 1e9 + 4 * 1e-5)


def test_a_tree_has_the_logarithm_of_the_nodes_in_its_latency():
    tree = Steps(1e-3, 1e-5, 1e-4)
    # 16 nodes of 8: a chain of 7 within the node, 4 levels between nodes, up and down.
    want = 2 * 1e8 / 5e8 + 1e-3 + 2 * (7 * 1e-5 + 4 * 1e-4)
    assert tree_all_reduce(link(8, 1e9, 5e8, tree=tree), 128, 1e8) == pytest.approx(want)


def test_between_nodes_the_slower_link_counts_and_a_crossing_for_each_node():
    two = link(8, 1e9, 2e8, ring=Steps(0.0, 1e-6, 1e-4))
    assert two.bandwidth(8) == 1e9 and two.bandwidth(9) == 2e8
    # Around 16 ranks on two nodes: 15 steps, 2 of which cross.
    want = 2 * 15 / 16 * 1e6 / 2e8 + 2 * (13 * 1e-6 + 2 * 1e-4)
    assert ring_all_reduce(two, 16, 1e6) == pytest.approx(want)


def test_the_faster_algorithm_is_taken():
    # Few bytes on many nodes want the tree, many bytes on few the ring.
    both = link(8, tree=Steps(0.0, 1e-5, 1e-5))
    assert both.all_reduce(512, 1.0) == tree_all_reduce(both, 512, 1.0)
    assert tree_all_reduce(both, 512, 1.0) < ring_all_reduce(both, 512, 1.0)
    assert both.all_reduce(2, 1e9) == ring_all_reduce(both, 2, 1e9)


# ---- overlap


def test_gradients_fill_buckets_in_the_order_of_the_backward():
    made = [Layer(1.0, 3.0), Layer(2.0, 4.0), Layer(4.0, 0.0), Layer(8.0, 9.0), Layer(16.0, 0.0)]
    # 3 and 4 fit into 8, and 9 is a bucket by itself; each is sent with its last gradient.
    assert buckets(made, 8.0) == [(3.0, 7.0), (15.0, 9.0)]
    assert buckets([Layer(1.0, 0.0)], 8.0) == []


def test_an_exchange_that_fits_beside_the_backward_costs_its_last_bucket():
    even = [Layer(1.0, 1.0)] * 10
    assert exposed(even, 1.0, lambda size: 0.5) == pytest.approx(0.5)
    assert exposed(even, 1.0, lambda size: 0.5, overlap=False) == pytest.approx(5.0)


def test_an_exchange_that_does_not_fit_costs_what_is_left():
    even = [Layer(1.0, 1.0)] * 10
    # The first bucket is there after 1 s, then ten of 3 s each follow.
    assert finished(buckets(even, 1.0), lambda size: 3.0) == pytest.approx(31.0)
    assert exposed(even, 1.0, lambda size: 3.0) == pytest.approx(21.0)
    # One bucket hides nothing.
    assert exposed(even, 100.0, lambda size: 3.0) == pytest.approx(3.0)


# ---- stragglers


def test_the_mean_of_the_slowest_of_n():
    uniform = lambda u: u
    for n in (1, 2, 10, 100):
        assert expected_max(uniform, n) == pytest.approx(n / (n + 1), abs=1e-3)
    exponential = lambda u: -math.log(1 - u)
    for n in (1, 4, 32):
        want = sum(1 / k for k in range(1, n + 1))
        assert expected_max(exponential, n) == pytest.approx(want, rel=5e-3)
    # Of two normal ones: the standard deviation over the root of pi.
    assert expected_max(normal(0.1), 2) == pytest.approx(1 + 0.1 / math.sqrt(math.pi), abs=1e-4)
    assert expected_max(normal(0.0), 1000) == 1.0


def test_the_slowest_of_measured_steps():
    # Of two draws from {1, 3}, whose mean is 2, three of four have a 3.
    assert expected_max(empirical([3.0, 1.0]), 2) == pytest.approx((1 + 3 * 3) / 4 / 2, abs=1e-3)


# ---- networks and jobs


def test_a_networks_layers_have_torchs_own_count_of_operations():
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from fastdisco import models

    # torch's count on a CPU leaves out attention's two products: of 6 blocks, 101 tokens, 64 wide.
    for arch, attention in (
        ("test_resnet", 0),
        ("test_efficientnet", 0),
        ("test_vit", 6 * 101**2 * 64),
    ):
        net = models.create(arch, lambda d: torch.nn.Linear(d, 8)).eval()
        with FlopCounterMode(display=False) as count, torch.no_grad():
            net([torch.zeros(1, 3, 160, 160)])
        with torch.device("meta"):
            same = models.create(arch, lambda d: torch.nn.Linear(d, 8)).eval()
        crops = [config.Crop(size=160)] * 2
        found = layers(same, crops)
        # Two crops.
        want = 2 * (count.get_total_flops() + 4 * attention)
        assert sum(x.flops for x in found) == pytest.approx(want, rel=0.01)
        assert sum(x.weights for x in found) == sum(p.numel() for p in net.parameters())


@pytest.fixture(scope="module")
def job():
    return work.job(config.load(ROOT / "configs/mobv3.yaml"))


def test_what_a_configuration_asks_for(job):
    """configs/mobv3.yaml: the counts of bench/throughput.py, and what MoCo sends."""
    # Forward of two views each; bench/throughput.py counted 2.618e9 both ways and 16.37e9.
    assert 3 * sum(x.flops for x in job.student) == pytest.approx(2.618e9, rel=0.01)
    assert sum(x.flops for x in job.teacher) == pytest.approx(16.37e9, rel=0.01)
    # The EMA sees one view of two.
    assert 2 * sum(x.flops for x in job.ema) == pytest.approx(sum(x.flops for x in job.student))
    assert work.weights(job.student) == 7_087_792
    assert job.keys == 4 * 128 and job.images == 4 * 3 * 224**2
    assert (job.batch, job.accumulate, job.precision) == (256, 1, "fp32")
    assert job.evaluated == 150_000 and job.every_eval == 25_020


def test_settings_that_change_what_is_sent(job):
    small = "student.arch=test_resnet", "teacher.arch=test_resnet", "student.kwargs={}"
    load = lambda *more: work.job(config.load(ROOT / "configs/mobv3.yaml", [*small, *more]))
    assert load("bn.shuffle=load").images == 0
    assert load("engine.precision=bf16").images == job.images / 2
    assert load("teacher.cache=replay").teacher == []
    swav = work.job(config.load(ROOT / "configs/swav/mobv3.yaml", ["student.arch=test_resnet"]))
    assert swav.ema == [] and swav.small == [2 * 4 * 3000] * 3 and swav.images == 0
    seed = work.job(config.load(ROOT / "configs/seed/r18_r50.yaml", ["teacher.arch=test_resnet"]))
    assert seed.ema == [] and seed.keys == 4 * 128 and seed.images == 0


# ---- devices


def test_a_peak_bounds_each_layer_by_operations_or_by_traffic():
    peak = Peak({"fp32": 1e12, "fp16": 2e12, "bf16": 2e12}, 1e9, 0.5, 0.5, 0.0, 0.0)
    # 1 s of operations at half of 1e12; 8 s of 4-byte numbers at half of 1e9.
    net = [Work(0.5e12, 0.0, 0, False), Work(0.0, 1e9, 0, False)]
    parts = peak.parts(small_job(student=net), 1)
    assert parts.forward == pytest.approx(1 + 8)
    # The last layer comes first, and a backward takes twice a forward.
    assert [x.seconds for x in parts.backward] == pytest.approx([16, 2])
    assert peak.parts(small_job(student=net), 3).forward == pytest.approx(27)


def test_launches_bound_a_step_of_few_images():
    peak = Peak({"fp32": 1e12, "fp16": 1e12, "bf16": 1e12}, 1e12, 1.0, 1.0, 1.0, 0.25)
    net = [Work(1e9, 0.0, 0, False)] * 10
    found = peak.parts(small_job(student=net, teacher=net), 1)
    assert found.forward == pytest.approx(10.0) and found.teacher == pytest.approx(2.5)


def test_two_batches_tell_a_fixed_part():
    assert devices.line({8: 3.0, 32: 9.0}) == pytest.approx((1.0, 0.25))
    assert devices.line({8: 4.0}) == pytest.approx((0.0, 0.5))
    # Noise that would make it negative.
    assert devices.line({8: 1.0, 32: 9.0}) == pytest.approx((0.0, 9 / 32))


def test_a_measured_device_is_for_its_own_networks(tmp_path):
    cfg = config.load(ROOT / "configs/mobv3.yaml")
    about = dict(student="mobilenetv3_large_100", teacher="resnet50", precision="fp32")
    parts = ("teacher", "student", "ema", "loss", "optimizer")
    details = {b: about | {"rates": dict.fromkeys(parts, 100.0)} for b in ("256", "1024")}
    file = tmp_path / "throughput-gpu.json"
    file.write_text(json.dumps(dict(bench="throughput", ranks=1, details=details)))
    job = work.job(cfg)
    found = devices.from_throughput(file, cfg).parts(job, 512)
    assert found.teacher == pytest.approx(5.12) and found.forward == pytest.approx(5.12 / 3)
    assert sum(x.seconds for x in found.backward) == pytest.approx(5.12 * 2 / 3)
    other = config.load(ROOT / "configs/mobv3.yaml", ["teacher.arch=resnet18"])
    with pytest.raises(UserError, match="measured teacher resnet50, but the configuration has"):
        devices.from_throughput(file, other)
    file.write_text(json.dumps(dict(bench="throughput", ranks=8, details=details)))
    with pytest.raises(UserError, match="on one device"):
        devices.from_throughput(file, cfg)


# ---- the step


def small_job(**changes):
    one = [Work(1.0, 0.0, 0, False)]
    job = work.Job(
        student=one, ema=[], teacher=[], precision="fp32", teacher_precision="fp16", batch=64,
        accumulate=1, bucket=1e9, overlap=True, loss=0.0, optimizer=0.0, keys=0.0, images=0.0,
        small=[], every_save=1, saved=0.0, every_eval=0, evaluated=0,
    )  # fmt: skip
    return job._replace(**changes)


def device(**image):
    """Seconds for each image of each part."""
    parts = dict.fromkeys(ranks.PARTS, 0.0)
    return Measured(parts, parts | image)


def around(**changes):
    made = Machine("x", link(), 0.0, FREE, FREE, FREE, 0.0, graphs=False, busy=0.0)
    return made._replace(**changes)


def test_without_links_n_devices_are_n_times_as_fast():
    job, fast = small_job(), device(student=0.3)
    one = predict(job, fast, around(), 1)
    assert one.seconds == pytest.approx(64 * 0.3) and one.rate == pytest.approx(1 / 0.3)
    for n in (2, 16):
        assert predict(job, fast, around(), n).rate == pytest.approx(n / 0.3, rel=1e-3)


def test_each_part_by_itself():
    one = predict(small_job(saved=50.0, every_save=5), device(), around(write=2.0), 1)
    assert one.checkpoint == pytest.approx(5.0) == one.seconds
    look = small_job(evaluated=640, every_eval=10)
    # A third of the student's seconds is its forward.
    found = predict(look, device(student=0.3), around(), 4)
    assert found.evaluation == pytest.approx(640 * 0.1 / 4 / 10)
    wait = predict(small_job(), device(student=0.1), around(loader=4.0), 1)
    assert wait.data == pytest.approx(64 / 4 - 6.4) and wait.seconds == pytest.approx(16.0)
    # The storage is all nodes', the loader each node's.
    two = around(loader=4.0, link=link(per_node=1))
    assert predict(small_job(), device(), two, 2).data == pytest.approx(8.0)
    assert predict(small_job(), device(), around(read=2.0, image=1.0), 2).data == pytest.approx(32)
    slow = predict(small_job(), device(student=0.1), around(spread=0.1), 2)
    assert slow.stragglers == pytest.approx(3.2 * 0.1 / math.sqrt(math.pi), rel=1e-2)


def test_images_and_keys_are_sent_beside_what_hides_them():
    quiet = around(link=link(ring=Steps(0.0, 0.0, 0.0)))
    job = small_job(images=1e9, keys=1e9, teacher=[Work(1.0, 0.0, 0, False)])
    # Each of two ranks gets 32 images of 1 s.
    plain = predict(job, device(teacher=0.25, student=0.3), quiet, 2)
    assert plain.shuffle == pytest.approx(32) and plain.gather == pytest.approx(32 - 32 * 0.1)
    graphs = predict(job, device(teacher=0.25, student=0.3), quiet._replace(graphs=True), 2)
    assert graphs.shuffle == pytest.approx(32 - 32 * 0.25) and graphs.gather == pytest.approx(32)
    busy = predict(job, device(teacher=0.25, student=9.0), quiet._replace(busy=1.0), 2)
    assert busy.gather == pytest.approx(32)


def test_accumulation_sends_gradients_once_a_step():
    net = [Work(1.0, 0.0, 25 * 10**7, False)]
    quiet = around(link=link(ring=Steps(0.0, 0.0, 0.0)))
    for accumulate in (1, 4):
        job = small_job(student=net, accumulate=accumulate)
        # 1 GB in one bucket, which is there at the end of the backward.
        assert predict(job, device(student=0.1), quiet, 2).exchange == pytest.approx(1.0)


# ---- the curve


def test_where_a_curve_stops_and_why():
    steps = {n: small_step(64, compute=64.0 / n) for n in (1, 2, 4)}
    assert curve.limit(steps) == (4, steps[4], "batch")
    # Two thirds of eight times one, then four ninths of sixteen times one.
    steps[8] = small_step(64, compute=8.0, shuffle=4.0)
    steps[16] = small_step(64, compute=4.0, shuffle=5.0)
    assert curve.limit(steps)[::2] == (8, "shuffle")
    # Slow at 8, but not at 16: as where a node's cores are the limit.
    steps[8] = small_step(64, compute=8.0, data=9.0)
    steps[16] = small_step(64, compute=4.0, data=3.0)
    assert curve.limit(steps)[::2] == (16, "batch")
    every = {n: small_step(64, compute=64.0 / n) for n in curve.COUNTS}
    assert curve.limit(every)[::2] == (1024, "")
    assert set(curve.REMEDY) == {*curve.Step._fields[1:], "batch"}


def small_step(images, **parts):
    return curve.Step(**dict.fromkeys(curve.Step._fields, 0.0) | dict(images=images) | parts)


def test_each_remedy_removes_what_it_is_for(job):
    changed = curve.remedies(job)
    assert changed["bn.shuffle=load"].images == 0
    assert changed["teacher.cache=replay"].teacher == []
    assert changed["data.batch=8192"].batch == 8192
    device, machine = devices.published("a100", 180.0)
    plain, large = (
        curve.limit(curve.curve(j, device, machine)) for j in (job, changed["data.batch=8192"])
    )
    assert large.count > plain.count and large.step.rate > 2 * plain.step.rate


def test_the_command_prints_a_curve_and_says_that_it_is_a_model(capsys):
    assert scale.main(["--machine", "a100", "--config", str(ROOT / "configs/moco/r18.yaml")]) == 0
    said = capsys.readouterr().out
    assert "model, not measured" in said and "--device FILE" in said and "bn.shuffle=load" in said
    assert "Scaling pays up to" in said


def test_pictures_say_that_they_show_a_model():
    one = dict(batch=256, ips={"1": 10, "2": 20}, count=2, reason="batch")
    found = one | dict(changes={"data.batch=8192": one})
    made = pictures.drawings(dict(curves={"mobv3": {"a100": found, "h100": found}}))
    assert set(made) == {"shipped", "changes"}
    assert all("A model, not measured" in figure._suptitle.get_text() for figure in made.values())


# ---- the CPU ranks


def test_ranks_that_do_as_the_model_says_are_predicted(job):
    """Made-up processes: two cores, so that four ranks take twice as long; a link of 1 GB/s and
    1 ms; no noise."""
    parts = dict(teacher=0.2, student=0.6, ema=0.1, loss=0.05, optimizer=0.01)
    step = sum(parts.values())
    beside = {1: [[step] * 3], 2: [[step] * 3] * 2, 4: [[2 * step] * 3] * 4}
    small, large = 2 * 1e-3, 2 * 1e-3 + ranks.LARGE / 1e9
    seen = ranks.Round(parts, beside, {ranks.SMALL: small, ranks.LARGE: large}, {})
    job = job._replace(keys=0.0, images=0.0, every_eval=0)
    size = 4 * work.weights(job.student)
    for n, slower in ((1, 1.0), (2, 1.0), (4, 2.0)):
        found = ranks.predicted(job, 8, n, 2, seen)
        assert found.compute == pytest.approx(slower * step)
        assert found.stragglers == pytest.approx(0.0, abs=1e-9)
        # Cores that send do not compute: nothing is hidden.  Buckets of at most 8 MiB.
        through = 2 * (n - 1) / n * size / 1e9
        least, most = (through + 2 * (n - 1) * 1e-3 * count for count in (4, 6))
        assert slower * least <= found.exchange * 1.001 and found.exchange <= slower * most * 1.001
        assert found.seconds == pytest.approx(slower * step + found.exchange)
