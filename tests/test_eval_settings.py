"""What an evaluation is told: lists that make no sense are refused before any image is read."""

from pathlib import Path

import pytest

from fastdisco.common.errors import UserError
from fastdisco.evals import settings


@pytest.mark.parametrize(
    "override, why",
    [
        ("retrieve.k=[]", "retrieve.k: List should have at least 1 item"),
        ("retrieve.k=[1, 0]", "retrieve.k.1: Input should be greater than or equal to 1"),
        ("knn.k=[-1, 5]", "knn.k.0: Input should be greater than or equal to 1"),
        ("knn.k=[1.5]", "knn.k.0: "),
        ("knn.temp=[0]", "knn.temp.0: Input should be greater than 0"),
        ("knn.temp=[.inf]", "knn.temp.0: Input should be a finite number"),
        ("semi.shares=[0]", "semi.shares.0: Input should be greater than 0"),
        ("semi.shares=[10]", "semi.shares.0: Input should be less than or equal to 1"),
        ("probe.strengths=[-1]", "probe.strengths.0: "),
        ("probe.cs=[0]", "probe.cs.0: Input should be greater than 0"),
        ("probe.lrs=[]", "probe.lrs: "),
        ("probe.kinds=[]", "probe.kinds: "),
        ("linear.lrs=[-1]", "linear.lrs.0: Input should be greater than 0"),
        ("transfer.weight_decays=[-1]", "transfer.weight_decays.0: "),
        ("tsne.drawn=1", "tsne.drawn: "),
        ("tsne.method=pca", "tsne.method: "),
    ],
)
def test_what_makes_no_sense_is_refused(override, why):
    with pytest.raises(UserError) as e:
        settings.load([override])
    assert str(e.value).startswith(why)


def test_one_value_stands_for_a_list_of_it():
    counts = "knn.k=20", "knn.temp=0.1", "retrieve.k=5", "semi.shares=1", "linear.lrs=3"
    names = "probe.kinds=ridge", "semi.lists=1percent.txt", "tsne.classes=n01440764"
    found = settings.load([*counts, *names])
    assert found.knn.k == (20,) and found.knn.temp == (0.1,) and found.retrieve.k == (5,)
    assert found.semi.shares == (1.0,) and found.linear.lrs == (3.0,)
    assert found.semi.lists == (Path("1percent.txt"),) and found.probe.kinds == ("ridge",)
    assert found.tsne.classes == ("n01440764",)
    assert settings.load([]).knn.k is None
