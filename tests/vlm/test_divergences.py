import dataclasses
import math

import pytest
import torch
from hidden_states import NAMES, views_of
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from steer_optim.vlm import token_losses, visual_dependency
from steer_optim.vlm.divergences import TERMS, Term, divergence, value_and_gradients

# With a prior that is not a constant.
ATTACHED = {
    name: dataclasses.replace(term, attached=("prior",) if "prior" in term.target else ())
    for name, term in TERMS.items()
    if name in ("std", "vis", "lang", "vp", "vds")
}
# Sums of a few dozen float64 terms of size up to 10: some 100 units of 2e-16 each.
EXACT = {"rtol": 1e-13, "atol": 1e-13}


def random_logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = [(scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for _ in NAMES]
    return [x.requires_grad_(name.startswith("student")) for name, x in zip(NAMES, logits, strict=True)]


def gradients(loss, student, student_text):
    """Gradients of the sum of a loss, None where it does not reach."""
    return torch.autograd.grad(loss.sum(), [student, student_text], retain_graph=True, allow_unused=True)


CASES = st.fixed_dictionaries(
    {
        "rows": st.lists(st.integers(1, 3), max_size=2).map(tuple),
        "vocabulary": st.integers(1, 12),
        "seed": st.integers(0, 10_000),
        "temperature": st.sampled_from([0.5, 1.0, 3.0]),
    }
)


@given(CASES)
def test_values_are_the_closed_forms(case):
    tau = case["temperature"]
    logits = random_logits(*case["rows"], case["vocabulary"], seed=case["seed"])
    losses = token_losses(views_of(logits), temperature=tau)
    z, zt, y, yt = (x.detach() / tau for x in logits)
    u, w = z - y, zt - yt
    p, ptx, q = z.softmax(-1), zt.softmax(-1), y.softmax(-1)

    def mean(weights, x):
        return (weights * x).sum(-1)

    def lse(x):
        return x.logsumexp(-1)

    assert_close(losses["std"], mean(p, u) - lse(z) + lse(y), **EXACT)
    assert_close(losses["vis"], mean(p, u - w) - lse(z) + lse(y + w), **EXACT)
    assert_close((losses["std"] - losses["vis"]), mean(p, w) + lse(y) - lse(y + w), **EXACT)
    assert_close(losses["lang"], mean(ptx, w) - lse(zt) + lse(yt), **EXACT)
    assert_close(losses["vp"], mean(ptx, yt - y) - lse(zt) + lse(y + w), **EXACT)
    assert_close(losses["vds"], mean(q, y - yt) - lse(y) + lse(yt), **EXACT)


@given(CASES, st.booleans())
def test_gradients_are_the_closed_forms_and_flow_nowhere_else(case, detach_prior):
    tau = case["temperature"]
    logits = random_logits(*case["rows"], case["vocabulary"], seed=case["seed"])
    losses = token_losses(views_of(logits), temperature=tau, terms=None if detach_prior else ATTACHED)
    z, zt, y, yt = (x.detach() / tau for x in logits)
    u, w = z - y, zt - yt
    p, ptx, qstar = z.softmax(-1), zt.softmax(-1), (y + w).softmax(-1)

    def reverse_kl(weights, r):
        return weights * (r - (weights * r).sum(-1, keepdim=True)) / tau

    through_prior = None if detach_prior else (qstar - p) / tau
    expected = {
        "std": (reverse_kl(p, u), None),
        "vis": (reverse_kl(p, u - w), through_prior),
        "beyond": (reverse_kl(p, w), None if detach_prior else -through_prior),
        "lang": (None, reverse_kl(ptx, w)),
        "vp": (None, reverse_kl(ptx, yt - y) + (0 if detach_prior else (qstar - ptx) / tau)),
    }
    for name, (with_image, without) in expected.items():
        loss = losses["std"] - losses["vis"] if name == "beyond" else losses[name]
        actual = gradients(loss, *logits[:2])
        for found, meant in zip(actual, (with_image, without), strict=True):
            assert (found is None) == (meant is None), name
            if meant is not None:
                assert_close(found, meant, **EXACT, msg=lambda text, name=name: f"{name}: {text}")
    assert not losses["vds"].requires_grad


@given(CASES)
def test_the_monolithic_loss_splits_exactly(case):
    logits = random_logits(*case["rows"], case["vocabulary"], seed=case["seed"])
    losses = token_losses(views_of(logits), temperature=case["temperature"])
    log_p, log_ptx, log_q, log_qtx = (torch.log_softmax(x / case["temperature"], -1) for x in logits)
    log_Z = (log_ptx + log_q - log_qtx).logsumexp(-1)
    beyond = (log_p.exp() * (log_ptx - log_qtx)).sum(-1) - log_Z
    assert_close(losses["vis"], losses["std"] - beyond, **EXACT)
    assert_close((losses["std"] - losses["vis"]), beyond, **EXACT)
    std, vis, prior = (
        gradients(x, *logits[:2])[0] for x in (losses["std"], losses["vis"], (losses["std"] - losses["vis"]))
    )
    assert_close(prior, gradients(beyond, *logits[:2])[0], **EXACT)
    assert_close(std, vis + prior, **EXACT)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 4.0])
