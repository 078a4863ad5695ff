import dataclasses
import math

import pytest
import torch
from hidden_states import assert_same, random_states, views_of
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from steer_optim import Sum
from steer_optim.vlm import Component, DecomposedDistillation, Decomposition, Term, token_losses, visual_dependency
from steer_optim.vlm.divergences import TERMS
from steer_optim.vlm.topk import TAIL_FLOOR, TopLogProbs, intersect, top_ids
from steer_optim.vlm.topk import collapse as collapse_log_probs

# Sums of a few dozen float64 terms of size up to 10: some 100 units of 2e-16 each.
EXACT = {"rtol": 1e-13, "atol": 1e-13}
LOSSES = ("std", "vis", "lang", "vp", "vds")
ATTACHED = {
    name: dataclasses.replace(TERMS[name], attached=("prior",) if "prior" in TERMS[name].target else ())
    for name in LOSSES
}


def collapse(logits, ids):
    return collapse_log_probs(logits.log_softmax(-1), ids)


def with_tail(log_probs, ids):
    return TopLogProbs(ids, log_probs).bins()


def with_slots(logits, ids):
    return TopLogProbs(ids, logits.log_softmax(-1).gather(-1, ids.clamp(min=0)))


@st.composite
def collapsible(draw, rows=None, full=False):
    """Logits of four distributions, ``(N, V)``, float64, and ids ``(N, k)`` with some slots empty."""
    rows = draw(st.integers(0, 4)) if rows is None else rows
    vocabulary = draw(st.integers(1, 12))
    k = vocabulary if full else draw(st.integers(1, vocabulary))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([0.1, 2.0, 10.0]))
    logits = scale * torch.randn(4, rows, vocabulary, generator=generator, dtype=torch.float64)
    ids = torch.rand(rows, vocabulary, generator=generator).argsort(-1)[:, :k]
    if not full:
        ids = ids.masked_fill(torch.rand(rows, k, generator=generator) < draw(st.sampled_from([0.0, 0.4])), -1)
    return logits, ids


def student_views(logits):
    return [x.clone().requires_grad_() for x in logits[:2]]


def definition(logits, ids):
    """The probabilities of the ids and the rest, by a matrix that adds up the entries of each bin."""
    bins = torch.nn.functional.one_hot(ids.clamp(min=0), logits.shape[-1]) * (ids >= 0).unsqueeze(-1)
    bins = torch.cat([bins, 1 - bins.sum(-2, keepdim=True)], dim=-2).to(logits.dtype)
    return (bins @ logits.softmax(-1).unsqueeze(-1)).squeeze(-1)


def collapsed_losses(logits, student, ids):
    """All four are collapsed, as logits of a small vocabulary."""
    return token_losses(views_of([collapse(x, ids) for x in (*student, *logits[2:])]), terms=ATTACHED)


@given(collapsible())
def test_the_bins_hold_the_mass_of_their_entries(case):
    logits, ids = case
    for x in logits:
        assert_close(collapse(x, ids).exp(), definition(x, ids), **EXACT)


@given(collapsible(), st.integers(0, 99))
def test_gradients_are_those_of_the_definition(case, seed):
    logits, ids = case
    (student, _), expected = student_views(logits), logits[0].clone().requires_grad_()
    held = definition(expected, ids)
    weights = torch.randn(held.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # What weighs nothing has no logarithm to differentiate.
    (held.masked_fill(held == 0, 1.0).log() * weights).sum().backward()
    (collapse(student, ids) * weights).sum().backward()
    # The definition's tail is a sum of probabilities, as rounded as the largest of them: 1e-16 over its mass.
    assert_close(student.grad, expected.grad, rtol=1e-9, atol=1e-9)


def test_gradcheck():
    ids = torch.tensor([[4, 1, -1], [0, -1, -1], [2, 5, 3]])
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: collapse(x, ids), (logits,))


@given(collapsible(full=True))
def test_all_ids_give_the_full_losses(case):
    logits, ids = case
    student, full = student_views(logits), student_views(logits)
    actual = collapsed_losses(logits, student, ids)
    expected = token_losses(views_of([*full, *logits[2:]]), terms=ATTACHED)
    for name in LOSSES:
        assert_close(actual[name], expected[name], rtol=1e-12, atol=1e-12)
    for name in LOSSES[:-1]:
        found, meant = (
            torch.autograd.grad(losses[name].sum(), views, retain_graph=True, materialize_grads=True)
            for losses, views in ((actual, student), (expected, full))
        )
        assert_close(found, meant, rtol=1e-12, atol=1e-12)


