import pytest
import torch
from hidden_states import MASK, assert_same, dense, random_states, views_of
from torch.testing import assert_close

from steer_optim.vlm import DecomposedDistillation, Head, HiddenStates, sampled_log_probs
from steer_optim.vlm.topk import top_ids


def relative(found, meant):
    return float((found.double() - meant).norm() / meant.norm())


def correlated(scale, dtype, N=64, V=2000, d=32):
    """A student and a teacher that differ by ``scale``, in float64 what they are in ``dtype``."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, hidden = draw(V, d) * d**-0.5, [2 * draw(N, d) for _ in range(2)]
    heads = [Head(x.to(dtype).double()) for x in (weight, weight + scale * draw(V, d) * d**-0.5)]
    rows = [*hidden, *(x + scale * draw(N, d) for x in hidden)]
    return [HiddenStates(x.to(dtype).double()[None].requires_grad_(i < 2), heads[i // 2]) for i, x in enumerate(rows)]


def cast(states, dtype):
    head = {id(x.head): Head(x.head.weight_Vd.to(dtype)) for x in states}
    return [
        HiddenStates(x.hidden_BTd.detach().to(dtype).requires_grad_(x.hidden_BTd.requires_grad), head[id(x.head)])
        for x in states
    ]


# Divergences of 0.1, 1e-3 and 1e-5. Float32 logits of size 10 carry errors of 1e-6, beside differences of size `scale`.
REGIMES = [(0.3, 5e-6), (0.03, 2e-5), (0.003, 2e-4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "tolerance"), REGIMES)
def test_gradients_keep_their_accuracy_close_to_the_teacher(scale, tolerance, dtype):
    exact = correlated(scale, dtype)
    mask_BT, method = torch.ones(1, 64, dtype=torch.bool), DecomposedDistillation("vgs", lam=1.0, chunk_size=24)
    rounded = cast(exact, dtype)
    found, meant = method(views_of(rounded), mask_BT), method(views_of(dense(exact)), mask_BT)
    for name in meant:
        view = 1 if name == "lp" else 0
        x, y = (
            torch.autograd.grad(c[name], s[view].hidden_BTd, retain_graph=True)[0]
            for c, s in ((found, rounded), (meant, exact))
        )
        assert x.dtype == dtype
        # What comes back is rounded to half precision itself: by 2^-9 at most, 1.7e-3 on average.
        assert relative(x, y) < (tolerance if dtype == torch.float32 else 3e-3)
        assert_close(found[name].double(), meant[name], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("scaled", [1.0, 65536.0])
def test_a_gradient_scaler_lifts_what_float16_cannot_hold(scaled):
    exact = correlated(0.03, torch.float16)
    states, mask_BT = cast(exact, torch.float16), torch.ones(1, 64, dtype=torch.bool)
    method = DecomposedDistillation("standard", chunk_size=24)
    std = method(views_of(states), mask_BT, count=2.0**16)["std"] * scaled
    meant = method(views_of(dense(exact)), mask_BT, count=2.0**16)["std"] * scaled
    x, y = (torch.autograd.grad(c, s[0].hidden_BTd)[0] for c, s in ((std, states), (meant, exact)))
    assert relative(x, y) < 1e-3 if scaled > 1 else relative(x, y) > 0.1


def test_half_precision_heads_are_trained_in_it_and_add_up_in_float32():
    states = random_states(3, 4, 9, kind="everything", dtype=torch.bfloat16)
    wide = [HiddenStates(x.hidden_BTd.float(), x.head) for x in states]
    method = DecomposedDistillation("vgs", lam=0.5, chunk_size=1)
    with torch.autocast("cpu", torch.bfloat16):  # which would round the logits
        found = method(views_of(states), MASK)
    assert_same(found, method(views_of(dense(wide)), MASK), states, rtol=2**-7, atol=1e-3)
    assert all(x.dtype == torch.float32 for x in found.values())
    assert_close(found["std"], method(views_of(dense(wide)), MASK)["std"], rtol=1e-6, atol=0)


# Dynamo imports what is deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:torch._inductor")
def test_a_compiled_chunk_gives_the_same():
    exact = correlated(0.3, torch.float32, N=11, V=64, d=8)
    states = cast(exact, torch.float32)
    mask_BT = torch.ones(1, 11, dtype=torch.bool)
    method = DecomposedDistillation("vgs", lam=0.0, chunk_size=4, compile=True)  # the last chunk has one row of padding
    found, meant = method(views_of(states), mask_BT), method(views_of(dense(exact)), mask_BT)
    for name in meant:
        x, y = (
            torch.autograd.grad(c[name], s[0].hidden_BTd, retain_graph=True)[0]
            for c, s in ((found, states), (meant, exact))
        )
        assert relative(x, y) < 3e-5
        assert_close(found[name].double(), meant[name], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["plain", "everything"])
def test_autocast_rounds_no_logits_of_a_single_view(kind):
    student, *_ = random_states(3, 4, 50, d=64, kind=kind, dtype=torch.float32)
    response_BT = torch.arange(12).view(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = sampled_log_probs(student, response_BT, MASK), top_ids(student, None, MASK, k=5)
    meant = sampled_log_probs(student, response_BT, MASK), top_ids(student, None, MASK, k=5)
    assert found[0].equal(meant[0])
    assert found[1].equal(meant[1])
