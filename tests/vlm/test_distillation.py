import dataclasses
import itertools
import math

import pytest
import torch
from hidden_states import views_of
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from steer_optim.rules import VGS, PCGrad, Steer, Sum
from steer_optim.vlm import DecomposedDistillation, adaptive_strength, token_losses, visual_dependency, visual_tokens
from steer_optim.vlm.distillation import DECOMPOSITIONS, Component, Decomposition
from steer_optim.vlm.divergences import TERMS, Term
from steer_optim.vlm.gate import sampled_log_probs, top_share

# Sums of at most a few hundred float64 terms of size up to 10, in another order: some 1000 units of 2e-16.
EXACT = {"rtol": 1e-12, "atol": 1e-13}

METHODS = [
    DecomposedDistillation("vgs"),
    DecomposedDistillation("vgs", lam=0.0, adaptive=True),
    DecomposedDistillation("vgs", lam=0.5, adaptive=True, detach_prior=False, temperature=2.0),
    DecomposedDistillation("standard", temperature=0.5),
    DecomposedDistillation("exact", floor=0.05),
    DecomposedDistillation("exact", adaptive=True),
    DecomposedDistillation("language", lam=0.3, quantile=0.5),
    *(DecomposedDistillation(name, prior="live") for name in DECOMPOSITIONS),
]
METHODS += [dataclasses.replace(method, reduction="sequence") for method in METHODS]
every_method = pytest.mark.parametrize("method", METHODS, ids=repr)


def random_batch(B, T, V, seed=0, dtype=torch.float64):
    """Four logits (B, T, V), the student's with gradient, as DecomposedDistillation takes them."""
    generator = torch.Generator().manual_seed(seed)
    logits = [2 * torch.randn(B, T, V, generator=generator, dtype=torch.float64) for _ in range(4)]
    return [x.to(dtype).requires_grad_(i < 2) for i, x in enumerate(logits)]


def gradients(loss, batch):
    """Gradients with respect to student and student_text, zeros where the loss does not reach."""
    found = torch.autograd.grad(loss, batch[:2], retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, batch[:2], strict=True)]


def reached(loss, batch):
    """Which of student and student_text the loss has a gradient for."""
    found = torch.autograd.grad(loss, batch[:2], retain_graph=True, allow_unused=True)
    return [g is not None for g in found]


def values(components):
    return {name: loss.item() for name, loss in components.items()}


MASK = torch.tensor([[True, True, True, True], [True, True, False, False], [False, False, False, False]])


@pytest.mark.parametrize(
    ("method", "meant"),
    [
        (
            DecomposedDistillation("vgs"),
            {"std": [True, False], "vis": [True, False], "lp": [False, True]},
        ),
        (
            DecomposedDistillation("vgs", detach_prior=False),
            {"std": [True, False], "vis": [True, True], "lp": [False, True]},
        ),
        (DecomposedDistillation("vgs", lam=0), {"std": [True, False], "vis": [True, False]}),
        (DecomposedDistillation("standard"), {"std": [True, False]}),
        (DecomposedDistillation("exact"), {"lang": [True, False], "vis": [True, False]}),
        (DecomposedDistillation("exact", detach_prior=False), {"lang": [True, True], "vis": [True, True]}),
        (
            DecomposedDistillation("language"),
            {"std": [True, False], "lang": [False, True], "vp": [False, True]},
        ),
        (DecomposedDistillation("language", lam=0), {"std": [True, False], "lang": [False, True]}),
    ],
)
def test_components_and_where_their_gradients_flow(method, meant):
    batch = random_batch(3, 4, 5)
    components = method(views_of(batch), MASK)
    assert {name: reached(loss, batch) for name, loss in components.items()} == meant
    assert list(components) == list(meant)
    assert method.trains_text == any(text for _, text in meant.values())
    assert all(loss.shape == () and loss.dtype == torch.float64 for loss in components.values())


