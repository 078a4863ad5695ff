"""The main job: its task is what it says, and all of it leaves what was promised, by the command that a user calls."""

import dataclasses
import json
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

for needed in ("sklearn", "datasets", "trl", "tokenizers", "tqdm", "transformers", "matplotlib"):
    pytest.importorskip(needed)

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import distill_digits  # noqa: E402
from digits import checkpoints, models, task  # noqa: E402
from trl import ModelConfig, TrlParser  # noqa: E402

from steer_optim.vlm import train  # noqa: E402
from steer_optim.vlm.trainer import SteeredDistillationConfig  # noqa: E402

TINY = {
    "rows": 64,
    "steps": 2,
    "batch_size": 8,
    "teacher_steps": 3,
    "reader_steps": 3,
    "student_steps": 2,
    "held_out": 8,
}
SETTINGS = dataclasses.replace(distill_digits.Settings(seed=0), **TINY)


pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")


@pytest.fixture(scope="module")
def rows():
    return list(task.make_dataset(64, held_out=False, seed=0))


def pictures(*, held_out):
    """What the digits show, by their pixels as an image has them."""
    images, labels = task.digits_of(held_out=held_out)
    scaled = (images * 255 / 16).round().astype("uint8")
    return {image.tobytes(): int(label) for image, label in zip(scaled, labels, strict=True)}


def test_no_held_out_digit_is_trained_on():
    assert len(task.digits_of(held_out=False)[1]) + len(task.digits_of(held_out=True)[1]) == 1797
    assert not pictures(held_out=False).keys() & pictures(held_out=True).keys()


def test_answers_are_right_about_the_digits_of_the_image(rows):
    cells = {"top row": (0, 1), "bottom row": (2, 3), "left column": (0, 2), "right column": (1, 3)}
    shown, kinds = pictures(held_out=False), set()
    for row in rows:
        (image,), (message,) = row["images"], row["messages"]
        corners = ((0, 0), (8, 0), (0, 8), (8, 8))
        grid = [shown[image.convert("L").crop((x, y, x + 8, y + 8)).tobytes()] for x, y in corners]
        operation, line = re.search(r"is the (\w+) of the (\w+ \w+) \?", message["content"]).groups()
        first, second = (grid[cell] for cell in cells[line])
        sign, result = ("+", first + second) if operation == "sum" else ("max", max(first, second))
        assert row["answer"] == f"<reason> {first} {sign} {second} = {result} </reason> {result}"
        kinds.add((operation, line))
    assert len(kinds) == 8


def test_every_word_has_a_token_and_no_batch_is_padded(rows):
    processor = models.make_processor()
    problems = models.Problems(processor, task.make_dataset(64, held_out=False, seed=0))
    prompts, answers = problems[:]
    for ids in (prompts.image["input_ids"], prompts.text["input_ids"], answers.response_BT):
        assert not torch.isin(ids, torch.tensor([processor.tokenizer.unk_token_id, 0])).any()
    assert answers.response_BT.shape == (64, task.ANSWER_LENGTH)
    assert (answers.response_BT[:, -1] == processor.tokenizer.eos_token_id).all()
    assert processor.batch_decode(answers.response_BT, skip_special_tokens=True) == problems.answers
    assert processor.batch_decode(prompts.text["input_ids"]) == [row["messages"][0]["content"] for row in rows]


@pytest.mark.parametrize(
    ("response", "answer_ok", "perception_ok"),
    [
        ("<reason> 3 + 8 = 11 </reason> 11", 1, 1),
        ("<reason> 3 + 8 = 11 </reason> 11 11", 0, 1),  # did not end
        ("<reason> 3 + 8 = 12 </reason> 12", 0, 1),  # saw, and added wrongly
        ("<reason> 8 + 3 = 11 </reason> 11", 1, 0),  # right by luck: those are not the cells in order
        ("<reason> 3 + 8 = 1 </reason> 1", 0, 1),
        ("", 0, 0),
    ],
)
def test_grade(response, answer_ok, perception_ok):
    assert task.grade([response], ["<reason> 3 + 8 = 11 </reason> 11"]) == (answer_ok, perception_ok)


def test_a_run_refuses_what_is_not_its_own(tmp_path):
    out = tmp_path / "run"
    distill_digits.claim(out, SETTINGS, fresh=False)
    (out / "teacher").mkdir()
    distill_digits.claim(out, SETTINGS, fresh=False)
    other = dataclasses.replace(SETTINGS, seed=1)
    with pytest.raises(ValueError, match=r"other settings.*'seed': 0.*--fresh"):
        distill_digits.claim(out, other, fresh=False)
    assert (out / "teacher").exists()
    distill_digits.claim(out, other, fresh=True)
    assert not (out / "teacher").exists()

    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds no run"):
        distill_digits.claim(tmp_path, SETTINGS, fresh=True)
    assert (tmp_path / "thesis.tex").exists()


