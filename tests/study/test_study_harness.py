"""The harness of the study: methods are what they say, runs are paired, and what is observed changes nothing."""

from dataclasses import replace

import pytest
import torch

for needed in ("sklearn", "scipy", "tokenizers", "tqdm", "transformers", "matplotlib"):
    pytest.importorskip(needed)

from steer_optim import Geometry, Sum  # noqa: E402
from steer_optim.vlm import Rollout, append_response, response_logits, rollout, text_only, token_losses  # noqa: E402
from studies.vgs import intervals, models, train  # noqa: E402
from studies.vgs.methods import BASES, FOREVER, parse  # noqa: E402
from studies.vgs.prepare import prepare  # noqa: E402
from studies.vgs.records import Series, rounded  # noqa: E402
from studies.vgs.tasks import TASKS  # noqa: E402

TINY = {
    "steps": 4,
    "batch_size": 8,
    "teacher_size": 32,
    "student_size": 16,
    "teacher_steps": 2,
    "reader_steps": 2,
    "eye_steps": 1,
    "examined": 16,
    "observations": 4,
    "decile_batches": 1,
}
pytestmark = pytest.mark.study


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def questions():
    return {name: task.questions(held_out=True) for name, task in TASKS.items()}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make_run(cache):
    task = TASKS["shapes"]
    return lambda method, seed=0: train.Run(task, task.settled(**TINY)[0], method, seed, cache=cache)