def test_means_over_tokens_and_over_responses_by_hand():
    batch = random_batch(3, 4, 5)
    tokens = token_losses(views_of(batch))
    gate_BT = torch.tensor([[True, False, True, False], [False, True, True, True], [True, True, True, True]])
    by_token = DecomposedDistillation("vgs", lam=0.5)(views_of(batch), MASK, gate_BT=gate_BT)
    by_response = DecomposedDistillation("vgs", lam=0.5, reduction="sequence")(views_of(batch), MASK, gate_BT=gate_BT)
    std, lang = tokens["std"], tokens["lang"]
    assert_close(by_token["std"], (std[0].sum() + std[1, :2].sum()) / 6, **EXACT)
    assert_close(by_response["std"], (std[0].mean() + std[1, :2].mean()) / 2, **EXACT)
    assert_close(by_token["lp"], 0.5 * (lang[0, 0] + lang[0, 2] + lang[1, 1]) / 6, **EXACT)
    assert_close(by_response["lp"], 0.5 * ((lang[0, 0] + lang[0, 2]) / 4 + lang[1, 1] / 2) / 2, **EXACT)


def test_without_a_gate_the_given_tokens_are_gated_among_themselves():
    batch = random_batch(3, 4, 5)
    vds_BT = visual_dependency(*batch[2:], MASK)
    method = DecomposedDistillation("vgs", adaptive=True)
    own = method(views_of(batch), MASK)
    gate_BT, strength_BT = visual_tokens(vds_BT, MASK), adaptive_strength(vds_BT, MASK)
    given_both = method(views_of(batch), MASK, gate_BT=gate_BT, strength_BT=strength_BT)
    assert values(own) == values(given_both)
    other = method(views_of(batch), MASK, gate_BT=~gate_BT, strength_BT=1 - strength_BT)
    assert values(other)["lp"] != values(own)["lp"]
    assert values(other)["vis"] != values(own)["vis"]


@given(
    method=st.sampled_from(METHODS),
    mask=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=6),
    cuts=st.sets(st.integers(1, 5)),
    V=st.integers(2, 8),
    seed=st.integers(0, 10_000),
)
def test_the_split_into_micro_batches_does_not_matter(method, mask, cuts, V, seed):
    mask_BT = torch.tensor(mask)
    B, T = mask_BT.shape
    batch = random_batch(B, T, V, seed)
    vds_BT = visual_dependency(*batch[2:], mask_BT, temperature=method.temperature)
    gate_BT = visual_tokens(vds_BT, mask_BT, quantile=method.quantile)
    strength_BT = adaptive_strength(vds_BT, mask_BT) if method.adaptive else None
    count = method.count(mask_BT)

    whole = method(views_of(batch), mask_BT)
    total = {name: torch.zeros_like(loss) for name, loss in whole.items()}
    bounds = [0, *sorted(cut for cut in cuts if cut < B), B]
    for start, stop in itertools.pairwise(bounds):
        part = slice(start, stop)
        components = method(
            views_of([x[part] for x in batch]),
            mask_BT[part],
            count=count,
            gate_BT=gate_BT[part],
            strength_BT=None if strength_BT is None else strength_BT[part],
        )
        total = {name: total[name] + components[name] for name in whole}
    for name, loss in whole.items():
        assert_close(total[name], loss, **EXACT)
        for found, meant in zip(gradients(total[name], batch), gradients(loss, batch), strict=True):
            assert_close(found, meant, **EXACT)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_averaging_over_replicas_needs_the_mean_count(reduction):
    method = DecomposedDistillation("vgs", lam=0, reduction=reduction)
    batch = random_batch(3, 4, 5)
    count = int(method.count(MASK)) / 3
    replicas = [method(views_of([x[r : r + 1] for x in batch]), MASK[r : r + 1], count=count)["vis"] for r in range(3)]
    assert_close(sum(replicas) / 3, method(views_of(batch), MASK)["vis"], **EXACT)