def test_steering_is_one_kl_against_a_log_linear_target(gamma):
    logits = random_logits(4, 9)
    losses = token_losses(views_of(logits))
    log_p, log_ptx, log_q, log_qtx = (torch.log_softmax(x, -1) for x in logits)
    log_target = torch.log_softmax(log_q + gamma / (1 + gamma) * (log_ptx.detach() - log_qtx), -1)
    single = (1 + gamma) * (log_p.exp() * (log_p - log_target)).sum(-1)
    steered = losses["std"] + gamma * losses["vis"]
    assert_close(gradients(steered, *logits[:2])[0], gradients(single, *logits[:2])[0], **EXACT)


@pytest.mark.parametrize("floor", [None, 0.1])
def test_gradcheck(floor):
    student, student_text, teacher, teacher_text = random_logits(2, 4)

    def differentiable(student, student_text, terms=ATTACHED):
        views = views_of([student, student_text, teacher, teacher_text])
        losses = token_losses(views, terms=terms, temperature=1.5, floor=floor)
        return losses["std"], losses["vis"], (losses["std"] - losses["vis"]), losses["lang"], losses["vp"]

    assert torch.autograd.gradcheck(differentiable, (student, student_text))
    # A detached prior is not what finite differences of student_text see; those of student must agree.
    constant = student_text.detach()
    assert torch.autograd.gradcheck(lambda x: differentiable(x, constant, None)[:3], (student,))


@given(CASES, st.floats(-50, 50))
def test_divergences_are_not_negative_and_ignore_a_shift_of_the_logits(case, shift):
    logits = random_logits(*case["rows"], case["vocabulary"], seed=case["seed"])
    losses = token_losses(views_of(logits), temperature=case["temperature"])
    shifted = token_losses(views_of([x + shift for x in logits]), temperature=case["temperature"])
    for name in ("std", "vis", "lang", "vp", "vds"):
        assert (losses[name] >= -1e-14).all(), name
        # A shift by 50 costs the logits 50 units of 2e-16 each.
        assert_close(shifted[name], losses[name], rtol=1e-12, atol=1e-12)


def test_a_student_like_its_teacher_has_nothing_to_learn():
    student, student_text, _, teacher_text = random_logits(3, 7)
    losses = token_losses(views_of([student, student_text, student.detach(), teacher_text]))
    assert torch.equal(losses["std"], torch.zeros(3, dtype=torch.float64))
    assert_close(
        gradients(losses["std"], student, student_text)[0], torch.zeros_like(student), rtol=0, atol=4e-16
    )  # a few roundings of numbers near 1


