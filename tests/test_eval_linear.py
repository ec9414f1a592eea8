"""Linear evaluation: heads side by side against torch's own SGD, exact resume, and any number of
ranks."""

import numpy as np
import pytest
import torch
from conftest import ranks
from made import join, made, part

from fastdisco.common.errors import UserError
from fastdisco.evals import linear, steps
from fastdisco.evals.linear import Heads, Rate, Training
from fastdisco.evals.protocols import Protocol

P = Protocol(epochs=6, batch=32, lr=0.5, weight_decay=1e-3, milestones=(2, 4), factor=0.5)
RATES = (Rate(0.5, 1e-3), Rate(0.05, 0.0), Rate(2.0, 1e-2))
CLASSES = 5


def sets():
    return made(150, CLASSES, 1), made(40, CLASSES, 2), made(61, CLASSES, 3)


def trained(rates, seed=0, watch=lambda t: None, saved=None, cut=lambda f: f):
    train, held, val = map(cut, sets())
    t = Training(Heads(rates, 16, CLASSES, P, seed))
    if saved:
        t.load_state_dict(saved)
    t.run(steps.cached(train, P.batch, seed), val, held, watch)
    return t


def test_each_head_is_what_torch_trains_alone():
    together = trained(RATES).heads
    train = sets()[0]
    for g, rate in enumerate(RATES):
        layer = torch.nn.Linear(16, CLASSES)
        first = Heads(RATES, 16, CLASSES, P, 0)
        layer.weight.data, layer.bias.data = first.weight[g].clone(), first.bias[g].clone()
        sgd = torch.optim.SGD(
            layer.parameters(), lr=rate.lr, momentum=0.9, weight_decay=rate.weight_decay
        )
        for epoch in range(P.epochs):
            sgd.param_groups[0]["lr"] = rate.lr * 0.5 ** ((epoch >= 2) + (epoch >= 4))
            for step in steps.cached(train, P.batch, 0)(epoch, 0):
                loss = torch.nn.functional.cross_entropy(layer(step.x), step.label)
                sgd.zero_grad()
                loss.backward()
                sgd.step()
        torch.testing.assert_close(together.weight[g], layer.weight.data, atol=1e-5, rtol=0)
        torch.testing.assert_close(together.bias[g], layer.bias.data, atol=1e-5, rtol=0)
        alone = trained(RATES[g : g + 1]).heads
        torch.testing.assert_close(together.weight[g], alone.weight[0], atol=1e-5, rtol=0)
    assert (together.weight[0] - together.weight[1]).abs().max() > 0.01


def test_the_first_weights_are_normal_and_by_seed():
    a, b = (Heads(RATES, 400, 50, P, seed) for seed in (1, 2))
    assert a.weight[0].std() == pytest.approx(0.01, rel=0.02) and not a.bias.any()
    assert torch.equal(a.weight[0], a.weight[2]) and not torch.equal(a.weight, b.weight)


def test_accuracies_are_counts_of_logits_written_out():
    t, (_, _, val) = trained(RATES), sets()
    logits = np.einsum("nf,gcf->ngc", val.x, t.heads.weight) + t.heads.bias.numpy()
    best = np.argsort(-logits, axis=2)
    for g in range(len(RATES)):
        top1 = (best[:, g, 0] == val.label.numpy()).mean()
        assert t.curves["val"][-1][g] == top1 and 0.3 < top1 < 1
        assert t.curves["val_top5"][-1][g] == 1  # of five classes
    got = linear.predictions(t.heads, val, 1)
    assert got.tolist() == best[:, 1, 0].tolist()


def test_top5_counts_the_five_best():
    heads = Heads(RATES[:1], 9, 9, P, 0)
    heads.weight[0] = torch.eye(9)
    x = torch.arange(9.0).repeat(9, 1)  # class 8 scores most, class 0 least
    val = made(9, 9, 0, width=9)._replace(x=x, label=torch.arange(9))
    top1, top5 = linear.accuracies(heads, val)
    assert (top1.item(), top5.item()) == (pytest.approx(1 / 9), pytest.approx(5 / 9))
    heads.weight[0] = 0  # all alike: nobody has won
    assert linear.accuracies(heads, val)[1].item() == 0
    heads.weight[0] = torch.nan
    assert [a.item() for a in linear.accuracies(heads, val)] == [0, 0]


class Stopped(Exception):
    pass


def stopping(at):
    """A watch that keeps the state after so many calls and stops there."""
    kept = []

    def watch(t):
        at[0] -= 1
        if at[0] == 0:
            kept.append(torch_copy(t.state_dict()))
            raise Stopped

    return kept, watch


