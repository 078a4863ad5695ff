"""The main job: its task is what it says, `--quick` leaves all that was promised, and interruptions change nothing."""

import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from preloaded import preloaded

for needed in ("sklearn", "tensorboard", "tokenizers", "tqdm", "transformers", "matplotlib"):
    pytest.importorskip(needed)

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import digits  # noqa: E402
import digits_models  # noqa: E402
import digits_run  # noqa: E402
import distill_digits  # noqa: E402

from steer_optim.vlm import Prompts, Rollout, append_response, response_logits, score, text_only  # noqa: E402

METHODS = distill_digits.methods(distill_digits.Settings(seed=0, device="cpu"))


@pytest.fixture(scope="module")
def tokenizer():
    return digits.make_tokenizer()


@pytest.fixture(scope="module")
def problems(tokenizer):
    task = digits.DigitProblems(tokenizer, held_out=False)
    return task.draw(64, generator=torch.Generator().manual_seed(0))


def test_no_held_out_digit_is_trained_on(tokenizer):
    halves = [digits.DigitProblems(tokenizer, held_out=held_out).pixels for held_out in (False, True)]
    train, test = ({image.numpy().tobytes() for image in half} for half in halves)
    assert len(halves[0]) + len(halves[1]) == 1797
    assert not train & test


def test_answers_are_right_about_the_digits_of_the_image(tokenizer):
    task = digits.DigitProblems(tokenizer, held_out=False)
    problems = task.draw(64, generator=torch.Generator().manual_seed(0))
    chosen = torch.randint(len(task.digits), (64, 4), generator=torch.Generator().manual_seed(0))
    cells = {"top row": (0, 1), "bottom row": (2, 3), "left column": (0, 2), "right column": (1, 3)}
    kinds = set()
    for row, answer, grid in zip(problems.prompt["input_ids"], problems.answers, task.digits[chosen], strict=True):
        operation, line = re.search(r"is the (\w+) of the (\w+ \w+) \?", tokenizer.decode(row)).groups()
        first, second = (int(grid[cell]) for cell in cells[line])
        sign, result = ("+", first + second) if operation == "sum" else ("max", max(first, second))
        assert answer == f"<reason> {first} {sign} {second} = {result} </reason> {result}"
        kinds.add((operation, line))
    assert len(kinds) == 8


def test_every_word_has_a_token_and_no_batch_is_padded(tokenizer, problems):
    ids = torch.cat([problems.prompt["input_ids"], problems.answer_BT], dim=1)
    assert not torch.isin(ids, torch.tensor([tokenizer.unk_token_id, tokenizer.pad_token_id])).any()
    assert problems.answer_BT.shape == (64, digits.ANSWER_LENGTH)
    assert (problems.answer_BT[:, -1] == tokenizer.eos_token_id).all()