@pytest.mark.parametrize("name", TASKS)
def test_the_harness_and_the_library_run_a_model_alike(questions, name):
    task, (prompt, answer_BT) = questions[name], questions[name].draw(3, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    model = TASKS[name].model(task, 16).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = task.eos, 0
    answers = Rollout(answer_BT, torch.ones_like(answer_BT, dtype=torch.bool))
    with torch.no_grad():
        for ours, view in (
            (models.with_image(model, prompt), prompt),
            (models.without_image(model, prompt), text_only(prompt, model.config)),
        ):
            wanted = response_logits(model, append_response(view, answers, model.config), task.length)
            # Two orders of float32 sums over two layers.
            torch.testing.assert_close(models.response_logits(model, ours, answer_BT), wanted, atol=1e-5, rtol=1e-5)
        seen = models.with_image(model, prompt)
    for options, greedy in (({"temperature": 0}, True), ({}, False)):
        torch.manual_seed(3)
        wanted = rollout(model, prompt, max_new_tokens=task.length, suppress_ids=task.never_sampled, **options)
        torch.manual_seed(3)
        response_BT = models.sample(model, seen, task, greedy=greedy)
        T = wanted.response_BT.shape[1]
        mask_BT = task.mask(response_BT)
        assert torch.equal(mask_BT[:, :T], wanted.mask_BT)
        assert torch.equal(response_BT[mask_BT], wanted.response_BT[wanted.mask_BT])


def test_methods_are_parsed_from_their_names():
    method = parse("vgs,lam=0.3,floor=1e-3,refresh_every=10,prior=ema,scope=group")
    assert method.losses == replace(BASES["vgs"].losses, lam=0.3, floor=1e-3)
    assert (method.refresh_every, method.prior, method.scope) == (10, "ema", "group")
    assert parse("fixed").refresh_every == FOREVER
    assert repr(parse("steer,gamma=2.0").rule(parse("steer,gamma=2.0").losses)).startswith("Steer(toward='vis', gain=2")
    with pytest.raises(ValueError, match="begins with one of standard"):
        parse("vsg")
    with pytest.raises(ValueError, match=r"a change is one of .*; got 'lambda=1'"):
        parse("vgs,lambda=1")


def test_a_prior_that_is_not_live_is_in_the_target_and_nowhere_else():
    torch.manual_seed(0)
    views = {name: torch.randn(2, 3, 7, dtype=torch.float64) for name in (*train.FOUR_VIEWS, "prior")}
    mask_BT = torch.ones(2, 3, dtype=torch.bool)
    live, swapped = (parse(f"vgs,text=0.5,prior={prior}").components(views, mask_BT) for prior in ("live", "ema"))
    moved = {name for name in live if not torch.equal(live[name], swapped[name])}
    assert set(live) == {"std", "vis", "lp", "text"}
    assert moved == {"vis"}
    swap = parse("vgs").components({**views, "student_text": views["prior"]}, mask_BT)
    assert torch.equal(swapped["vis"], swap["vis"])
    torch.testing.assert_close(live["text"], 0.5 * token_losses(views)["lang"].mean())


def test_the_advantage_is_taken_within_the_group_of_a_prompt(make_run, questions):
    run, task = make_run("grpo"), questions["shapes"]
    _, answer_BT = task.draw(2, generator=torch.Generator().manual_seed(0))
    answer_BT = answer_BT.repeat_interleave(train.GROUP, dim=0)
    response_BT = answer_BT.clone()
    response_BT[1 : train.GROUP, -2] = task.ids["0"]  # one right answer in the first group, all in the second
    logits_BTV = torch.zeros(*response_BT.shape, len(task.words), requires_grad=True)
    loss, reward = run.grpo(logits_BTV, response_BT, answer_BT, torch.ones_like(response_BT, dtype=torch.bool))
    loss.backward()
    assert reward == pytest.approx(9 / 16)
    gradient_B = logits_BTV.grad.gather(2, response_BT[..., None])[..., 0].sum(1)
    assert gradient_B[0] < 0 < gradient_B[1]  # descent makes the right one likelier
    assert gradient_B[train.GROUP :].abs().max() == 0


def test_a_stale_update_is_compared_with_the_exact_one_as_gradients_are(make_run):
    run = make_run("vgs")
    run.optimizer.rule = Sum()
    gradients = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    G, stale = gradients @ gradients.T, torch.tensor([1.0, 0.0], dtype=torch.float64)
    taken, exact = (Geometry(("std", "vis"), G, weights) for weights in (stale, torch.ones(2, dtype=torch.float64)))
    cosine = torch.cosine_similarity(gradients[0], gradients.sum(0), dim=0)
    length = gradients[0].norm() / gradients.sum(0).norm()
    assert run.compare(taken, exact) == pytest.approx((float(cosine), float(length)))


def test_what_is_observed_changes_nothing(make_run, monkeypatch):

    def trained():
        run = make_run("pcgrad,refresh_every=2")
        record = run.work()
        return torch.cat([p.detach().flatten() for p in run.student.parameters()]), record

    often, record = trained()
    assert record["steps"]["cosine to exact"][0] == pytest.approx(1)
    assert len(record["observed"]["step"]) == 4
    monkeypatch.setattr(train, "CHECKPOINTS", 1)
    monkeypatch.setattr(train.Run, "observe", lambda self, step: {})
    monkeypatch.setattr(train.Run, "compare", lambda self, taken, exact: (0.0, 0.0))
    monkeypatch.setattr(train, "measure", lambda losses, parameters: "the exact Gramian, not taken")
    assert torch.equal(trained()[0], often)


def test_where_the_eye_alone_is_trained_the_language_stays(make_run):
    run = make_run("standard,trains=eye")
    before = [p.detach().clone() for p in run.student.parameters()]
    run.step(0)
    saw = {id(p) for module in models.eye(run.student) for p in module.parameters()}
    changed = {id(p) for p, old in zip(run.student.parameters(), before, strict=True) if not torch.equal(p, old)}
    assert changed
    assert changed <= saw


def test_methods_are_paired_by_seed(make_run):
    first, second, other = (make_run(*key).rollout("distillation", 0) for key in (("vgs",), ("pcd",), ("vgs", 1)))
    assert torch.equal(first[0]["pixel_values"], second[0]["pixel_values"])
    assert torch.equal(first[2], second[2])
    assert not torch.equal(first[0]["pixel_values"], other[0]["pixel_values"])


def test_the_student_keeps_its_language_and_loses_its_eye(cache):
    task = TASKS["shapes"]
    settings, name = task.settled(**{**TINY, "eye_steps": 0})
    assert name.startswith("steps=4,batch_size=8")
    _, student, record = prepare(task, settings, 0, cache=cache)
    assert set(record) == {"teacher", "initial"}
    assert all(p.requires_grad for p in student.parameters())
    train.seed_step(0, "student")
    untaught, fresh = (task.model(task.questions(held_out=False), settings.student_size) for _ in range(2))

    def eye(model):
        return [p for module in models.eye(model) for p in module.parameters()]

    assert all(torch.equal(own, new) for own, new in zip(eye(student), eye(fresh), strict=True))
    assert not torch.equal(student.get_input_embeddings().weight, untaught.get_input_embeddings().weight)

    _, again, _ = prepare(task, settings, 0, cache=cache)
    assert all(torch.equal(one, two) for one, two in zip(student.parameters(), again.parameters(), strict=True))
    _, taught, _ = prepare(task, replace(settings, eye_steps=1), 0, cache=cache)
    saw = {id(p) for p in eye(taught)}
    for one, two in zip(student.parameters(), taught.parameters(), strict=True):
        assert torch.equal(one, two) or id(two) in saw
    assert not all(torch.equal(own, new) for own, new in zip(eye(taught), eye(fresh), strict=True))


def test_intervals_are_students():
    # The textbook's sleep data: ten paired differences, 95 % from 0.70 to 2.46.
    extra = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0], [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    first, second = (dict(enumerate(values)) for values in extra)
    found = intervals.paired(second, {**first, 99: 0.0})
    assert (found.n, found.excludes_zero) == (10, True)
    assert found.mean - found.half == pytest.approx(0.7001142, abs=1e-6)
    assert found.mean + found.half == pytest.approx(2.4598858, abs=1e-6)
    alone = intervals.interval([1.0])
    assert alone.show() == "1.0"
    assert not alone.excludes_zero
    assert intervals.paired(first, {}) is None


def test_series_are_means_of_windows():
    series = Series()
    for step in range(7):
        series.add(step, {"value": float(step**2)})
    assert series.history(points=3) == {"step": [1.0, 4.0, 6.0], "value": [1.667, 16.67, 36.0]}
    assert series.history()["value"] == [0.0, 1.0, 4.0, 9.0, 16.0, 25.0, 36.0]
    assert rounded({"a": [123456.0, 7]}) == {"a": [123500.0, 7]}