@given(collapsible())
def test_a_collapsed_divergence_is_not_above_the_full_one(case):
    logits, ids = case
    few, full = collapsed_losses(logits, logits[:2], ids), token_losses(views_of(logits))
    for name in ("std", "lang", "vds"):  # vis and vp are not bound by it: the collapsed q* is a target of its own
        assert (few[name] <= full[name] + 1e-13).all(), name
        assert (few[name] >= -1e-14).all(), name


@given(collapsible(), st.integers(0, 99))
def test_the_order_of_the_ids_changes_nothing(case, seed):
    logits, ids = case
    order = torch.randperm(ids.shape[-1], generator=torch.Generator().manual_seed(seed))
    gradients = []
    for permuted in (ids, ids[:, order]):
        student = student_views(logits)
        losses = collapsed_losses(logits, student, permuted)
        gradients.append(torch.autograd.grad((losses["std"] + 2 * losses["vis"] + losses["lang"]).sum(), student))
    assert_close(*gradients, rtol=1e-12, atol=1e-12)


@given(collapsible())
def test_a_server_and_the_teachers_logits_give_the_same_bins(case):
    logits, ids = case
    log_probs = logits.log_softmax(-1)
    for x, log_p in zip(logits, log_probs, strict=True):
        sent = log_p.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, math.nan)
        found, meant = with_tail(sent, ids).exp(), definition(x, ids)
        assert_close(found, meant, rtol=1e-6, atol=2 * TAIL_FLOOR)
        enough = meant[:, -1] > TAIL_FLOOR * 1.01
        assert_close(found[enough], meant[enough], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("largest", [-1e-3, -1e-6, -1e-8])
def test_the_tail_is_precise_beside_a_certain_id(largest):
    """In float32 a difference of probabilities would be off by 6e-8."""
    sent = torch.tensor([largest, math.log(-math.expm1(largest) / 2)], dtype=torch.float32)
    found = with_tail(sent, torch.tensor([3, 1]))[-1].exp().item()
    exact = -math.expm1(sent[0].item()) - math.exp(sent[1].item())
    assert found == pytest.approx(max(exact, TAIL_FLOOR), rel=1e-6)


@pytest.mark.parametrize("excess", [0.0, 1e-7, 5e-3])
def test_a_tail_of_nothing_or_less_is_finite_and_still_teaches(excess):
    ids = torch.tensor([[2, 0]])
    sent = TopLogProbs(ids, torch.tensor([[0.6, 0.4]]).log() + math.log1p(excess))
    assert_close(sent.bins().exp(), torch.tensor([[0.6, 0.4, TAIL_FLOOR]]), rtol=1e-6, atol=1e-7)
    student = torch.zeros(1, 5, requires_grad=True)
    losses = token_losses(views_of([student, student, sent, sent]))
    losses["std"].sum().backward()
    assert losses["std"].isfinite()
    assert (student.grad[0, ids[0]] < 0).all()
    assert (student.grad[0, [1, 3, 4]] > 0.1).all()


def test_a_tiny_tail_of_the_student_has_its_gradient():
    student = torch.tensor([[0.0, -200.0, -201.0, -1.0]], requires_grad=True)
    tail = collapse(student, torch.tensor([[3, 0]]))[0, -1]
    assert tail.item() == pytest.approx(-200, rel=1e-6)
    tail.backward()
    much, little = torch.tensor([0.0, -1.0]).softmax(0)  # within the ids, and within the tail
    assert_close(student.grad[0], torch.stack([-much, much, little, -little]), rtol=1e-5, atol=0.0)


def test_the_target_puts_no_mass_on_empty_slots():
    generator = torch.Generator().manual_seed(0)
    logits = 30 * torch.randn(4, 50, 6, generator=generator)
    ids = torch.rand(50, 6, generator=generator).argsort(-1)[:, :4]
    padded = ids.masked_fill(torch.tensor([False, True, False, True]), -1)
    for floor in (None, 1e-3):
        losses = [
            token_losses(views_of([collapse(x, kept) for x in logits]), terms=ATTACHED, floor=floor)
            for kept in (padded, ids[:, [0, 2]])
        ]
        for name in LOSSES:
            # The largest divergence is about 100, and 30 units of 6e-8 of it are rounding.
            assert_close(*(x[name] for x in losses), rtol=0.0, atol=2e-4, msg=name)


GAIN = [
    (Term("student", {"teacher": 1.0, "teacher_text": -1.0}), None),  # the teacher's visual gain alone
    (Term("student", {"teacher": -0.5}, divergence="forward"), None),
    (
        Term("student", {"teacher": 1.0, "teacher_text": 0.5}, divergence="jsd", floored=("teacher", "teacher_text")),
        0.1,
    ),
]


@pytest.mark.parametrize(("term", "floor"), GAIN)
def test_a_target_of_any_coefficients_puts_no_mass_on_empty_slots(term, floor):
    logits, ids = torch.randn(4, 5, 6, dtype=torch.float64), torch.arange(4).expand(5, 4)
    sent = [[with_slots(x, kept) for x in logits[2:]] for kept in (ids, torch.nn.functional.pad(ids, (0, 2), value=-1))]
    found, meant = (token_losses(views_of([*logits[:2], *x]), terms={"loss": term}, floor=floor)["loss"] for x in sent)
    assert_close(found, meant, **EXACT)


@pytest.mark.parametrize("loss", ["std", "forward", "jsd"])
def test_a_server_that_gives_the_whole_vocabulary_gives_the_full_losses(loss):
    """The tail is empty: what rounding gives it must not meet a student that has none."""
    student, teacher = torch.randn(2, 5, 6, dtype=torch.float64)
    sent, terms = with_slots(teacher, torch.arange(6).expand(5, 6)), {loss: TERMS[loss]}
    found = token_losses({"student": student, "teacher": sent}, terms=terms)[loss]
    meant = token_losses({"student": student, "teacher": teacher}, terms=terms)[loss]
    assert_close(found, meant, rtol=1e-5, atol=1e-6)  # the floor of a tail is 1e-7


@pytest.mark.parametrize("k", [6, 9])
@pytest.mark.parametrize(("term", "floor"), GAIN)
def test_the_top_ids_of_the_whole_vocabulary_give_the_full_losses(term, floor, k):
    states = random_states(2, 3, 6, kind="plain")
    part = Component(dataclasses.replace(term, top=("student", k))), Component(term)
    methods = [
        DecomposedDistillation(Decomposition({"loss": x}, lambda gamma: Sum()), floor=floor, prior="live") for x in part
    ]
    found, meant = (method(views_of(states), MASK) for method in methods)
    assert_same(found, meant, states, rtol=1e-10, atol=1e-12)
    logits = views_of([x.logits() for x in states])
    assert_close(methods[0](logits, MASK)["loss"], meant["loss"], rtol=1e-10, atol=1e-12)


@given(collapsible(), st.booleans())
def test_top_ids_weigh_most_in_either_view(case, with_text):
    logits, ids = case
    k, mask = ids.shape[-1], torch.arange(len(ids)).remainder(3) < 2
    student, text = logits[0].unsqueeze(0), logits[1].unsqueeze(0)
    chosen = top_ids(student, text if with_text else None, mask.unsqueeze(0), k=k).squeeze(0)
    assert (chosen[~mask] == -1).all()
    weight = logits[0].softmax(-1)
    if with_text:
        weight = weight.maximum(logits[1].softmax(-1))
    heaviest = weight[mask].sort(-1, descending=True).values[:, :k]
    found = weight[mask].gather(-1, chosen[mask]).sort(-1, descending=True).values
    assert_close(found, heaviest, rtol=1e-12, atol=0.0)
    assert all(len(set(row)) == k for row in chosen[mask].tolist())


@given(st.data())
def test_intersect_keeps_what_both_views_know(data):
    slots = st.lists(st.integers(0, 8), min_size=1, max_size=6, unique=True)
    known, text_known = data.draw(slots), data.draw(slots)
    log_probs = {i: -3.0 - 0.1 * n for n, i in enumerate(known)}
    text_log_probs = {i: -3.0 - 0.01 * n for n, i in enumerate(text_known)}
    ids, text_ids = [*known, -1], [-1, *text_known, -1]
    image, text = intersect(
        TopLogProbs(torch.tensor([ids]), torch.tensor([[log_probs.get(i, math.nan) for i in ids]])),
        TopLogProbs(torch.tensor([text_ids]), torch.tensor([[text_log_probs.get(i, math.nan) for i in text_ids]])),
    )
    expected = [i if i in text_log_probs else -1 for i in ids]
    for found, meant in ((image, log_probs), (text, text_log_probs)):
        assert found.ids_BTk.tolist() == [expected]
        kept = torch.tensor([meant[i] for i in expected if i >= 0])
        assert torch.equal(found.log_probs_BTk[found.ids_BTk >= 0], kept)
        assert_close(found.bins()[0, -1].exp(), 1 - kept.exp().sum(), rtol=1e-6, atol=0.0)


def test_views_without_a_common_id_have_nothing_to_teach():
    sent = (TopLogProbs(torch.tensor([[i]]), torch.tensor([[x]])) for i, x in ((1, -0.5), (2, -0.7)))
    student = torch.randn(1, 4, requires_grad=True)
    losses = token_losses(views_of([student, student, *intersect(*sent)]))
    losses["std"].sum().backward()
    # Sums of four probabilities: a rounding or two of float32.
    assert max(abs(losses[name].item()) for name in ("std", "vis", "lang", "vds")) < 2e-7
    assert student.grad.abs().max() < 2e-7


def served(student, text, teacher, teacher_text, mask, k):
    """What a server sends of the teacher's two views, over the ids that weigh most in the student's."""
    ids = top_ids(student, text, mask, k=k)
    return [with_slots(x, ids) for x in (teacher, teacher_text)]


MASK = torch.tensor([[True, True, False], [True, False, False]])


@pytest.mark.parametrize("decomposition", ["standard", "vgs", "exact", "language", "tokens", "jsd"])
def test_a_server_that_knows_every_id_gives_the_full_losses(decomposition):
    logits = [x.requires_grad_() for x in torch.randn(4, 2, 3, 9, dtype=torch.float64).unbind()]
    sent = served(*logits, MASK, 9)
    method = DecomposedDistillation(decomposition, lam=0.1 if decomposition in ("vgs", "language") else None)
    actual, expected = method(views_of([*logits[:2], *sent]), MASK), method(views_of(logits), MASK)
    for name, loss in expected.items():
        # The floor of the teacher's tail, of which the student has nothing, is taken from all its probabilities.
        assert_close(actual[name], loss, rtol=0.0, atol=4 * TAIL_FLOOR)
    vds = [visual_dependency(*x, MASK) for x in (sent, logits[2:])]
    assert_close(*vds, rtol=0.0, atol=2 * TAIL_FLOOR)


@pytest.mark.parametrize("kind", ["plain", "bias", "softcap", "lora", "everything"])
@pytest.mark.parametrize("decomposition", ["standard", "vgs", "exact", "language", "vision-opd", "jsd"])
def test_hidden_states_are_collapsed_as_their_logits_are(decomposition, kind):
    """More than one chunk, and tokens without ids that may hold anything."""
    states = random_states(2, 3, 200, kind=kind)
    logits = [x.logits() for x in states]
    lam = 0.3 if decomposition in ("vgs", "language") else None
    method = DecomposedDistillation(decomposition, lam=lam, detach_prior=False, chunk_size=2)
    sent = logits[2:] if decomposition == "vision-opd" else served(*logits, MASK, 8)
    found, meant = (method(views_of([*x[:2], *sent]), MASK, gate_BT=MASK) for x in (states, logits))
    assert_same(found, meant, states, rtol=1e-10, atol=1e-12)


def test_the_student_may_be_asked_for_ids_by_its_hidden_states():
    states, mask = random_states(2, 150, 30)[0], torch.rand(2, 150) < 0.7
    ids = [top_ids(x, None, mask, k=8).sort().values for x in (states, states.logits())]
    assert torch.equal(*ids)


def test_without_a_token_losses_and_gradients_are_zero():
    states = random_states(2, 3, 9)
    nothing = [TopLogProbs(torch.full((2, 3, 5), -1), torch.full((2, 3, 5), math.nan))] * 2
    losses = DecomposedDistillation("vgs")(views_of([*states[:2], *nothing]), torch.zeros(2, 3, dtype=torch.bool))
    sum(losses.values()).backward()
    assert not states[0].head.weight_Vd.grad.any()


def test_half_precision_is_computed_with_in_float32():
    half = torch.randn(2, 9).bfloat16().requires_grad_()
    single, ids = half.detach().float().requires_grad_(), torch.tensor([[1, 4], [0, -1]])
    sent = TopLogProbs(ids, torch.tensor([[-1.0, -2.0], [-0.5, 0.0]]).bfloat16())
    for x in (half, single):
        token_losses({"student": x, "teacher": sent})["std"].sum().backward()
    assert torch.equal(half.grad, single.grad.bfloat16())
    assert sent.bins().dtype == torch.float32


def test_views_of_a_server_that_do_not_fit_are_refused():
    student, ids = torch.randn(1, 5, requires_grad=True), torch.tensor([[0, 1]])
    sent, other = (TopLogProbs(i, torch.tensor([[-1.0, -2.0]])) for i in (ids, torch.tensor([[0, 2]])))
    views = views_of([student, student, sent, sent])

    def refuse(match, views, **options):
        with pytest.raises(ValueError, match=match):
            token_losses(views, **options)

    refuse("valid at temperature 1 only; got 2", views, temperature=2.0)
    refuse("over the ids of the teacher's other views", {**views, "teacher_text": other})
    refuse("both must be logits of one shape", {**views, "teacher_text": student.detach()})
    refuse("vocabulary of 1; found 0 to 1: put -1", {"student": student[:, :1], "teacher": sent})
    refuse("on the student's top ids needs the teacher's logits", views, terms={"jsd": TERMS["jsd-top100"]})
    refuse("and not trained", {"student": sent, "teacher": sent})
    refuse("infinity in student", {"student": student * math.inf, "teacher": sent})


IDS, LOG_PROBS = torch.tensor([[4, 1]]), torch.tensor([[-1.0, -2.0]])
REFUSED = [
    (TypeError, "ids must be int64.*int32", IDS.int(), LOG_PROBS),
    (ValueError, r"k at least 1; got \(1, 0\)", IDS[:, :0], LOG_PROBS[:, :0]),
    (ValueError, "found duplicates", torch.tensor([[3, 3]]), LOG_PROBS),
    (ValueError, "found -2 to 1: put -1", torch.tensor([[-2, 1]]), LOG_PROBS),
    (TypeError, "must be floating; got torch.int64", IDS, IDS),
    (ValueError, r"one shape on one device; got \(1, 1\)", IDS, LOG_PROBS[:, :1]),
    (ValueError, "finite; found NaN or infinity", IDS, torch.tensor([[-1.0, math.nan]])),
    (ValueError, "finite; found NaN or infinity", IDS, torch.tensor([[-math.inf, -1.0]])),
    (ValueError, "must not be positive; found 0.5", IDS, torch.tensor([[0.5, -1.0]])),
    (ValueError, "exceed one in sum; found 1.2", IDS, torch.tensor([[0.6, 0.6]]).log()),
]


@pytest.mark.parametrize(("kind", "match", "ids", "log_probs"), REFUSED)
def test_what_a_server_cannot_have_meant_is_refused(kind, match, ids, log_probs):
    with pytest.raises(kind, match=match):
        TopLogProbs(ids, log_probs)


def test_students_and_ids_that_do_not_fit_are_refused():
    student, mask = torch.zeros(1, 4), torch.ones(1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"same tokens.*got \(1, 2\) with the image and \(2, 2\)"):
        intersect(TopLogProbs(IDS, LOG_PROBS), TopLogProbs(IDS.expand(2, 2), LOG_PROBS.expand(2, 2)))
    with pytest.raises(TypeError, match=r"mask_BT must be bool.*mask\.bool\(\)"):
        top_ids(student, None, mask.float(), k=2)
    with pytest.raises(ValueError, match=r"one shape.*\(1,\) on cpu; got \(1, 5\)"):
        top_ids(student, torch.zeros(1, 5), mask, k=2)
    with pytest.raises(ValueError, match=r"\(2,\) on cpu; got \(1, 4\)"):
        top_ids(student, None, mask.expand(2), k=2)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"at most the vocabulary of 4; got {k}"):
            top_ids(student, None, mask, k=k)
