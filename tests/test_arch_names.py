"""Names of architectures that promise pretrained weights: refused, with what to write."""

import pytest
import timm

from fastdisco import models
from fastdisco.config import UserError


def message(arch, **kwargs):
    with pytest.raises(UserError) as e:
        models.backbone(arch, kwargs)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize(
    "arch, tag", [("resnet18.a1_in1k", "a1_in1k"), ("vit_small_patch16_224.dino", "dino")]
)
def test_a_tag_is_refused(arch, tag):
    assert timm.is_model(arch)
    text = message(arch)
    assert text.startswith(f"arch: the tag {tag} of {arch} means timm's pretrained weights")
    assert "never loaded" in text and text.endswith(f"; write {arch.split('.')[0]}")


def test_any_tag_is_refused():
    assert message("resnet18.nosuch").endswith("; write resnet18")
    assert message("resnet50w2.swav").endswith("; write resnet50w2")
    assert "did you mean" in message("resnet_18.a1_in1k")


@pytest.mark.parametrize("source", ["hf-hub", "hf_hub", "local-dir"])
def test_weights_from_elsewhere_are_refused(source):
    text = message(f"{source}:timm/resnet18.a1_in1k")
    assert f"{source}: means weights, which are never loaded" in text
    assert text.endswith("; write the name of the architecture alone, resnet18")
    assert message(f"{source}:/a/b").endswith("; write the name of the architecture alone")


@pytest.mark.parametrize("key", ["pretrained", "pretrained_cfg", "checkpoint_path"])
def test_arguments_that_promise_weights_are_refused(key):
    text = message("resnet18", **{key: "x"})
    assert f"kwargs: {key} of resnet18 is not for you to set" in text


def test_no_name_of_timm_has_a_dot_or_a_colon():
    assert not [name for name in timm.list_models() if "." in name or ":" in name]
