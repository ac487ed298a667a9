"""A skeleton takes no memory for its parameters, keeps what constructors compute, and knows what was not bound."""

import resource

import pytest
import torch

from anchortp_sglang.rank.weights.skeleton import Skeleton, placeholders


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(1 << 16, 1 << 16), requires_grad=False)
        self.bias = torch.nn.Parameter(torch.empty(size=(8,), dtype=torch.bfloat16), requires_grad=False)
        self.register_buffer("table", torch.arange(8.0).cos())
        self.workspace = torch.empty((4, 2))


def test_parameters_of_any_size_take_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Skeleton():
        layer = Layer()
    assert layer.weight.shape == (1 << 16, 1 << 16) and layer.bias.dtype == torch.bfloat16
    assert layer.weight.untyped_storage().nbytes() == 4
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
    assert torch.equal(layer.table, torch.arange(8.0).cos())


def test_what_is_bound_is_no_placeholder_any_more_and_what_is_not_is_named() -> None:
    with Skeleton():
        model = torch.nn.Sequential(Layer())
    model[0].weight.data = torch.zeros(3, 3)
    assert sorted(placeholders(model)) == ["0.bias", "0.workspace"]


def test_a_constructor_that_writes_values_to_a_parameter_is_stopped() -> None:
    with Skeleton(), pytest.raises(RuntimeError, match="single memory location"):
        torch.empty(3).copy_(torch.arange(3.0))


def test_outside_of_it_torch_is_as_it_was() -> None:
    with Skeleton():
        pass
    assert torch.empty(3).stride() == (1,)