@every_method
def test_rows_that_the_mask_drops_may_hold_anything(method):
    batch, poisoned = random_batch(3, 4, 5), random_batch(3, 4, 5)
    for x, filler in zip(poisoned, (math.nan, math.inf, -math.inf, math.nan), strict=True):
        x.data[~MASK] = filler
    clean, components = method(views_of(batch), MASK), method(views_of(poisoned), MASK)
    for name, loss in components.items():
        assert torch.equal(loss, clean[name])
        for found, meant in zip(gradients(loss, poisoned), gradients(clean[name], batch), strict=True):
            assert torch.equal(found, meant)
            assert torch.equal(found[~MASK], torch.zeros_like(found[~MASK]))


@every_method
@pytest.mark.parametrize("count", [None, 0, 7])
@pytest.mark.parametrize("B", [0, 2])
def test_without_a_token_losses_and_gradients_are_zero(method, count, B):
    batch = random_batch(B, 4, 5)
    mask_BT = torch.zeros(B, 4, dtype=torch.bool)
    full, whole_mask = random_batch(1, 1, 5), torch.ones(1, 1, dtype=torch.bool)
    for name, loss in method(views_of(batch), mask_BT, count=count).items():
        assert loss.item() == 0
        assert reached(loss, batch) == reached(method(views_of(full), whole_mask)[name], full)
        assert all(torch.equal(g, torch.zeros(B, 4, 5, dtype=torch.float64)) for g in gradients(loss, batch))


@every_method
def test_padding_the_batch_with_an_empty_response_changes_nothing(method):
    batch = random_batch(3, 4, 5)
    with_empty, without = method(views_of(batch), MASK), method(views_of([x[:2] for x in batch]), MASK[:2])
    assert values(with_empty) == values(without)


@pytest.mark.parametrize("detach_prior", [True, False])
@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_the_exact_decomposition_sums_to_standard_distillation(reduction, adaptive, detach_prior):
    batch = random_batch(3, 4, 5)
    options = {"reduction": reduction, "temperature": 1.5, "detach_prior": detach_prior}
    exact = DecomposedDistillation("exact", adaptive=adaptive, **options)(views_of(batch), MASK)
    standard = DecomposedDistillation("standard", **options)(views_of(batch), MASK)["std"]
    assert_close(exact["lang"] + exact["vis"], standard, **EXACT)
    for found, meant in zip(gradients(exact["lang"] + exact["vis"], batch), gradients(standard, batch), strict=True):
        assert_close(found, meant, **EXACT)


def test_adaptive_steering_is_its_definition():
    method = DecomposedDistillation("vgs", gamma=3.0, adaptive=True, lam=0)
    batch, mask_BT = random_batch(5, 2, 6), torch.ones(5, 2, dtype=torch.bool)
    tokens = token_losses(views_of(batch))
    # Of ten tokens, gamma_t is 0 for the four lowest, gamma / 2 for the next three, and gamma for the top three.
    gamma_by_rank = torch.tensor([0, 0, 0, 0, 1.5, 1.5, 1.5, 3, 3, 3], dtype=torch.float64)
    rank = tokens["vds"].flatten().argsort().argsort()
    meant = (tokens["std"].flatten() + gamma_by_rank[rank] * tokens["vis"].flatten()).mean()
    components = method(views_of(batch), mask_BT)
    assert_close(components["std"] + 3.0 * components["vis"], meant, **EXACT)
    exact = dataclasses.replace(method, decomposition="exact")(views_of(batch), mask_BT)
    assert_close(exact["lang"] + (1 + 3.0) * exact["vis"], meant, **EXACT)


def test_standard_distillation_reads_neither_text_only_view():
    views, method = views_of(random_batch(3, 4, 5)), DecomposedDistillation("standard")
    without = method({name: views[name] for name in method.views}, MASK)["std"]
    assert torch.equal(without, method(views, MASK)["std"])
    del views["student_text"]
    with pytest.raises(ValueError, match=r"vgs reads the views student, student_text, .*; missing student_text"):
        DecomposedDistillation("vgs")(views, MASK)