def torch_copy(state):
    import io

    f = io.BytesIO()
    torch.save(state, f)
    f.seek(0)
    return torch.load(f, weights_only=True)


def same(a, b):
    x, y = a.state_dict(), b.state_dict()
    assert x["position"] == y["position"] == (P.epochs, 0)
    assert torch.equal(x["weight"], y["weight"]) and torch.equal(x["bias"], y["bias"])
    assert all(torch.equal(u, v) for u, v in zip(x["velocity"], y["velocity"]))
    for key, curve in x["curves"].items():
        assert len(curve) == P.epochs and torch.equal(
            torch.stack(curve), torch.stack(y["curves"][key])
        )


@pytest.mark.parametrize("calls", [1, 7, 6, 18])  # 5 steps and the end of an epoch make 6
def test_a_resumed_evaluation_ends_the_same(calls):
    kept, watch = stopping([calls])
    with pytest.raises(Stopped):
        trained(RATES, watch=watch)
    same(trained(RATES), trained(RATES, saved=kept[0]))


def on_a_rank():
    join()
    return resumed()


def resumed():
    whole = trained(RATES, cut=part)
    kept, watch = stopping([9])
    try:
        trained(RATES, watch=watch, cut=part)
    except Stopped:
        same(whole, trained(RATES, saved=kept[0], cut=part))
    found = whole.heads.weight, whole.heads.bias, torch.stack(whole.curves["val"])
    return [x.numpy() for x in found]


def test_two_ranks_resume_exactly_and_find_what_one_finds():
    one, two = resumed(), ranks(2, on_a_rank)
    assert all(np.array_equal(a, b) for a, b in zip(*two))
    for a, b in zip(one, two[0]):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=0)


def test_what_the_report_says():
    t = trained(RATES)
    got, at = linear.report(t)
    held, val = t.curves["held"][-1], torch.stack(t.curves["val"])
    assert at == int(held.argmax())
    assert got["linear_top1_selected"] == val[-1, at]
    assert got["linear_top1_held_out"] == held[at]
    assert got["linear_top1_preset_last"] == val[-1, 0]
    assert got["linear_top1_preset_best_on_val"] == val[:, 0].max()
    assert got["linear_top1_best_on_val"] == val.max()
    assert (got["linear_lr_selected"], got["linear_weight_decay_selected"]) == RATES[at]


def test_without_images_held_out_nothing_is_selected():
    train, _, val = sets()
    got = linear.run(steps.cached(train, 32, 0), val, None, CLASSES, P)
    assert "linear_top1_selected" not in got
    assert got["linear_top1_preset_last"] > 0.3


def test_a_head_that_diverges_is_counted_and_never_chosen():
    train, held, val = sets()
    big = train._replace(x=train.x * 1e18)
    source = steps.cached(big, 32, 0)
    rates = (Rate(1e20, 0.0), Rate(1e-38, 0.0))
    p = P.model_copy(update={"lr": 1e20, "epochs": 2})
    got = linear.run(source, val, held, CLASSES, p, rates)
    assert got["linear_diverged_heads"] == 1 and got["linear_top1_preset_last"] == 0
    assert got["linear_lr_selected"] == 1e-38
    with pytest.raises(UserError, match="every learning rate diverged"):
        linear.run(source, val, held, CLASSES, p, rates[:1])


def test_a_saved_evaluation_of_other_rates_is_refused():
    state = trained(RATES).state_dict()
    with pytest.raises(UserError, match="saved evaluation has rates"):
        trained(RATES[:2], saved=state)


def test_the_grid_begins_with_the_protocols_own():
    assert linear.grid(P) == (Rate(0.5, 1e-3),)
    assert linear.grid(P, [0.1, 0.5], [0.0, 1e-3]) == (
        Rate(0.5, 1e-3),
        Rate(0.1, 0.0),
        Rate(0.5, 0.0),
        Rate(0.1, 1e-3),
    )


def test_every_image_comes_once_an_epoch_in_another_order():
    train = sets()[0]
    source = steps.cached(train, 32, 0)
    epochs = [torch.cat([s.x[:, 0] for s in source(e, 0)]) for e in range(2)]
    for e in epochs:
        assert torch.equal(e.sort().values, train.x[:, 0].sort().values)
    assert not torch.equal(*epochs)
    assert [s.images for s in source(0, 0)] == [32, 32, 32, 32, 22]
    assert torch.equal(torch.cat([s.x[:, 0] for s in source(0, 3)]), epochs[0][96:])