def test_a_teacher_that_ignores_the_image_pulls_vis_to_the_students_own_prior():
    student, student_text, teacher, _ = random_logits(3, 7)
    losses = token_losses(views_of([student, student_text, teacher, teacher]))
    log_p, log_ptx = torch.log_softmax(student, -1), torch.log_softmax(student_text.detach(), -1)
    to_prior = (log_p.exp() * (log_p - log_ptx)).sum(-1)
    assert torch.equal(losses["vds"], torch.zeros(3, dtype=torch.float64))
    assert_close(losses["vis"], to_prior, **EXACT)
    pull = gradients(losses["vis"], student, student_text)[0]
    assert_close(pull, gradients(to_prior, student, student_text)[0], **EXACT)
    assert pull.abs().max() > 0.01  # only a student that ignores the image as well has no visual gradient
    blind = token_losses(views_of([student, student.detach(), teacher, teacher]))
    assert_close(gradients(blind["vis"], student, student_text)[0], torch.zeros_like(student), rtol=0, atol=1e-15)


def test_the_floor_bounds_the_visual_gain_by_hand():
    def log(*probabilities):
        return torch.tensor(probabilities, dtype=torch.float64).log()

    p, ptx = log(0.2, 0.3, 0.5), log(0.5, 0.25, 0.25)
    q, qtx = log(0.899999, 0.1, 1e-6), log(0.3, 1e-9, 0.7 - 1e-9)
    floored, plain = token_losses(views_of([p, ptx, q, qtx]), floor=0.01), token_losses(views_of([p, ptx, q, qtx]))
    gains = [0.899999 / 0.3, 0.1 / 0.01, 0.01 / (0.7 - 1e-9)]
    qstar = log(0.5 * gains[0], 0.25 * gains[1], 0.25 * gains[2])
    qstar = qstar - qstar.logsumexp(-1)
    assert_close(floored["vis"], (p.exp() * (p - qstar)).sum(), **EXACT)
    assert_close(floored["vp"], (ptx.exp() * (ptx - qstar)).sum(), **EXACT)
    assert_close(floored["std"] - floored["vis"], plain["std"] - floored["vis"], **EXACT)
    assert_close(floored["floored"], torch.tensor(0.8, dtype=torch.float64), **EXACT)
    for name in ("std", "lang", "vds"):
        assert torch.equal(floored[name], plain[name]), name
    assert floored["vis"] < plain["vis"] - 1