def test_a_text_view_that_is_trained_must_require_grad():
    views = views_of(random_batch(3, 4, 5))
    views["student_text"] = views["student_text"].detach()
    trained = ("vgs", {"lam": 0.0, "detach_prior": False}), ("vgs", {}), ("language", {"lam": 0.0})
    for decomposition, options in trained:
        method = DecomposedDistillation(decomposition, **options)
        with pytest.raises(ValueError, match=r"train the views .*student_text .*, but student_text requires no grad"):
            method(views, MASK)
        method({**views, "student": views["student"].detach()}, MASK)  # evaluation
    for decomposition in ("vgs", "exact"):
        losses = DecomposedDistillation(decomposition, lam=0.0)(views, MASK)
        assert all(loss.requires_grad for loss in losses.values())


@every_method
def test_half_precision_and_a_padded_teacher(method):
    batch = random_batch(3, 4, 5, dtype=torch.bfloat16)
    padded = [*batch[:2], *(torch.nn.functional.pad(x, (0, 3), value=9.0) for x in batch[2:])]
    for name, loss in method(views_of(padded), MASK).items():
        assert loss.dtype == torch.float32
        assert torch.equal(loss, method(views_of(batch), MASK)[name])
        assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in gradients(loss, batch))


def test_no_component_reaches_the_teacher():
    batch = [x.detach().requires_grad_() for x in random_batch(3, 4, 5)]
    for method in METHODS:
        total = sum(method(views_of(batch), MASK).values())
        assert torch.autograd.grad(total, batch[2:], allow_unused=True) == (None, None)


@pytest.mark.parametrize(
    ("decomposition", "rule"),
    [
        ("vgs-frozen", VGS(1.5)),
        ("vgs", VGS(1.5)),
        ("vgs-unscaled", Sum()),
        ("tokens", Steer(toward="vis", gain=1.5, project="never")),
        ("language-image", VGS(1.5, toward="lang")),
        ("standard", Sum()),
        ("exact", Steer(toward="vis", gain=1.5, project="never")),
        ("language", VGS(1.5, toward="lang")),
    ],
)
def test_the_rule_weighs_these_components_with_this_gamma(decomposition, rule):
    method = DecomposedDistillation(decomposition, gamma=1.5)
    assert repr(method.rule()) == repr(rule)
    views = views_of(random_batch(3, 4, 5))
    method.rule().check(list(method({**views, "prior": views["student_text"].detach()}, MASK)))


