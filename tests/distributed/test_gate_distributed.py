"""The gate and the count over several processes: neither may depend on how an optimizer step was split."""

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from launcher import processes
from torch import nn
from training import assert_same_bits, whole

from steer_optim import SteeredOptimizer
from steer_optim.vlm import DecomposedDistillation, adaptive_strength, visual_dependency, visual_tokens

# Few distinct values, so that ties, zeros and scores that rounding made negative are the rule. The smallest is
# subnormal, and the last two are equal in float32.
SCORES = st.sampled_from([-1e-7, -0.0, 0.0, 5e-324, 1e-30, 0.25, 0.5, 1.0, 1.0 + 2**-50])
TOKENS = st.lists(st.tuples(SCORES, st.booleans()), max_size=30)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])


def shares(tensor, cuts):
    """The contiguous parts of all processes; some may be empty."""
    return tensor.tensor_split(sorted(cuts))


def assert_split(select, vds, mask, cuts, group=None):
    """Each process selects its part of what one selects; all see a failure of any."""
    group = group or dist.group.WORLD
    own = dist.get_rank(group)
    found = select(shares(vds, cuts)[own], shares(mask, cuts)[own], group=group)
    same = torch.tensor(int(found.equal(shares(select(vds, mask), cuts)[own])))
    dist.all_reduce(same, dist.ReduceOp.MIN, group=group)
    assert same, (vds, mask, cuts)


def check_any_split():
    # Derandomized, every process draws the same examples, and runs its share of each.
    @settings(derandomize=True, deadline=None, database=None, max_examples=50)
    @given(TOKENS, DTYPES, st.integers(1, 99), st.lists(st.integers(0, 30), min_size=2, max_size=2))
    @example([(1.0, True), (1.0 + 2**-50, True)], torch.float64, 50, [1, 1])
    def check(tokens, dtype, percent, cuts):
        vds = torch.tensor([score if kept else math.nan for score, kept in tokens], dtype=dtype)
        mask = torch.tensor([kept for _, kept in tokens], dtype=torch.bool)

        def select(*args, **options):
            return visual_tokens(*args, quantile=percent / 100, **options)

        assert_split(select, vds, mask, cuts[: dist.get_world_size() - 1])

    check()


@processes(2)
def test_two_processes_select_what_one_does():
    check_any_split()


@processes(3)
def test_three_processes_select_what_one_does():
    check_any_split()


@processes(3)
def test_many_tokens():
    torch.manual_seed(0)
    vds = torch.randn(50_000).exp()
    for scores in (vds, vds.round(decimals=1), torch.ones_like(vds), torch.zeros_like(vds)):
        for select in (visual_tokens, adaptive_strength):
            assert_split(select, scores, scores < 5, [20_000, 20_000])


@processes(3)
def test_a_group_of_some_processes():
    group = dist.new_group([1, 2])  # where ranks are not those of the world
    if dist.get_rank() > 0:
        assert_split(visual_tokens, torch.ones(9), torch.ones(9, dtype=torch.bool), [5], group)


@processes(2)
def test_a_nan_anywhere_is_an_error_everywhere():
    vds, mask = torch.ones(3), torch.ones(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="found NaN"):
        visual_tokens(vds if dist.get_rank() else vds * math.nan, mask, group=dist.group.WORLD)
    assert visual_tokens(vds, mask, quantile=0.5, group=dist.group.WORLD).sum() == (0 if dist.get_rank() else 3)


# A whole step: gate, count and steering.

VIEWS = ("student", "student_text", "teacher", "teacher_text")
METHODS = {
    "vgs": DecomposedDistillation("vgs", lam=1.0),
    "sequence": DecomposedDistillation("vgs", lam=1.0, reduction="sequence"),
    "adaptive": DecomposedDistillation("exact", adaptive=True),
    "language": DecomposedDistillation("language", lam=1.0),
}


def micro_batches():
    """Inputs and the teacher's logits of both views, and the mask, of four micro-batches, one without a token."""
    torch.manual_seed(1)
    for lengths in ([3, 1], [0, 0], [2, 4], [1, 0]):
        x_BTD, teacher_BTV = torch.randn(2, 2, 4, 5).double(), 3 * torch.randn(2, 2, 4, 7).double()
        yield x_BTD, teacher_BTV, torch.arange(4) < torch.tensor(lengths)[:, None]


def train(method, batches, group=None):
    """Two steps over the micro-batches of this process: the model and its gate, split as the batches are."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 7)).double()
    inner = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    optimizer = SteeredOptimizer(inner, method.rule(), data_parallel=group or False)
    vds = torch.cat([visual_dependency(*teacher, mask) for _, teacher, mask in batches])
    masks = torch.cat([mask for *_, mask in batches])
    gates = visual_tokens(vds, masks, quantile=method.quantile, group=group).split(2)
    strengths = adaptive_strength(vds, masks, group=group).split(2) if method.adaptive else [None] * len(gates)
    count = method.count(masks)
    if group:
        dist.all_reduce(count, group=group)
        count = count / dist.get_world_size(group)
    for _ in range(2):
        optimizer.zero_grad()
        for i, ((x, teacher, mask), gate, strength) in enumerate(zip(batches, gates, strengths, strict=True)):
            views = dict(zip(VIEWS, (*model(x), *teacher), strict=True))
            losses = method(views, mask, count=count, gate_BT=gate, strength_BT=strength)
            optimizer.backward_components(losses, accumulate=i < len(batches) - 1)
        optimizer.step()
    return model, gates


def check_a_step():
    batches = list(micro_batches())
    own = torch.arange(len(batches)).chunk(dist.get_world_size())[dist.get_rank()].tolist()
    for method in METHODS.values():
        alone, expected = train(method, batches)
        model, gates = train(method, [batches[i] for i in own], dist.group.WORLD)
        assert all(gate.equal(expected[i]) for i, gate in zip(own, gates, strict=True))
        # Sums of a few tokens in another order: some roundings of updates of order one.
        torch.testing.assert_close(whole(model.parameters()), whole(alone.parameters()), rtol=0, atol=1e-14)
        assert_same_bits(whole(model.parameters()))


@processes(2)
def test_a_step_of_two_processes_is_that_of_one():
    check_a_step()


@processes(4)
def test_a_step_of_four_processes_is_that_of_one():
    check_a_step()