def test_a_floor_below_every_probability_does_not_act():
    logits = random_logits(5, 6)
    plain, floored = token_losses(views_of(logits)), token_losses(views_of(logits), floor=1e-9)
    assert "floored" not in plain
    assert torch.equal(floored["floored"], torch.zeros(5, dtype=torch.float64))
    for name, loss in plain.items():
        assert torch.equal(loss, floored[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_with_in_float32(dtype):
    logits = random_logits(3, 8, dtype=dtype)
    full = [x.detach().float().requires_grad_(x.requires_grad) for x in logits]
    losses, expected = token_losses(views_of(logits), terms=ATTACHED), token_losses(views_of(full), terms=ATTACHED)
    for name in ("std", "vis", "lang", "vp", "vds"):
        assert losses[name].dtype == torch.float32
        assert torch.equal(losses[name], expected[name]), name
    for half, single in zip(gradients(losses["vis"], *logits[:2]), gradients(expected["vis"], *full[:2]), strict=True):
        assert torch.equal(half, single.to(dtype))


def test_models_may_differ_in_precision():
    student, student_text, teacher, teacher_text = random_logits(3, 8, dtype=torch.float32)
    half = token_losses(views_of([student, student_text, teacher.bfloat16(), teacher_text.bfloat16()]))
    rounded = token_losses(
        views_of([student, student_text, teacher.bfloat16().float(), teacher_text.bfloat16().float()])
    )
    assert torch.equal(half["vis"], rounded["vis"])


@pytest.mark.parametrize("padded", ["student", "teacher"])
def test_a_padded_vocabulary_is_cut_and_renormalised(padded):
    logits = dict(zip(NAMES, random_logits(3, 8), strict=True))
    common = token_losses(logits)
    for name in (padded, padded + "_text"):
        # Padding rows of a head hold anything; fillers of -inf are common.
        tail = torch.tensor([[40.0, -math.inf]], dtype=torch.float64).expand(3, 2)
        logits[name] = torch.cat([logits[name].detach(), tail], -1).requires_grad_(padded == "student")
    cut = token_losses(logits)
    for name in ("std", "vis", "lang", "vp", "vds"):
        assert torch.equal(cut[name], common[name]), name
    if padded == "student":
        gradient = gradients(cut["std"], logits["student"], logits["student_text"])[0]
        assert torch.equal(gradient[:, 8:], torch.zeros(3, 2, dtype=torch.float64))


def test_rows_keep_their_shape_and_no_rows_give_no_losses():
    assert token_losses(views_of(random_logits(7)))["std"].shape == ()
    assert token_losses(views_of(random_logits(2, 3, 4, 7)))["vis"].shape == (2, 3, 4)
    empty = random_logits(0, 7)
    losses = token_losses(views_of(empty))
    assert losses["std"].shape == (0,)
    assert gradients(losses["std"], *empty[:2])[0].shape == (0, 7)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("wrong", [{"student"}, {"student_text"}, {"teacher"}, {"teacher_text", "student"}])
def test_logits_that_are_not_finite_are_refused_by_name(wrong, value):
    logits = {name: x.detach() for name, x in zip(NAMES, random_logits(3, 5), strict=True)}
    for name in wrong:
        logits[name][1, 2] = value
    listed = ", ".join(name for name in NAMES if name in wrong)
    with pytest.raises(ValueError, match=rf"found NaN or infinity in {listed}\."):
        token_losses(logits)


def test_logits_that_do_not_fit_each_other_are_refused_by_name():
    good = dict(zip(NAMES, random_logits(3, 5), strict=True))

    def refuse(kind, match, **wrong):
        with pytest.raises(kind, match=match):
            token_losses({**good, **wrong})

    refuse(TypeError, "teacher must be floating logits; got torch.int64", teacher=torch.zeros(3, 5, dtype=torch.long))
    refuse(ValueError, r"student is on cpu and teacher_text on meta", teacher_text=good["teacher_text"].to("meta"))
    refuse(
        ValueError,
        "student and student_text are two views of one model: both must be logits of one shape",
        student_text=torch.zeros(3, 6),
    )
    refuse(
        ValueError,
        r"student is \(3, 5\) and teacher \(4, 5\)",
        teacher=torch.zeros(4, 5),
        teacher_text=torch.zeros(4, 5),
    )


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_out_of_range_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be positive"):
        token_losses(views_of(random_logits(3, 5)), temperature=temperature)


@pytest.mark.parametrize("floor", [0.0, 1.0, -1e-3, math.nan])
def test_a_floor_out_of_range_is_refused(floor):
    with pytest.raises(ValueError, match="floor must be a probability"):
        token_losses(views_of(random_logits(3, 5)), floor=floor)


def test_visual_dependency_is_the_score_of_the_tokens_that_the_mask_keeps():
    logits_BTV = random_logits(2, 3, 7)
    mask_BT = torch.tensor([[True, True, False], [False, True, False]])
    expected_BT = token_losses(views_of(logits_BTV), temperature=2.0)["vds"]
    teacher_BTV, teacher_text_BTV = (x.clone() for x in logits_BTV[2:])
    teacher_BTV[~mask_BT], teacher_text_BTV[0, 2] = math.nan, -math.inf
    vds_BT = visual_dependency(teacher_BTV.requires_grad_(), teacher_text_BTV, mask_BT, temperature=2.0)
    assert torch.equal(vds_BT, expected_BT * mask_BT)
    assert not vds_BT.requires_grad


def test_visual_dependency_refuses_what_does_not_fit():
    _, _, teacher_BTV, teacher_text_BTV = random_logits(2, 3, 7)
    mask_BT = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"mask_BT must be bool.*float32.*mask\.bool\(\)"):
        visual_dependency(teacher_BTV, teacher_text_BTV, mask_BT.float())
    with pytest.raises(ValueError, match=r"teacher \(B, T, V\) .*got \(3, 2\) and \(2, 3, 7\)"):
        visual_dependency(teacher_BTV, teacher_text_BTV, mask_BT.T)
    with pytest.raises(ValueError, match="mask_BT and teacher must be on one device; got meta and cpu"):
        visual_dependency(teacher_BTV, teacher_text_BTV, mask_BT.to("meta"))
    with pytest.raises(ValueError, match="infinity in teacher_text"):
        visual_dependency(teacher_BTV, teacher_text_BTV.fill_(-math.inf), mask_BT)


@given(
    CASES,
    st.sampled_from(["reverse", "forward", "jsd"]),
    st.floats(0.01, 0.99),
)
def test_the_gradients_of_the_table_are_those_of_autograd(case, kind, beta):
    term = Term("student", {"teacher": 1.0}, divergence=kind, beta=beta)
    logits = random_logits(*case["rows"], case["vocabulary"], seed=case["seed"])
    student, teacher = logits[0], logits[2].requires_grad_()
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    loss = divergence(term, log_p, log_q)
    value, left, target = value_and_gradients(term, log_p.detach(), log_q.detach(), attached=True)
    assert_close(value, loss.detach(), **EXACT)
    found = torch.autograd.grad(loss.sum(), (student, teacher))
    assert_close((left, target), found, **EXACT)
    assert (value > -1e-14).all()


def test_jsd_lies_between_its_limits():
    """GKD, arXiv 2306.13649: JSD(beta) / beta tends to the forward KL, JSD(beta) / (1 - beta) to the reverse one."""
    log_p, _, log_q, _ = (x.log_softmax(-1) for x in random_logits(5, 6))
    for beta, kind in ((1e-6, "forward"), (1 - 1e-6, "reverse")):
        jsd = divergence(Term("student", {"teacher": 1.0}, divergence="jsd", beta=beta), log_p, log_q)
        limit = divergence(Term("student", {"teacher": 1.0}, divergence=kind), log_p, log_q)
        assert_close(jsd / min(beta, 1 - beta), limit, rtol=1e-4, atol=0)


def test_terms_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="divergence must be one of reverse, forward, jsd; got 'both'"):
        Term("student", {"teacher": 1.0}, divergence="both")
    with pytest.raises(ValueError, match=r"beta must be inside \(0, 1\).*got 1.0"):
        Term("student", {"teacher": 1.0}, divergence="jsd", beta=1.0)
    views = views_of(random_logits(3, 5))
    with pytest.raises(ValueError, match=r"the loss 'lang' reads student_text, teacher_text; missing teacher_text"):
        token_losses({k: x for k, x in views.items() if k != "teacher_text"}, terms={"lang": TERMS["lang"]})


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_ids_that_are_masked_with_the_smallest_number_are_refused_by_name(temperature):
    """A division by a temperature below 1 makes them infinite, and a sum of two views in a target."""
    logits = dict(zip(NAMES, random_logits(3, 5, dtype=torch.float32), strict=True))
    for name in ("student", "student_text", "teacher"):
        logits[name] = logits[name].masked_fill(torch.arange(5) == 2, torch.finfo(torch.float32).min)
    match = "found NaN or infinity in student, " if temperature < 1 else "finite, but their sums overflow in a target"
    with pytest.raises(ValueError, match=match):
        token_losses(logits, temperature=temperature)


def test_a_target_of_one_floored_view_is_normalised():
    logits = random_logits(4, 6)
    term = Term("student", {"teacher": 1.0}, divergence="forward", floored=("teacher",))
    found = token_losses(views_of(logits), terms={"a": term}, floor=0.1)["a"]
    q = logits[2].softmax(-1).clamp(min=0.1)
    q = q / q.sum(-1, keepdim=True)
    assert_close(found, (q * (q.log() - logits[0].log_softmax(-1))).sum(-1), **EXACT)


def test_views_of_a_target_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="attached or floored, not both; got teacher in both"):
        Term("student", {"teacher": 1.0}, attached=("teacher",), floored=("teacher",))
    with pytest.raises(ValueError, match="views of the target; got prior"):
        Term("student", {"teacher": 1.0}, attached=("prior",))