def test_the_patches_of_a_digit_stand_together():
    images = torch.arange(2 * 4 * 64.0).view(2, 4, 8, 8)
    patches = digits.patches(images).view(2, 4, 2, 2, 4, 4)
    for digit in range(4):
        for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
            block = images[1, digit, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
            assert torch.equal(patches[1, digit, y, x], block)


@pytest.mark.parametrize(
    ("response", "answer_ok", "perception_ok"),
    [
        ("<reason> 3 + 8 = 11 </reason> 11 <eos> <pad>", 1, 1),
        ("<reason> 3 + 8 = 11 </reason> 11", 0, 1),  # did not end
        ("<reason> 3 + 8 = 12 </reason> 12 <eos>", 0, 1),  # saw, and added wrongly
        ("<reason> 8 + 3 = 11 </reason> 11 <eos>", 1, 0),  # right by luck: those are not the cells in order
        ("<reason> 3 + 8 = 1 </reason> 1 <eos>", 0, 1),
    ],
)
def test_grade(response, answer_ok, perception_ok):
    assert digits.grade([response], ["<reason> 3 + 8 = 11 </reason> 11"]) == (answer_ok, perception_ok)


def test_a_run_refuses_what_is_not_its_own(tmp_path):
    run = digits_run.Run(tmp_path / "run", {"steps": 200, "seed": 0})
    (run.path / "teacher").mkdir()
    assert digits_run.Run(run.path, {"steps": 200, "seed": 0}).has("teacher")
    with pytest.raises(ValueError, match=r"seed is 0 there and 1 here; steps is 200 there and 100 here.*--fresh"):
        digits_run.Run(run.path, {"steps": 100, "seed": 1})
    assert not digits_run.Run(run.path, {"steps": 100, "seed": 1}, fresh=True).has("teacher")

    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds no run"):
        digits_run.Run(tmp_path, {}, fresh=True)
    assert (tmp_path / "thesis.tex").exists()
    with pytest.raises(ValueError, match="is a file"):
        digits_run.Run(tmp_path / "thesis.tex", {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "argument --steps: must be 1 or more; got 0"),
        (["--rule", "magic"], "invalid choice: 'magic'"),
        (["--device", "nowhere"], "--device must be one that torch can use here; got 'nowhere'"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["distill_digits.py", "--out", str(tmp_path / "run"), *arguments])
    with pytest.raises(SystemExit) as refusal:
        distill_digits.main()
    assert refusal.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", METHODS)
def test_each_method_has_a_rule_for_its_components(name):
    method, rule = METHODS[name]
    views = {view: torch.randn(2, 5, 11) for view in method.views}
    losses = method(views, torch.ones(2, 5, dtype=torch.bool))
    weights, _ = rule(torch.eye(len(losses), dtype=torch.float64), list(losses))
    assert (weights > 0).all()


@pytest.mark.parametrize("name", METHODS)
def test_what_is_scored_has_the_gradients_of_all_views(name, tokenizer, problems):
    method = METHODS[name].losses
    torch.manual_seed(0)
    teacher, student, prior = (digits_models.make_model(tokenizer, hidden_size=16) for _ in range(3))
    prompts = Prompts(problems.prompt, text_only(problems.prompt, student.config))
    sampled = Rollout(problems.answer_BT, torch.ones_like(problems.answer_BT, dtype=torch.bool))
    image, text = (append_response(batch, sampled, student.config) for batch in (prompts.image, prompts.text))

    def every_view():
        """Logits, and a graph in each."""
        of = {"student": (student, image), "student_text": (student, text), "prior": (prior, text)}
        of |= {"teacher": (teacher, image), "teacher_text": (teacher, text)}
        return {view: response_logits(*inputs, digits.ANSWER_LENGTH) for view, inputs in of.items()}

    gradients = []
    for views in (score(student, teacher, prompts, sampled, method=method, prior=prior), every_view()):
        student.zero_grad()
        sum(method(views, sampled.scored_BT).values()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
    # Two orders of float32 sums: over 43 ids here, then over the rows of the batch, about 1e-6 of the norm each.
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


# The example, but for a signal to itself in place of one checkpoint: the steps since the last one are lost.
INTERRUPTED = """
import os, runpy, signal, sys
import digits_run

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a suite in the background has inherited as ignored
phase, step, number = sys.argv.pop(1), int(sys.argv.pop(1)), int(sys.argv.pop(1))
save = digits_run.Steps._save

def save_or_stop(self, at):
    os.kill(os.getpid(), number) if (self.phase, at) == (phase, step) else save(self, at)

digits_run.Steps._save = save_or_stop
runpy.run_path("distill_digits.py", run_name="__main__")
"""


UNINTERRUPTED = "import runpy; runpy.run_path('distill_digits.py', run_name='__main__')"


@pytest.fixture(scope="module")
def quick():
    with preloaded(EXAMPLES, "distill_digits") as server:

        def run(out, *interruption):
            options = ["--quick", "--refresh-every", "2", "--device", "cpu", "--out", out]
            (done,) = server.run(INTERRUPTED if interruption else UNINTERRUPTED, [*interruption, *options])
            return done

        yield run


@pytest.fixture(scope="module")
def out(quick, tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "quick"
    done = quick(out)
    assert done.returncode == 0, done.stderr
    assert (out / "table.md").read_text() in done.stdout
    return out


@pytest.mark.slow
def test_quick_leaves_the_table(out):
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert list(rows) == ["teacher", "initial student", "standard", "vgs-frozen"]
    for name, row in rows.items():
        scores = [row["answer"], row["perception"], row["text_loss"]]
        steps = [row["angle"], row["eta"], row["seconds"]]
        assert all(map(math.isfinite, scores if name in ("teacher", "initial student") else scores + steps))
    assert rows["standard"]["eta"] == 1
    assert rows["vgs-frozen"]["eta"] >= 1 / 3  # gamma = 2, and |vis| < |std| in the quick run
    assert rows["vgs-frozen"]["eta"] != 1
    lines = (out / "table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:6]] == list(rows)


@pytest.mark.slow
def test_quick_records_what_was_measured(out):
    record = json.loads((out / "student-vgs-frozen" / "record.json").read_text(), parse_constant=pytest.fail)  # no NaN
    settings = json.loads((out / "settings.json").read_text())
    fresh = [step % settings["refresh_every"] == 0 for step in range(settings["steps"])]
    assert fresh.count(True) < len(fresh)
    assert [norm is not None for norm in record["steering"]["steer/norm/vis"]] == fresh
    assert None not in record["steering"]["steer/weight/vis"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["angles_by_decile", "losses", "geometry-standard", "geometry-vgs-frozen"])
def test_quick_leaves_figures(out, name):
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard's own imports
def test_quick_leaves_a_log_that_tensorboard_reads(out):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(out / "tensorboard" / "student-vgs-frozen")).Reload()
    assert {"steer/loss/std", "steer/weight/vis", "steer/angle/std~vis"} <= set(log.Tags()["scalars"])
    steps = json.loads((out / "settings.json").read_text())["steps"]
    assert [event.step for event in log.Scalars("steer/weight/vis")] == list(range(steps))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["teacher", "student-standard", "student-vgs-frozen"])
def test_quick_leaves_models_that_answer(out, problems, name):
    from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

    model, loading = Qwen3VLForConditionalGeneration.from_pretrained(out / name, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(out / name)
    question = problems.prompt["input_ids"][0]
    assert tokenizer(tokenizer.decode(question))["input_ids"] == question.tolist()
    answers = model.generate(**problems.prompt, do_sample=False)[:, len(question) :]
    assert answers.shape == problems.answer_BT.shape


@pytest.mark.slow
def test_a_run_that_is_interrupted_and_killed_ends_as_one_that_is_not(quick, out, tmp_path):
    again = tmp_path / "again"
    interrupted = quick(again, "student-standard", 3, 2)
    assert interrupted.returncode == 130
    assert "Traceback" not in interrupted.stderr
    assert "the same command goes on from there" in interrupted.stderr.splitlines()[-1]

    killed = quick(again, "student-vgs-frozen", 5, 9)
    assert killed.returncode == -9
    assert "teacher: found in" in killed.stdout
    assert "student-standard: resuming at step 2 of 6 steps" in killed.stdout

    resumed = quick(again)
    assert resumed.returncode == 0, resumed.stderr
    assert "student-vgs-frozen: resuming at step 4 of 6 steps" in resumed.stdout
    assert rows(again) == rows(out)
    for phase in ("student-standard", "student-vgs-frozen"):
        for kind in ("steering", "components"):
            records = [json.loads((path / phase / "record.json").read_text())[kind] for path in (again, out)]
            assert records[0] == records[1]
    assert not [*again.glob("*.checkpoint*"), *again.glob("*.partial")]


def rows(out):
    """The table without what the clock says."""
    rows = json.loads((out / "results.json").read_text())["rows"]
    return {name: {key: value for key, value in row.items() if key != "seconds"} for name, row in rows.items()}


@pytest.mark.parametrize("file", sorted((EXAMPLES / "results").glob("*.json")), ids=lambda file: file.stem)
def test_the_committed_results_are_of_the_settings_that_the_example_has(file):
    result = json.loads(file.read_text())
    seed = int(file.stem.removeprefix("digits-seed"))
    assert result["settings"] == dataclasses.asdict(distill_digits.Settings(seed, "cpu"))
    assert list(result["rows"]) == ["teacher", "initial student", "standard", "vgs-frozen", "vgs"]
