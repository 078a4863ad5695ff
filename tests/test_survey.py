import sys

import pytest
import torch

from steer_optim import measure
from steer_optim.survey import Survey, survey


def make_model():
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2).double()


def batches(n=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 3, dtype=torch.float64, generator=generator) for _ in range(n)]


def losses_of(model):
    def losses(batch):
        first, second = model(batch).unbind(-1)
        return {"side": (second - first).mean(), "main": (first - second).mean() + 3 * first.square().mean()}

    return losses


def test_the_numbers_are_those_of_measure():
    model = make_model()
    found = survey(losses_of(model), batches(), iter(model.parameters()))
    geometries = [measure(losses_of(model)(batch), model.parameters()) for batch in batches()]
    angles = torch.stack([geometry.angle("main", "side") for geometry in geometries])
    assert found.batches == 4
    assert found.angles == {
        ("main", "side"): pytest.approx((angles.mean().item(), angles.std(correction=0).item()), rel=1e-12)
    }
    assert found.conflicts == {("main", "side"): (angles > 90).double().mean()}
    norms = torch.stack([geometry.norms for geometry in geometries]).mean(0)
    assert found.norms == pytest.approx(dict(zip(("side", "main"), norms.tolist(), strict=True)), rel=1e-12)
    assert all(p.grad is None for p in model.parameters())


def test_a_zero_or_absent_gradient_counts_for_no_pair():
    x = torch.tensor([1.0, 1.0], requires_grad=True)
    given = [
        {"a": x[0], "b": -x[0]},
        {"a": x[0], "b": None},
        {"a": x[0], "b": 0 * x[1]},
        {"a": 3 * x[0]},
    ]
    found = survey(lambda losses: losses, given, [x])
    assert found == Survey(4, {("a", "b"): (180.0, 0.0)}, {("a", "b"): 1.0}, {"a": 1.5, "b": 1.0})


def test_reads_at_most_so_many_batches():
    model = make_model()
    endless = iter(lambda: torch.ones(5, 3, dtype=torch.float64), None)
    assert survey(losses_of(model), endless, model.parameters(), most=3).batches == 3
    with pytest.raises(ValueError, match="no batches"):
        survey(losses_of(model), [], model.parameters())


def test_a_gradient_that_is_not_finite_is_named():
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match=r"batch 1 is not finite: the norms are \{'a': nan, 'b': 1.0\}"):
        survey(lambda factor: {"a": x[0] * factor, "b": x[1]}, [1.0, float("nan")], [x])


def test_works_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    model = make_model()
    assert survey(losses_of(model), batches(), model.parameters()).batches == 4


@pytest.mark.parametrize(
    ("conflict", "norms", "advice"),
    [
        (0.1, {"a": 1.0, "b": 2.0}, "There is nothing to resolve: use Sum()"),
        (0.2, {"a": 1.0, "b": 2.0}, "If one loss is what you train for: Steer("),
        (1.0, {"a": 1.0, "b": 100.0}, "'b' is the update, whatever the rule: weigh the losses first"),
        (0.0, {"a": 1.0, "b": 0.0}, "'b' had no gradient in any batch"),
    ],
)
def test_advice_is_that_of_the_table(conflict, norms, advice):
    found = Survey(10, {("a", "b"): (80.0, 20.0)}, {("a", "b"): conflict}, norms)
    first, second, last = str(found).splitlines()
    assert first == f"'a' and 'b' are 80 ± 20 degrees apart, and conflict in {conflict:.0%} of the batches."
    assert second.startswith(f"The norms are 'a' 1, 'b' {norms['b']:.3g}: the largest is {found.ratio:.3g} times")
    assert last.startswith(advice)


def test_gradients_that_nearly_oppose_leave_no_place_for_pcd():
    advice = {
        angle: Survey(1, {("a", "b"): (angle, 0.0)}, {("a", "b"): 1.0}, {"a": 1.0, "b": 1.0}).advice
        for angle in (160.0, 175.0)
    }
    assert ["PCD" in text for text in advice.values()] == [True, False]


def test_components_that_never_meet():
    x = torch.ones(2, requires_grad=True)
    assert "larger batches" in survey(lambda losses: losses, [{"a": x[0]}, {"b": x[1]}], [x]).advice
    alone = survey(lambda losses: losses, [{"a": x[0]}], [x])
    assert alone.ratio == 1
    assert alone.advice.startswith("There is a single component")
    assert len(str(alone).splitlines()) == 2
