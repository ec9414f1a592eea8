"""Linear accuracy: a logistic regression on frozen features."""

import warnings
from collections.abc import Callable

import torch

from fastdisco import config, data


def linear(encode: Callable, cfg: config.Config, device: torch.device) -> float:
    """Test accuracy, 0 to 1, of a logistic regression on the frozen features of the training images
    under the evaluation's transform, without augmentation.

    encode  images [B,3,S,S] -> features [B,d]"""
    from sklearn.linear_model import LogisticRegression

    (x, y), (x_test, y_test) = (
        features(encode, data.listing(path, cfg.data.quarantine), cfg, device)
        for path in (cfg.data.train, cfg.data.val)
    )
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_test = (x - mean) / std, (x_test - mean) / std
    with warnings.catch_warnings():
        # It stops after max_iter, for all arms alike.
        warnings.simplefilter("ignore")
        fit = LogisticRegression(C=0.01, max_iter=100).fit(x.numpy(), y.numpy())
    return float(fit.score(x_test.numpy(), y_test.numpy()))


@torch.no_grad()
def features(
    encode: Callable, listing: data.Listing, cfg: config.Config, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [N,d], float32 on the CPU, and labels [N] of all images that count."""
    d, v = cfg.data, cfg.view
    sizes = d.eval_resize, d.eval_size, d.eval_batch
    batches = data.EvalLoader(listing, *sizes, d.threads, device, listing.kept, v.mean, v.std)
    pairs = [(encode(b.views[0]).float().cpu(), b.label.cpu()) for b in batches]
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