def test_what_was_interrupted_is_done_again(tmp_path):
    def write(path):
        path.mkdir()
        (path / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.once(tmp_path / "teacher", write)
    assert not (tmp_path / "teacher").exists()
    checkpoints.once(tmp_path / "teacher", lambda path: path.mkdir())
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]
    assert not [*(tmp_path / "teacher").iterdir()]


@pytest.mark.parametrize("name", distill_digits.METHODS)
def test_each_method_has_a_rule_for_its_components(name, tmp_path):
    parser = TrlParser((train.DataArguments, SteeredDistillationConfig, ModelConfig))
    command = distill_digits.command(tmp_path, name, SETTINGS)
    _, args, _ = parser.parse_args_and_config(command[3:], fail_with_unknown_args=True)
    method, rule = args.method(), args.make_rule()
    losses = method({view: torch.randn(2, 5, 11) for view in method.views}, torch.ones(2, 5, dtype=torch.bool))
    weights, _ = rule(torch.eye(len(losses), dtype=torch.float64), list(losses))
    assert (weights > 0).all()


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A run of two methods whose commands are called in this process."""
    out = tmp_path_factory.mktemp("digits") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill_digits.subprocess, "run", lambda command, **_: train.main(command[3:]))
        distill_digits.claim(out, SETTINGS, fresh=False)
        distill_digits.work(out, SETTINGS, ["standard", "vgs-frozen"])
    return out


@pytest.mark.slow
def test_a_run_leaves_the_table(out):
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert list(rows) == ["teacher", "initial student", "standard", "vgs-frozen"]
    for row in rows.values():
        assert all(map(math.isfinite, [row["answer"], row["perception"], row["text_loss"]]))
    assert rows["standard"]["eta"] == 1
    assert rows["standard"]["angle"] is None
    assert rows["vgs-frozen"]["eta"] != 1
    assert 0 < rows["vgs-frozen"]["angle"] < 180
    lines = (out / "table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:6]] == list(rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["angles_by_decile", "losses", "geometry-vgs-frozen"])
def test_a_run_leaves_figures(out, name):
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["teacher", "student-vgs-frozen"])
def test_a_run_leaves_models_that_answer(out, rows, name):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from steer_optim.vlm import render
    from steer_optim.vlm.data import conversation

    model, loading = AutoModelForImageTextToText.from_pretrained(out / name, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    prompts = render(AutoProcessor.from_pretrained(out / name), [conversation(rows[0])])
    assert model.generate(**prompts.image, do_sample=False).shape[1] > prompts.image["input_ids"].shape[1]


@pytest.mark.slow
def test_what_is_finished_is_found_again(out, monkeypatch, capsys):
    before = json.loads((out / "results.json").read_text())
    monkeypatch.setattr(distill_digits.subprocess, "run", None)
    distill_digits.work(out, SETTINGS, ["vgs-frozen"])
    assert json.loads((out / "results.json").read_text()) == before
    assert f"{out / 'teacher'}: found" in capsys.readouterr().out


@pytest.mark.slow
def test_the_plain_loop_runs(out, tmp_path, monkeypatch, capsys):
    paths = [word for name in ("student", "teacher", "data") for word in (f"--{name}", str(out / name))]
    options = ["--out", str(tmp_path / "out"), "--steps", "2", "--batch-size", "4"]
    monkeypatch.setattr(sys, "argv", ["plain_loop_vgs.py", *paths, *options])
    runpy.run_path(str(EXAMPLES / "plain_loop_vgs.py"), run_name="__main__")
    assert re.search(r"step 0: .*degrees apart.*of 8 answers are right", capsys.readouterr().out, re.DOTALL)
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("file", sorted((EXAMPLES / "results").glob("*.json")), ids=lambda file: file.stem)
def test_the_committed_results_are_of_the_settings_that_the_example_has(file):
    result = json.loads(file.read_text())
    seed = int(file.stem.removeprefix("digits-seed"))
    assert result["settings"] == dataclasses.asdict(distill_digits.Settings(seed))
    methods = ["standard", "vgs-frozen", "vgs"] if seed < 3 else ["standard", "vgs", "reweighting"]
    assert list(result["rows"]) == ["teacher", "initial student", *methods]
