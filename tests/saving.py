"""What the tests of checkpoints share."""

import copy

import numpy as np
import torch

from steer_optim import checkpoint


def bits(tensor):
    contiguous = torch.empty_like(tensor, memory_format=torch.contiguous_format).copy_(tensor)
    return contiguous.reshape(-1).view(torch.uint8).tolist()


def assert_identical(found, expected):
    """The same types all the way down, and the same bits."""
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert bits(found) == bits(expected)
    elif isinstance(expected, dict):
        assert [(type(key), key) for key in found] == [(type(key), key) for key in expected]
        for key in expected:
            assert_identical(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_identical(a, b)
    elif isinstance(expected, float):
        # NaN and -0.0 too; JSON has one NaN, whatever else its bits say
        assert np.float64(found).tobytes() == np.float64(expected).tobytes() or (
            found != found and expected != expected
        )
    else:
        assert found == expected


def snapshot(optimizer):
    return copy.deepcopy(optimizer.state_dict())


def trained(make=torch.optim.AdamW, steps=2, **options):
    """A small optimizer with state."""
    parameters = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(()))]
    optimizer = make(parameters, **options)
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return optimizer


def round_trip(tmp_path, extra):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    checkpoint.save(tmp_path / "x.safetensors", optimizer, extra={"value": extra})
    return checkpoint.load(tmp_path / "x.safetensors", optimizer)["value"]
