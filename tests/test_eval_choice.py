"""Which setting of a probe a number, its interval and its predictions are of."""

import pytest
import torch
from made import made
from test_eval_command import a_run, evaluate

from fastdisco.evals import logistic, results, ridge

CLASSES = 6


@pytest.fixture(scope="module")
def run(textures, tmp_path_factory):
    return a_run(textures, tmp_path_factory.mktemp("runs"))


def sets(n=300):
    return made(n, CLASSES, 1), made(101, CLASSES, 3)


@pytest.mark.parametrize(
    "kind, values", [(ridge, (1e6, 1e-2, 1e4)), (logistic, (1e-6, 1e-1, 1e-5))]
)
def test_without_images_held_out_the_predictions_are_those_of_the_best(kind, values):
    train, val = sets()
    got, classes = kind.predict(train, None, val, CLASSES, values)
    name = kind.__name__.rpartition(".")[2]
    assert (classes == val.label).double().mean() == got[f"{name}_top1_best_on_val"]
    # Chosen on the images that are reported, and named so.
    setting = "ridge_strength" if kind is ridge else "logistic_c"
    assert got[f"{setting}_best_on_val"] == values[1] and setting not in got


def test_the_interval_of_a_probe_is_that_of_its_value(run, capsys, tmp_path):
    more = ["probe.held=0", "probe.epochs=2", "probe.strengths=[1e9, 0.001, 1e-6]"]
    values, _ = evaluate(capsys, "probe", run, f"--out={tmp_path}", *more)
    assert "eval/ridge_top1_selected" not in values
    found = results.read_all(tmp_path)
    names = {key for r in found for key in r.predictions}
    # The best epoch of SGD is not kept, so that its interval is of the last one's.
    assert names == {"ridge_top1_best_on_val", "logistic_top1_best_on_val", "sgd_top1_preset_last"}
    for r in found:
        for key, predicted in r.predictions.items():
            assert (predicted == r.labels).mean() == r.values[key], key
            low, high = r.intervals[key]
            assert low <= r.values[key] <= high


def test_a_penalty_of_0_is_least_squares_where_features_are_fewer_than_their_number():
    train, val = made(12, CLASSES, 1, width=40), made(50, CLASSES, 3, width=40)
    # A feature that never varies, as of a unit that is always off, and one twice.
    train.x[:, 3] = val.x[:, 3] = 0
    train.x[:, 5], val.x[:, 5] = train.x[:, 4], val.x[:, 4]
    w, b = ridge.solve(train, CLASSES).weights(0.0)
    x = train.x.double()
    y = torch.nn.functional.one_hot(train.label, CLASSES).double()
    want = torch.linalg.pinv(x - x.mean(0), rtol=1e-9) @ (y - y.mean(0))
    torch.testing.assert_close(w, want, atol=1e-8, rtol=0)
    torch.testing.assert_close(b, y.mean(0) - x.mean(0) @ want, atol=1e-8, rtol=0)
    assert ridge.run(train, None, val, CLASSES, [0.0])["ridge_top1_best_on_val"] > 0.2