def test_the_default_is_the_frozen_prior_and_vgs_is_the_papers():
    frozen, paper = DecomposedDistillation(), DecomposedDistillation("vgs")
    assert (frozen.decomposition, frozen.prior, frozen.lam, frozen.floor) == ("vgs-frozen", "frozen", 0.0, 1e-3)
    assert (paper.prior, paper.lam, paper.floor, paper.gamma, paper.quantile) == ("live", 0.01, None, 2.0, 0.7)
    assert frozen.views == ("student", "prior", "teacher", "teacher_text")
    assert paper.views == ("student", "student_text", "teacher", "teacher_text")
    without = DecomposedDistillation(floor=0)
    batch = views_of(random_batch(3, 4, 5))
    batch["prior"] = batch["student_text"].detach()
    found = [method(batch, MASK)["vis"] for method in (without, dataclasses.replace(without, gamma=3.0), frozen)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_tokens_are_split_and_the_student_is_never_without_its_image():
    batch = random_batch(3, 4, 5)
    method, (std, vds) = DecomposedDistillation("tokens"), map(token_losses(views_of(batch)).get, ("std", "vds"))
    assert method.views == ("student", "teacher", "teacher_text")
    views = {name: view for name, view in views_of(batch).items() if name in method.views}
    gate_BT = visual_tokens(vds, MASK)
    losses = method(views, MASK)
    assert list(losses) == ["lang", "vis"]
    assert_close(losses["vis"], std[gate_BT].sum() / 6, **EXACT)
    assert_close(losses["lang"], std[MASK & ~gate_BT].sum() / 6, **EXACT)
    standard = DecomposedDistillation("standard")(views, MASK)["std"]
    pairs = zip(gradients(losses["lang"] + losses["vis"], batch), gradients(standard, batch), strict=True)
    assert all(torch.allclose(x, y, rtol=1e-12, atol=1e-15) for x, y in pairs)


def test_vision_is_preserved_on_either_view():
    batch, gate_BT = random_batch(3, 4, 5), torch.tensor([[True, False, False, True]] * 3)
    log_p, log_ptx, log_q, log_qtx = (x.log_softmax(-1) for x in batch)
    log_target = (log_ptx + log_q - log_qtx).detach().log_softmax(-1)
    for name, log_left, student in (("language", log_ptx, 1), ("language-image", log_p, 0)):
        losses = DecomposedDistillation(name, lam=0.3)(views_of(batch), MASK, gate_BT=gate_BT)
        meant = 0.3 * (log_left.exp() * (log_left - log_target)).sum(-1)[MASK & gate_BT].sum() / 6
        assert_close(losses["vp"], meant, **EXACT)
        assert reached(losses["vp"], batch) == [student == 0, student == 1]
        assert_close(gradients(losses["vp"], batch)[student], gradients(meant, batch)[student], **EXACT)


def test_the_mixture_with_a_policy_loss_has_the_loss_of_eq_17_without_eta():
    batch, alpha, gamma = random_batch(3, 4, 5), 0.3, 1.5
    parts = DecomposedDistillation("vgs", gamma=gamma)(views_of(batch), MASK)
    losses = DecomposedDistillation("vgs-unscaled", gamma=gamma)(views_of(batch), MASK)
    policy = batch[0].square().mean()
    components = {"policy": (1 - alpha) * policy} | {name: alpha * loss for name, loss in losses.items()}
    weights, _ = DecomposedDistillation("vgs-unscaled").rule()(torch.eye(4, dtype=torch.float64), list(components))
    found = sum(w * x for w, x in zip(weights, components.values(), strict=True))
    meant = (1 - alpha) * policy + alpha * (parts["std"] + gamma * parts["vis"] + parts["lp"])
    assert_close(found, meant, **EXACT)


def test_the_other_divergences_are_their_formulas():
    batch = random_batch(3, 4, 5)
    p, q = batch[0].softmax(-1), batch[2].softmax(-1)
    m = (p + q) / 2
    meant = {
        "forward": (q * (q / p).log()).sum(-1),
        "jsd": ((q * (q / m).log()).sum(-1) + (p * (p / m).log()).sum(-1)) / 2,
    }
    for name, tokens in meant.items():
        loss = DecomposedDistillation(name)(views_of(batch), MASK)["std"]
        assert_close(loss, tokens[MASK].mean(), **EXACT)
        assert_close(gradients(loss, batch)[0], gradients(tokens[MASK].mean(), batch)[0], **EXACT)


def test_the_weights_of_va_opd_are_the_dense_formula():
    """arXiv 2605.21924: a fifth of the tokens, those that the image makes most likelier, has half the weight."""
    student, masked, teacher, _ = random_batch(4, 6, 7, seed=3)
    response_BT = torch.randint(7, (4, 6))
    mask_BT = torch.arange(6) < torch.tensor([6, 5, 1, 0])[:, None]
    scores = [sampled_log_probs(view, response_BT, mask_BT) for view in (teacher, masked)]
    weight_BT = top_share((scores[0] - scores[1]).relu(), mask_BT)
    loss = DecomposedDistillation("standard")({"student": student, "teacher": teacher}, mask_BT, weight_BT=weight_BT)[
        "std"
    ]

    log_p, log_q, log_qm = (x.log_softmax(-1) for x in (student, teacher, masked.detach()))
    total = 0
    for row, n in enumerate((6, 5, 1, 0)):
        tokens = range(n)
        gain = [max(0.0, float((log_q - log_qm)[row, t, response_BT[row, t]])) for t in tokens]
        top = sorted(tokens, key=lambda t, gain=gain: (-gain[t], t))[: math.ceil(0.2 * n)]
        for t in tokens:
            kl = (log_p[row, t].exp() * (log_p[row, t] - log_q[row, t])).sum()
            weight = 1.0 if len(top) == n else 0.5 * n / len(top) if t in top else 0.5 * n / (n - len(top))
            total = total + weight * kl / 12
    assert_close(loss, total, **EXACT)
    assert_close(torch.autograd.grad(loss, student)[0], torch.autograd.grad(total, student)[0], **EXACT)


def test_vision_opd_is_the_dense_formula():
    """arXiv 2605.18740: JSD to an averaged student that sees another image, on the student's top 100 ids and a tail."""
    student, _, average, _ = random_batch(2, 3, 130, seed=5)
    mask_BT = torch.tensor([[True, True, True], [True, False, False]])
    loss = DecomposedDistillation("vision-opd")({"student": student, "teacher": average}, mask_BT)["std"]
    total = 0
    for row, t in mask_BT.nonzero().tolist():
        p, q = student[row, t].softmax(-1), average[row, t].softmax(-1)
        top = p.argsort(descending=True)[:100]
        p, q = (torch.cat([x[top], 1 - x[top].sum().reshape(1)]) for x in (p, q))
        m = (p + q) / 2
        total = total + ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2 / 4
    assert_close(loss, total, **EXACT)
    assert_close(torch.autograd.grad(loss, student)[0], torch.autograd.grad(total, student)[0], **EXACT)


def test_a_decomposition_of_your_own_is_an_entry():
    """V-Zero's kind: away from what the teacher says without the image."""
    pushed = Term("student", {"teacher": 1.5, "teacher_text": -0.5})
    own = Decomposition({"std": Component(TERMS["std"]), "away": Component(pushed, "visual")}, lambda gamma: PCGrad())
    batch, method = random_batch(3, 4, 5), DecomposedDistillation(own)
    assert method.views == ("student", "teacher", "teacher_text")
    log_p, _, log_q, log_qtx = (x.log_softmax(-1) for x in batch)
    log_target = (1.5 * log_q - 0.5 * log_qtx).log_softmax(-1)
    losses = method(views_of(batch), MASK, gate_BT=MASK)
    assert_close(losses["away"], (log_p.exp() * (log_p - log_target)).sum(-1)[MASK].mean(), **EXACT)
    mixed = Decomposition({"a": Component(TERMS["std"]), "b": Component(TERMS["jsd-top100"])}, lambda gamma: PCGrad())
    with pytest.raises(ValueError, match="over the same ids"):
        DecomposedDistillation(mixed)(views_of(batch), MASK)


def test_steering_the_exact_decomposition_is_steering_the_papers():
    batch = random_batch(3, 4, 5)

    def update(method):
        components = method(views_of(batch), MASK)
        sets = torch.stack([torch.cat([g.flatten() for g in gradients(x, batch)]) for x in components.values()])
        weights, _ = method.rule()(sets @ sets.T, list(components))
        return weights @ sets

    paper = update(DecomposedDistillation("vgs", lam=0, gamma=1.5))
    assert_close(update(DecomposedDistillation("exact", gamma=1.5)), paper, **EXACT)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"decomposition": "visual"}, "decomposition must be one of vgs-frozen, vgs, .*; got 'visual'"),
        ({"reduction": "mean"}, "reduction must be one of token, sequence; got 'mean'"),
        ({"gamma": -0.1}, "gamma must be finite and at least 0; got -0.1"),
        ({"gamma": math.inf}, "gamma must be finite"),
        ({"lam": -1}, "lam must be finite and at least 0; got -1"),
        ({"lam": math.nan}, "lam must be finite"),
        ({"quantile": 1.0}, "quantile must be inside"),
        ({"temperature": 0}, "temperature must be positive"),
        ({"floor": 1.5}, "floor must be a probability"),
        ({"prior": "dead"}, "prior must be one of live, frozen; got 'dead'"),
        ({"prior": "frozen", "detach_prior": False}, "a frozen prior receives no gradient"),
        ({"decomposition": "standard", "adaptive": True}, "adaptive=True needs a component with graded.*'standard'"),
        ({"decomposition": "language", "adaptive": True}, "adaptive=True needs a component with graded.*'language'"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        DecomposedDistillation(**options)


def test_inputs_that_do_not_fit_are_refused_by_name():
    batch, method = random_batch(3, 4, 5), DecomposedDistillation("vgs", adaptive=True)

    def refuse(kind, match, method=method, batch=batch, mask_BT=MASK, **options):
        with pytest.raises(kind, match=match):
            method(views_of(batch), mask_BT, **options)

    refuse(TypeError, "mask_BT must be bool", mask_BT=MASK.float())
    refuse(ValueError, r"mask_BT must be \(B, T\) and student .* got \(4, 3\) and \(3, 4, 5\)", mask_BT=MASK.T)
    refuse(ValueError, r"teacher_text \(B, T, V\).* got \(3, 4\) and \(3, 3, 5\)", batch=[*batch[:3], batch[3][:, 1:]])
    refuse(ValueError, "infinity in teacher_text", batch=[*batch[:3], batch[3].masked_fill(batch[3] > 0, -math.inf)])
    refuse(TypeError, "gate_BT must be bool; got torch.float32", gate_BT=MASK.float())
    refuse(ValueError, r"gate_BT must be \(3, 4\) .* got \(3, 4, 1\)", gate_BT=MASK[..., None])
    refuse(ValueError, r"strength_BT must be \(3, 4\) .* got \(1, 4\)", strength_BT=torch.ones(1, 4))
    refuse(ValueError, "adaptive=True", method=DecomposedDistillation("vgs"), strength_BT=torch.ones(3, 4))
    for count in (0, -6, math.nan, math.inf, torch.tensor(0)):
        refuse(ValueError, "count must be the positive number of tokens .* this micro-batch alone has 6", count=count)


def test_what_no_component_reads_is_refused():
    for name, options in (
        ("vgs-frozen", {"lam": 0.01}),
        ("standard", {"lam": 0.1}),
        ("tokens", {"floor": 1e-3}),
        ("standard", {"prior": "frozen"}),
    ):
        with pytest.raises(ValueError, match=rf"no component of '{name}' reads {next(iter(options))}="):
            DecomposedDistillation(name, **options)


@pytest.mark.parametrize(
    ("make", "kind", "match"),
    [
        (lambda: Component("std"), TypeError, "term must be a Term; got str"),
        (
            lambda: Component(TERMS["std"], "vis"),
            ValueError,
            "tokens must be one of all, visual, rest, graded; got 'vis'",
        ),
        (lambda: Component(TERMS["std"], factor="lambda"), ValueError, "factor must be a finite number, 'gamma'"),
        (lambda: Component(TERMS["std"], factor=math.nan), ValueError, "factor must be a finite number, .*got nan"),
        (lambda: Decomposition({"a": TERMS["std"]}, lambda _: Sum()), TypeError, "'a' must be a Component; got Term"),
        (lambda: Decomposition({"a": Component(TERMS["std"])}, Sum()), TypeError, r"must be a function of gamma"),
        (
            lambda: Decomposition({"a": Component(TERMS["std"], less="b")}, lambda _: Sum()),
            ValueError,
            "subtracts 'b', which must be a component whose less is None",
        ),
    ],
)
def test_entries_that_make_no_sense_are_refused(make, kind, match):
    with pytest.raises(kind, match=match):
        make()


def entry(components, **options):
    return DecomposedDistillation(Decomposition(components, lambda gamma: Sum()), **options)


def test_entries_of_every_name_view_and_factor():
    batch = random_batch(3, 4, 5)
    views, tokens = views_of(batch), token_losses(views_of(batch))
    named = entry({"vds": Component(TERMS["std"]), "high": Component(TERMS["std"], "visual")})(views, MASK)
    assert_close(named["vds"], tokens["std"][MASK].mean(), **EXACT)
    language = entry({"lang": Component(TERMS["lang"], factor=-2.0)})
    assert language.views == ("student_text", "teacher_text")
    found = language({name: views[name] for name in language.views}, MASK)["lang"]
    assert_close(found, -2 * tokens["lang"][MASK].mean(), **EXACT)
    left = entry({"lp": Component(TERMS["lang"], factor="lam"), "rest": Component(TERMS["std"], less="lp")}, lam=0.0)
    assert list(left(views, MASK)) == ["rest"]


def test_a_priors_coefficients_add_up_and_attached_views_stay_attached():
    batch = random_batch(3, 4, 5)
    batch[2].requires_grad_()
    term = Term("student", {"prior": 0.5, "student_text": 0.25, "teacher": 1.0}, attached=("teacher",))
    method = entry({"a": Component(term)}, detach_prior=False)
    log_p, log_ptx, log_q, _ = (x.log_softmax(-1) for x in batch)
    log_target = (0.75 * log_ptx + log_q).log_softmax(-1)
    meant = (log_p.exp() * (log_p - log_target)).sum(-1)[MASK].mean()
    found = method(views_of(batch), MASK)["a"]
    pairs = (torch.autograd.grad(loss, batch[:3]) for loss in (found, meant))
    for x, y in zip(*pairs, strict=True):
        assert_close(x, y, **EXACT)


def test_every_view_that_is_trained_must_require_grad():
    views = {**views_of(random_batch(3, 4, 5)), "masked": torch.randn(3, 4, 5, dtype=torch.float64)}
    away = Component(Term("masked", {"teacher": 1.0}))
    with pytest.raises(ValueError, match=r"train the views student, masked .* masked requires no grad"):
        entry({"std": Component(TERMS["std"]), "away": away})(views, MASK)
    views["student"] = views["student"].detach()
    with pytest.raises(ValueError, match="but student requires no grad"):
        DecomposedDistillation("vgs")(views, MASK)


def test_weights_of_tokens_are_constants():
    batch, weight_BT = random_batch(3, 4, 5), torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    loss = DecomposedDistillation("standard")(views_of(batch), MASK, weight_BT=weight_BT)["std"]
    assert torch.autograd.grad(loss, weight_BT, allow_unused=True) == (None,)


def test_weights_of_tokens_that_make_no_sense_are_refused():
    score_BT = torch.rand(3, 4)
    with pytest.raises(ValueError, match=r"must be \(B, T\); got \(3, 4\) and \(1, 4\)"):
        top_share(score_BT, MASK[:1])
    with pytest.raises(ValueError, match="scores must be finite"):
        top_share(score_BT.masked_fill(MASK, math.nan), MASK)
    with pytest.raises(ValueError, match=r"share must be .*1\.5"):
        top_share(score_BT, MASK, share=1.5)
    with pytest.raises(ValueError, match="ids of the vocabulary of 5"):
        sampled_log_probs(torch.zeros(3, 4, 5), torch.full((3, 4), 5), MASK)
    with pytest.raises(ValueError, match="temperature must be positive"):
        sampled_log_probs(torch.zeros(3, 4, 5), torch.zeros(3, 4, dtype=torch.int64), MASK, temperature=-1)
    with pytest.raises(ValueError, match="found NaN or infinity in view_BTV"):
        sampled_log_probs(torch.full((3, 4, 5), math.nan), torch.zeros(3, 4, dtype=torch.int64), MASK)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.int64])
@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_weights_of_any_dtype_are_multiplied_in_float64(dtype, reduction):
    method, views = DecomposedDistillation("vgs", reduction=reduction), views_of(random_batch(3, 4, 5))
    mask_BT, weight_BT = torch.ones(3, 4, dtype=torch.bool).index_fill(1, torch.tensor(3), False), torch.ones(3, 4)
    found, meant = (method(views, mask_BT, weight_BT=weight_BT.to(x)) for x in (dtype, torch.float64))
    for name, loss in meant.items():
        assert_close(found[name], loss, **EXACT)


@pytest.mark.parametrize("name", ["weight_BT", "strength_BT"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(name, value):
    method, views = DecomposedDistillation("vgs", adaptive=True), views_of(random_batch(3, 4, 5))
    x_BT = torch.ones(3, 4).masked_fill(~MASK, value)
    method(views, MASK, **{name: x_BT})
    x_BT[0, 1] = value
    with pytest.raises(ValueError, match=f"{name} must be finite at every token that mask_BT keeps"):
        method(views, MASK, **{name: x_BT})
