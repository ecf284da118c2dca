"""What tests of training share: labels, a frozen base, gradients and their comparison."""

import torch


def labels_of(ids, mask):
    return torch.where(mask.bool(), ids, -100)


def dense_answers(model, ids):
    """Labels that the dense model predicts: every module that is skipped makes them less likely."""
    with torch.no_grad():
        return torch.cat([ids[:, :1], model(ids).logits.argmax(-1)[:, :-1]], 1)


def freeze_base(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mod_router" in name)
    return model.train()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(actual, expected, tolerance=1e-6):
    assert actual.keys() == expected.keys()
    for name in actual:
        scale = expected[name].abs().max().clamp(min=1e-3)
        assert (actual[name] - expected[name]).abs().max() <= tolerance * scale, name
