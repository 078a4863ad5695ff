"""The command: from two checkpoints and a data set on disk to a student, a table and figures; and after a kill."""

import importlib
import io
import json
import runpy
import shutil
import signal
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset, DatasetDict, Features, Value, load_dataset
from datasets import Image as Feature
from PIL import Image
from preloaded import preloaded
from safetensors.torch import load_file
from tiny_trainer import make_model, make_processor, make_rows, make_trainer
from toys import assert_equal

from steer_optim.vlm.advice import Findings, advise, investigate
from steer_optim.vlm.data import ROW, conversation, numbered
from steer_optim.vlm.train import DataArguments, check_settings, last_checkpoint, load, main
from tests.vlm.zoo import Zoo

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings("ignore:.*(gradient|activation)_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]
SHORT = {"max_steps": 2, "per_device_train_batch_size": 2, "max_completion_length": 4, "use_cpu": True}
SHORT |= {"learning_rate": 0.01, "logging_steps": 1, "disable_tqdm": True, "held_out": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two checkpoints, and a data set of parquet with both splits."""
    folder = tmp_path_factory.mktemp("files")
    for name, seed, size in (("student", 0, 16), ("teacher", 1, 32)):
        make_model(seed=seed, hidden_size=size).save_pretrained(folder / name)
        make_processor().save_pretrained(folder / name)
    (folder / "data").mkdir()
    rows = Dataset.from_list(make_rows())
    rows.to_parquet(folder / "data" / "train.parquet")
    rows.select(range(5)).to_parquet(folder / "data" / "test.parquet")
    return folder


def arguments(folder, out, **options):
    given = {
        "model_name_or_path": folder / "student",
        "teacher_model_name_or_path": folder / "teacher",
        "dataset_name": folder / "data",
        "output_dir": out,
        **SHORT,
        **options,
    }
    return [text for name, value in given.items() for text in (f"--{name}", *str(value).split(" "))]


@pytest.mark.parametrize("lora", [False, True])
def test_a_student_a_table_and_a_figure_come_out(folder, tmp_path, capsys, lora):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    options = {"use_peft": True, "lora_r": 2} if lora else {}
    assert main(arguments(folder, tmp_path / "run", **options)) == 0
    out = tmp_path / "run"
    assert "student after" in capsys.readouterr().out
    found = json.loads((out / "evaluation.json").read_text())
    assert list(found) == ["teacher", "student before", "student after"]
    assert found["teacher"]["kl"] is None
    assert found["student before"]["text_loss"] != found["student after"]["text_loss"]
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [record["row"] for record in answers] == [0, 1, 2]
    assert {"answer", "with_image", "without_image"} <= answers[0].keys()
    assert (out / "training.png").stat().st_size > 10_000
    AutoProcessor.from_pretrained(out)
    student = AutoModelForImageTextToText.from_pretrained(out)
    before = AutoModelForImageTextToText.from_pretrained(folder / "student")
    ids = {"input_ids": torch.tensor([[4, 5, 6]])}
    assert not torch.equal(student(**ids).logits, before(**ids).logits)


@pytest.mark.parametrize("name", ["llava", "gemma3", "idefics3", "aya_vision"])
def test_families_are_distilled_from_their_checkpoints(tmp_path, name):
    family = Zoo(name)
    family.model.save_pretrained(tmp_path / "model")
    family.processor.save_pretrained(tmp_path / "model")
    red = Image.new("RGB", (16, 16), "red")
    rows = [{"prompt": "ab cd", "images": [red] * (i % 3), "answer": "x"} for i in range(12)]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    paths = {"model_name_or_path": tmp_path / "model", "teacher_model_name_or_path": tmp_path / "model"}
    options = {**paths, "dataset_name": tmp_path / "rows.parquet", "decomposition": "vgs", "max_steps": 1}
    assert main(arguments(tmp_path, tmp_path / "run", **options)) == 0
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    # Teacher and student are the same, up to bfloat16 in the teacher.
    assert state["log_history"][0]["steer/loss/std"] == pytest.approx(0, abs=0.05)


COMMAND = """
import os, pathlib, runpy, signal, threading, time
from steer_optim.vlm.train import last_checkpoint

folder = os.environ.get("KILLED_AT_A_CHECKPOINT_IN")

def kill():
    while last_checkpoint(pathlib.Path(folder)) is None:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)

if folder:
    threading.Thread(target=kill, daemon=True).start()
runpy.run_module("steer_optim.vlm.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_command(folder, tmp_path):
    options = {"max_steps": 15, "save_steps": 4, "save_total_limit": 2, "logging_steps": 3, "eval_strategy": "steps"}
    options |= {"eval_steps": 5, "decomposition": "vgs-frozen", "gradient_accumulation_steps": 2}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with preloaded(Path(__file__).parent, "steer_optim.vlm.train", "peft") as server:

        def run(out, **environment):
            (done,) = server.run(COMMAND, arguments(folder, out, **options), each=[environment])
            return done

        done = run(killed, KILLED_AT_A_CHECKPOINT_IN=str(killed))
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (killed / "answers.jsonl").exists()
        for out in (killed, whole):
            done = run(out)
            assert done.returncode == 0, done.stderr
    assert_equal(load_file(killed / "model.safetensors"), load_file(whole / "model.safetensors"))
    for file in ("evaluation.json", "answers.jsonl"):
        assert (killed / file).read_text() == (whole / file).read_text()


def test_a_finished_run_trains_no_further(folder, tmp_path, capsys):
    command = arguments(folder, tmp_path / "run", max_steps=1)
    assert main(command) == 0
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    (tmp_path / "run" / "answers.jsonl").unlink()  # killed after the last step
    for said in ("student after", "is finished"):
        assert main(command) == 0
        assert said in capsys.readouterr().out
        assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
        assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    assert main(arguments(folder, tmp_path / "run", max_steps=3)) == 0
    assert main(command) == 2
    assert "has more steps than --max_steps 1" in capsys.readouterr().err
    for epochs, steps in ((0.5, 3), (1, 6), (0.5, 6)):  # six steps an epoch
        assert main(arguments(folder, tmp_path / "run", max_steps=-1, num_train_epochs=epochs)) == 0
        assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == steps


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_that_was_killed_at_its_end_keeps_the_best_model(folder, tmp_path, lora):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    options |= {"learning_rate": 50 if lora else 1, "use_peft": lora}  # the second step overshoots
    command, out = arguments(folder, tmp_path / "run", **options), tmp_path / "run"
    assert main(command) == 0
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"].endswith("checkpoint-1")
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    best = load_file(out / name)
    (out / "answers.jsonl").unlink()
    assert main(command) == 0
    assert_equal(load_file(out / name), best)


def test_columns_that_are_not_read_are_named(tmp_path, capsys):
    rows = [{"prompt": "what", "image_path": "red.png"}] * 3
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    load(DataArguments(dataset_name=str(tmp_path / "rows.parquet")))
    assert "columns that are not read: image_path" in capsys.readouterr().err


def test_an_incomplete_checkpoint_is_left_aside(tmp_path, capsys):
    assert last_checkpoint(tmp_path) is None
    for step, text in ((5, '{"global_step": 5}'), (10, '{"global_step": 10}'), (15, '{"global_'), (20, "{}")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").touch()
    (tmp_path / "checkpoint-25").mkdir()
    (tmp_path / "checkpoint-10" / "rng_state_1.pth").write_bytes(b"half")
    (tmp_path / "checkpoint-20" / "optimizer.pt").unlink()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")
    said = capsys.readouterr().err
    assert "checkpoint-15 is incomplete" in said
    assert "checkpoint-20 is incomplete and skipped: --save_only_model" in said


def test_other_settings_in_the_same_directory_are_refused(tmp_path):
    check_settings(tmp_path, {"gamma": 2.0, "logging_steps": 1}, trained=False, write=True)
    check_settings(tmp_path, {"gamma": 3.0}, trained=False, write=True)
    check_settings(tmp_path, {"gamma": 3.0, "logging_steps": 5}, trained=True, write=True)
    with pytest.raises(ValueError, match=r"gamma is 3.0 there and 2.0 here"):
        check_settings(tmp_path, {"gamma": 2.0}, trained=True, write=True)


def test_a_run_without_checkpoints_is_not_overwritten(folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(arguments(folder, out, save_strategy="no", held_out=0)) == 0
    weights = (out / "model.safetensors").read_bytes()
    assert main(arguments(folder, out, save_strategy="no", held_out=0, gamma=3.0)) == 2
    assert "gamma is 2.0 there and 3.0 here" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == weights


SOURCES = {
    "parquet": lambda rows, path: rows.to_parquet(path / "rows.parquet"),
    "lines": lambda rows, path: rows.remove_columns("images").to_json(path / "rows.jsonl"),
    "saved": lambda rows, path: DatasetDict({"train": rows}).save_to_disk(path / "rows"),
    "saved split": lambda rows, path: rows.save_to_disk(path / "rows"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_data_sets_of_all_kinds_are_read(tmp_path, kind):
    SOURCES[kind](Dataset.from_list(make_rows()), tmp_path)
    (source,) = tmp_path.iterdir()
    if "saved" in kind:  # is not streamed
        assert len(load(DataArguments(dataset_name=str(source), dataset_streaming=True))[1]) == 1
    train, held_out = load(DataArguments(dataset_name=str(source), held_out=4))
    assert (len(train), len(held_out)) == (11, 1)
    assert {row[ROW] for part in (train, held_out) for row in part} == {*range(12)}
    everything, none = load(DataArguments(dataset_name=str(source), held_out=0))
    assert (len(everything), none) == (12, None)


def test_rows_are_not_examined_on_themselves(tmp_path):
    DatasetDict({"test": Dataset.from_list(make_rows())}).save_to_disk(tmp_path / "rows")
    train, held_out = load(DataArguments(dataset_name=str(tmp_path / "rows"), dataset_train_split="test", held_out=4))
    assert (len(train), len(held_out)) == (11, 1)


@pytest.mark.parametrize(("text", "said"), [("", "no rows"), ("{", "cannot be read: ")])
def test_files_that_hold_no_rows_are_named(tmp_path, text, said):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(ValueError, match=rf"rows.jsonl.* {said}|{said}"):
        load(DataArguments(dataset_name=str(tmp_path / "rows.jsonl")))


def test_a_stream_is_trained_on(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 s
    out = tmp_path / "run"
    assert main(arguments(folder, out, dataset_streaming=True)) == 0
    assert len((out / "answers.jsonl").read_text().splitlines()) == 3


def test_a_bad_row_of_a_stream_is_named_by_its_number(tmp_path):
    rows = [{"prompt": "is it", "images": [{"bytes": x, "path": None}]} for x in (png(), b"not a picture")]
    features = Features({"prompt": Value("string"), "images": [Feature()]})
    for split in ("train", "test"):
        (tmp_path / "rows").mkdir(exist_ok=True)
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows" / f"{split}.parquet")
    train, held_out = load(DataArguments(dataset_name=str(tmp_path / "rows"), dataset_streaming=True))
    for part in (numbered(train), held_out):
        first, second = part
        assert conversation(first)[0]["content"][0]["image"].size == (8, 8)
        with pytest.raises(ValueError, match="row 1 of the data set: cannot identify image"):
            conversation(second)


def test_a_streamed_test_split_without_rows_is_not_examined(tmp_path):
    features = Features({"prompt": Value("string")})
    for split, prompts in (("train", ["is it"]), ("test", [])):
        Dataset.from_dict({"prompt": prompts}, features=features).to_parquet(tmp_path / f"{split}.parquet")
    _, held_out = load(DataArguments(dataset_name=str(tmp_path), dataset_streaming=True))
    assert held_out is None


def test_images_in_a_streamed_archive_are_read(tmp_path):
    """From their place in the archive; after a map, whose features are unknown, they are decoded already."""
    with ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("0.png", png())
        archive.writestr("metadata.jsonl", json.dumps({"file_name": "0.png", "prompt": "is it"}))
    rows = load_dataset("imagefolder", data_files=str(tmp_path / "images.zip"), split="train", streaming=True)
    for source, kind in ((rows, dict), (rows.map(lambda row: row), Image.Image)):
        (row,) = numbered(source)
        assert isinstance(row["image"], kind)
        assert conversation(row)[0]["content"][0]["image"].getpixel((0, 0)) == (255, 0, 0)


def png():
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "png")
    return file.getvalue()


def test_paths_in_a_stream_are_relative_to_its_file(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "is it", "images": ["red.png"]}))
    source = DataArguments(dataset_name=str(tmp_path / "rows.jsonl"), dataset_streaming=True, held_out=0)
    (row,) = numbered(load(source)[0])  # as the trainer numbers them
    assert conversation(row)[0]["content"][0]["image"].getpixel((0, 0)) == (255, 0, 0)


def test_measuring_trains_nothing_and_advises(folder, tmp_path, capsys):
    assert main([*arguments(folder, tmp_path / "run"), "--measure_only"]) == 0
    text = capsys.readouterr().out
    assert "angles between gradients: std, vis" in text
    assert "Advice: --decomposition" in text
    assert not [*(tmp_path / "run").glob("*.*")]
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-1" / "optimizer.pt").touch()
    (tmp_path / "run" / "checkpoint-1" / "trainer_state.json").write_text('{"global_step": 1}')
    (tmp_path / "run" / "run.json").write_text("{}")
    assert main([*arguments(folder, tmp_path / "run", gamma=3.0), "--measure_only"]) == 0  # of a trained run, too


def test_a_batch_with_nothing_to_learn_has_no_dose(tmp_path):
    """Such as one whose responses were all dropped: the mean over batches stays a number."""
    trainer = make_trainer(tmp_path, teacher=make_model(seed=0))
    found, _ = investigate(trainer, numbered(make_rows()[:2]))
    assert found.dose == 0


def test_the_advice_is_that_of_the_page():
    rest = {"angles": {}, "dose": 20.0, "norms": {}, "losses": {"std": 0.3, "lang": 0.1}, "visual": 0.9}
    for language, choice in (
        ((0.5, 0.1), "vgs-frozen"),
        ((0.1, 0.1), "standard"),
        ((-0.5, 0.1), "standard"),
        (None, "standard"),
    ):
        assert f"Advice: --decomposition {choice}." in advise(Findings(language=language, **rest))


def test_lines_with_contents_of_both_kinds_are_read(tmp_path):
    """Strings and lists in one column; paths are relative to the file."""
    red = Image.new("RGB", (8, 8), "red")
    red.save(tmp_path / "red.png")
    parts = [{"type": "image"}, {"type": "text", "text": "what is it"}]
    lines = [
        {
            "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": parts}],
            "images": ["red.png"],
        },
        {"messages": [{"role": "user", "content": "is it"}], "images": [], "row": "theirs"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    train, _ = load(DataArguments(dataset_name=str(tmp_path / "rows.jsonl"), held_out=0))
    system, user = conversation(train[0])
    assert system["content"] == [{"type": "text", "text": "be brief"}]
    assert [part["type"] for part in user["content"]] == ["image", "text"]
    assert user["content"][0]["image"].getpixel((0, 0)) == (255, 0, 0)
    assert user["content"][1]["text"] == "what is it"
    assert train[1][ROW] == 1


WRONG = {
    "negative": ({"held_out": -1}, "--held_out must be at least 0"),
    "too few rows": ({"per_device_train_batch_size": 100}, "12 rows to train on, and a step takes 100"),
    "no model": ({"model_name_or_path": "nowhere"}, "nowhere"),
    "unknown component": ({"rule": 'Steer("foo")'}, "foo"),
    "no student": ({"model_name_or_path": None}, "--model_name_or_path is needed"),
    "no teacher": ({"teacher_model_name_or_path": None}, "--teacher_model_name_or_path is needed"),
    "no data": ({"dataset_name": None}, "--dataset_name is needed"),
    "no such split": ({"dataset_train_split": "trian"}, "has the splits train, test"),
    "no such test split": ({"dataset_test_split": "validatoin"}, "choose one with --dataset_test_split"),
    "no such option": ({"gama": 1}, "gama"),
    "no such file": ({"dataset_name": "rows.jsonl"}, "there is no file or folder rows.jsonl"),
    "no rows a step": ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1; got 0"),
    "no Gramian": ({"refresh_every": 0}, "refresh_every must be at least 1; got 0"),
    "negative rate": ({"learning_rate": -1.0}, "learning_rate must be at least 0; got -1.0"),
    "gamma beside a rule": (
        {"gamma": 3.0, "rule": 'Steer("vis")'},
        '--gamma 3.0 is not read by --decomposition vgs-frozen with --rule Steer("vis")',
    ),
    "gamma of a plain sum": ({"gamma": 3.0, "decomposition": "standard"}, "not read by --decomposition standard:"),
    "quantile of no gate": ({"quantile": 0.5}, "--quantile 0.5 is not read by --decomposition vgs-frozen"),
    "LoRA left out": ({"lora_r": 4}, "--lora_r is not read without --use_peft"),
    "half precision": ({"dtype": "float16"}, "--dtype float16 is not supported"),
    "nothing to evaluate on": ({"eval_strategy": "steps", "held_out": 0}, "--eval_strategy needs held-out rows"),
    "no checkpoint": ({"resume_from_checkpoint": "True"}, "--resume_from_checkpoint True is no folder of a checkpoint"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_command_says_what_to_change(folder, tmp_path, capsys, name):
    options, said = WRONG[name]
    given = arguments(folder, tmp_path, **options)
    while "None" in given:
        del given[given.index("None") - 1 : given.index("None") + 1]
    assert main(given) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("role", ["model_name_or_path", "teacher_model_name_or_path"])
def test_an_adapter_without_its_model_is_refused(folder, tmp_path, capsys, role):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert main(arguments(folder, tmp_path / "run", **{role: tmp_path})) == 2
    assert f"{tmp_path} holds an adapter only" in capsys.readouterr().err


def test_a_checkpoint_of_another_program_is_resumed_from_only_if_it_is_named(folder, tmp_path, capsys):
    assert main(arguments(folder, tmp_path, save_steps=1)) == 0
    (tmp_path / "run.json").unlink()
    assert main(arguments(folder, tmp_path, max_steps=3)) == 2
    assert "checkpoint-2 is not from this command" in capsys.readouterr().err
    assert main(arguments(folder, tmp_path, max_steps=3, resume_from_checkpoint=tmp_path / "checkpoint-2")) == 0


@pytest.mark.parametrize("streams", [False, True])
def test_a_configuration_of_a_file_is_refused(tmp_path, streams):
    Dataset.from_list(make_rows()).to_parquet(tmp_path / "rows.parquet")
    data = DataArguments(dataset_name=str(tmp_path / "rows.parquet"), dataset_config="de", dataset_streaming=streams)
    with pytest.raises(ValueError, match="--dataset_config de is not read for a file"):
        load(data)


def test_a_saved_data_set_without_rows_is_named(tmp_path):
    Dataset.from_list(make_rows()[:1]).select([]).save_to_disk(tmp_path / "rows")
    with pytest.raises(ValueError, match="rows has no rows"):
        load(DataArguments(dataset_name=str(tmp_path / "rows")))


def test_a_damaged_checkpoint_is_named(folder, tmp_path, capsys):
    damaged = tmp_path / "student"
    shutil.copytree(folder / "student", damaged)
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert main(arguments(folder, tmp_path / "run", model_name_or_path=damaged)) == 2
    assert f"{damaged} or {folder / 'teacher'} cannot be loaded: " in capsys.readouterr().err


def test_the_configurations_of_accelerate_are_found(capsys, monkeypatch):
    import yaml

    def run(*names):
        monkeypatch.setattr("sys.argv", ["configs", *names])
        runpy.run_module("steer_optim.vlm.configs", run_name="__main__")
        return capsys.readouterr().out.split()

    paths = run()
    assert len(paths) == 3
    for path in paths:
        with open(path) as file:
            assert yaml.safe_load(file)["mixed_precision"] == "bf16"
    assert run("fsdp2") == [path for path in paths if "fsdp2" in path]
    with pytest.raises(SystemExit, match="choose from"):
        run("zero3")


def test_a_missing_package_names_the_extra(monkeypatch):
    for module, package in (("trainer", "trl"), ("train", "datasets")):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(sys.modules, f"steer_optim.vlm.{module}")
        with pytest.raises(ModuleNotFoundError, match=rf"there is no {package}: pip install 'steer_optim\[trl\]'"):
            importlib.import_module(f"steer_optim.vlm.{module}")
