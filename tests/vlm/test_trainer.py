"""The trainer on TRL: equal to a plain loop on the same responses, in one process and in two; and resumed."""

import base64
import copy
import datetime
import math
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy
import pytest
import torch
from preloaded import preloaded, two_processes
from toys import assert_equal

pytest.importorskip("trl")

import tiny_trainer
from datasets import Dataset
from PIL import Image
from tiny_llava import COLOURS, WORDS
from tiny_trainer import make_model, make_processor, make_rows, make_trainer, plain_loop, recorded
from transformers.optimization import Adafactor

from steer_optim import Steer
from steer_optim.vlm.data import ROW, Rows, answer, conversation, numbered, picture
from steer_optim.vlm.distillation import DECOMPOSITIONS
from steer_optim.vlm.examination import examine
from steer_optim.vlm.trainer import (
    MicroBatch,
    SteeredDistillationConfig,
    SteeredDistillationTrainer,
    _fill_state,
    _numbers,
    _round,
)
from tests.vlm.zoo import Zoo

pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings("ignore:.*(gradient|activation)_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]


def losses_of(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("decomposition", ["vgs", "vgs-frozen"])
def test_training_equals_a_plain_loop_on_the_same_responses(tmp_path, decomposition, lora):
    trainer = make_trainer(tmp_path, decomposition=decomposition, lora=lora)
    batches = recorded(trainer)
    trainer.train()
    steps = list(zip(batches[::2], batches[1::2], strict=True))
    student, log = plain_loop(steps, decomposition, lora=lora)
    for name, parameter in student.named_parameters():  # the trainer's optimizer has two groups, and sums over them
        torch.testing.assert_close(trainer.model.get_parameter(name), parameter, rtol=1e-5, atol=2e-7)
    for entry, (norm, trained) in zip(losses_of(trainer), log, strict=True):
        assert entry["grad_norm"] == pytest.approx(norm, rel=1e-6)
        # The loss that is shown is the one that is trained.
        assert entry["loss"] == pytest.approx(trained, rel=1e-6)
        weighted = [entry[f"steer/weight/{name}"] * entry[f"steer/loss/{name}"] for name in ("std", "vis")]
        lp = entry.get("steer/weight/lp", 0.0) * entry.get("steer/loss/lp", 0.0)
        assert entry["loss"] == pytest.approx(sum(weighted) + lp, rel=1e-5)


@pytest.fixture(scope="module")
def train_in_two_processes(tmp_path_factory):
    here = Path(tiny_trainer.__file__).parent
    with preloaded(here, "tiny_trainer", ACCELERATE_USE_CPU="true") as server:

        def run(*arguments):
            out = tmp_path_factory.mktemp("two")
            code = "import tiny_trainer, warnings; warnings.simplefilter('ignore'); tiny_trainer.main()"
            done = server.run(code, [str(out), *arguments], each=two_processes())
            assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
            return [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in range(2)]

        yield run


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize(("adapters", "decomposition"), [("whole", "vgs"), ("whole", "vgs-frozen"), ("lora", "vgs")])
def test_two_processes_equal_one_on_the_same_responses(train_in_two_processes, way, adapters, decomposition):
    """The rows of a step lie on both; one has no image, one has two."""
    (kept, whole, log), (others, other_whole, _) = train_in_two_processes(way, adapters, decomposition)
    assert_equal(whole, other_whole)
    parts = [[MicroBatch(*a, count=None), MicroBatch(*b, count=None)] for a, b in zip(kept, others, strict=True)]
    steps = [first + second for first, second in zip(parts[::2], parts[1::2], strict=True)]
    student, expected = plain_loop(steps, decomposition, lora=adapters == "lora")
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(whole[name], parameter.detach(), rtol=1e-5, atol=2e-7)
    for entry, (norm, trained) in zip(log, expected, strict=True):
        assert (entry["grad_norm"], entry["loss"]) == pytest.approx((norm, trained), rel=1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, lora):
    """It goes on in the middle of the second epoch, between two Gramians and between two lines of the log."""
    options = {
        "max_steps": 8,
        "save_steps": 5,
        "logging_steps": 2,
        "lora": lora,
        "optim": "adamw_torch",
        "decomposition": "vgs-frozen",
    }
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert_equal(resumed.model.state_dict(), whole.model.state_dict())
    for found, expected in zip(losses_of(resumed), losses_of(whole), strict=True):
        found, expected = ({k: v for k, v in x.items() if k != "step_time"} for x in (found, expected))
        assert found == expected


def test_training_after_an_interrupt_within_a_step_begins_a_step(tmp_path):
    trainer, batches = make_trainer(tmp_path, max_steps=1), []
    compute_loss = trainer.compute_loss

    def interrupted(model, inputs, **options):
        batches.append(inputs)
        if len(batches) == 2:
            raise KeyboardInterrupt
        return compute_loss(model, inputs, **options)

    trainer.compute_loss = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert len(batches) == 4
    assert batches[2] is not batches[1]
    assert batches[2].count == batches[3].count == sum(int(x.response.scored_BT.sum()) for x in batches[2:])


def test_a_step_asks_the_teacher_twice_per_micro_batch(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, decomposition="vgs")
    passes = []
    trainer.teacher_model.register_forward_hook(lambda *_: passes.append(1))
    trainer.train()
    assert len(passes) == 2 * 2


def test_bfloat16_is_in_the_products_not_in_the_weights(tmp_path):
    from transformers import LlavaForConditionalGeneration

    make_model(seed=1, hidden_size=32).save_pretrained(tmp_path / "teacher")
    trainer = make_trainer(tmp_path, bf16=True, teacher=str(tmp_path / "teacher"), decomposition="vgs-frozen")
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert {p.dtype for x in (trainer.teacher_model, trainer.prior) for p in x.parameters()} == {torch.bfloat16}
    seen = []
    trainer.model.model.language_model.layers[0].mlp.register_forward_hook(lambda m, a, y: seen.append(y.dtype))
    trainer.train()
    assert set(seen) == {torch.bfloat16}
    in_32 = make_trainer(tmp_path / "32", decomposition="vgs-frozen")
    in_32.train()
    assert losses_of(trainer)[0]["loss"] == pytest.approx(losses_of(in_32)[0]["loss"], rel=0.3)
    assert type(trainer.model) is LlavaForConditionalGeneration


def test_a_student_that_rounds_its_updates_away_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match=r"cannot move by a learning rate of 1e-06.*--dtype float32"):
        make_trainer(tmp_path, student=make_model(seed=0).bfloat16(), learning_rate=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make_trainer(tmp_path, learning_rate=1e-6)


def test_evaluation_shows_the_components(tmp_path):
    from datasets import Dataset

    trainer = make_trainer(tmp_path, held_out=Dataset.from_list(make_rows()[:4]), decomposition="vgs")
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_steer/loss/std"])
    assert metrics["eval_steer/loss/vis"] > 0


def test_other_data_may_be_evaluated(tmp_path):
    trainer, rows = make_trainer(tmp_path), Dataset.from_list(make_rows()[:2])
    assert 0 < trainer.evaluate(rows)["eval_loss"] < math.inf
    assert 0 < trainer.evaluate({"more": rows})["eval_more_loss"] < math.inf
    assert 0 < trainer.predict(rows).metrics["test_loss"] < math.inf


def test_rows_without_numbers_are_examined(tmp_path):
    from steer_optim.vlm.examination import examine

    trainer = make_trainer(tmp_path)
    _, records = examine(trainer, trainer.model, Dataset.from_list(make_rows()[:3]))
    assert [record["row"] for record in records] == [0, 1, 2]


def test_outputs_come_with_the_loss_if_asked_for(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    batches = recorded(trainer)
    trainer.train()
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, batches[0])
    both = trainer.compute_loss(trainer.model, batches[0], return_outputs=True)
    assert both == (loss, None)


def png(path):
    Image.new("RGB", (8, 8), "red").save(path)
    return path


BAD = {
    "no prompt": ({"answer": "red"}, "needs a column messages, or prompt.*has the columns answer"),
    "more images than places": (
        {
            "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}],
            "images": [],
        },
        "Number of images provided",
    ),
    "no such file": ({"prompt": "what", "images": ["nowhere.png"]}, "there is no image nowhere.png"),
    "a part that is none": ({"prompt": [{"role": "user", "content": ["what"]}]}, "a list of parts that have a type"),
    "no image": ({"prompt": "what", "images": [b"not a picture"]}, "cannot identify image"),
    "no user": ({"messages": [{"role": "assistant", "content": "it"}]}, "no user message"),
    "text that stands for an image": ({"prompt": "what <image> is it", "images": []}, "no images were passed"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_by_its_number(tmp_path, name):
    bad, match = BAD[name]
    rows = make_rows()[:8]
    rows = [{"prompt": row["messages"], "images": row["images"]} for row in rows[:7]] + [bad]
    trainer = make_trainer(tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=1)
    trainer.train_dataset = Rows(rows)
    with pytest.raises(ValueError, match=f"(?s)row 7 of the data set: .*{match}"):
        trainer.train()


def test_images_are_pil_bytes_paths_or_in_the_messages(tmp_path):
    path = png(tmp_path / "red.png")
    forms = [Image.open(path), path.read_bytes(), str(path), path, {"bytes": None, "path": str(path)}]
    forms += [{"bytes": path.read_bytes(), "path": "elsewhere.png"}, Image.new("L", (8, 8))]
    rows = [{"prompt": "what is it", "images": [form]} for form in forms]
    rows += [{"prompt": "what is it", "image": form} for form in forms]
    part = {"type": "image", "text": None, "image": str(path)}
    rows.append(
        {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "what is it", "image": None}]}]}
    )
    rows.append(
        {"prompt": [{"role": "user", "content": "what"}, {"role": "assistant", "content": "red"}], "image": path}
    )
    for row in Rows(rows):
        (message,) = conversation(row)
        image, text = message["content"]
        assert image["image"].mode == "RGB"
        assert text["text"].startswith("what")
    assert answer(rows[-1]) == "red"
    with pytest.raises(ValueError, match="mode F has no known range"):
        picture(Image.new("F", (8, 8)))
    assert [part["type"] for part in conversation({"prompt": "what", "images": []})[0]["content"]] == ["text"]


@pytest.mark.parametrize("key", ["image_url", "url", "path", "image"])
def test_images_are_read_under_every_key_of_a_part(tmp_path, key):
    png(tmp_path / "red.png")
    for value in ("red.png", {"url": "red.png"}):
        part = {"type": "image_url", key: value}
        (message,) = conversation(Rows([{"prompt": [{"role": "user", "content": [part]}]}], tmp_path)[0])
        assert [(part["type"], part["image"].mode) for part in message["content"]] == [("image", "RGB")]


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_images_of_16_bits_keep_their_range(mode):
    values = numpy.array([30_000, 65_535], ">u2" if mode.endswith("B") else "<u2")
    deep = Image.frombytes(mode, (2, 1), values.tobytes())
    assert [picture(deep).getpixel((x, 0)) for x in (0, 1)] == [(117, 117, 117), (255, 255, 255)]


def test_images_of_16_bits_keep_their_range_from_files_and_urls(tmp_path):
    file = tmp_path / "deep *#::[1].png"
    Image.frombytes("I;16", (1, 1), numpy.array([30_000], "<u2").tobytes()).save(file)
    url = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
    for form in (file, str(file), f"file://{file}", file.read_bytes(), {"bytes": None, "path": str(file)}, url):
        assert picture(form).getpixel((0, 0)) == (117, 117, 117), form
    Image.new("F", (8, 8)).save(tmp_path / "floats.tiff")
    with pytest.raises(ValueError, match="mode F has no known range"):
        picture(tmp_path / "floats.tiff")


def test_a_row_with_two_columns_of_images_is_refused():
    red = Image.new("RGB", (8, 8), "red")
    with pytest.raises(ValueError, match="images in both columns, images and image"):
        conversation({"prompt": "what", "images": [red], "image": red})


def test_images_without_a_place_come_first():
    red, say = Image.new("RGB", (8, 8), "red"), {"type": "text", "text": "what"}
    for content in ("what", [say]):
        (message,) = conversation({"messages": [{"role": "user", "content": content}], "images": [red]})
        assert [part["type"] for part in message["content"]] == ["image", "text"]
    (message,) = conversation(
        {"messages": [{"role": "user", "content": [{"type": "image"}, {**say, "text": "<image>"}]}], "images": [red]}
    )
    assert message["content"][1]["text"] == "<image>"  # a word beside an image that has its place
    later = [{"role": "user", "content": "look"}, {"role": "user", "content": [{"type": "image"}, say]}]
    first, second = conversation({"messages": later, "images": [red]})
    assert [part["type"] for part in first["content"]] == ["text"]
    assert [part["type"] for part in second["content"]] == ["image", "text"]
    with pytest.raises(ValueError, match="does not match"):
        conversation({"messages": [{"role": "user", "content": [{"type": "image", "image": red}]}], "images": [red]})


NOT_READ = {
    "a type of part": ({"prompt": [{"role": "user", "content": [{"type": "input_image"}]}]}, "type text or image"),
    "messages as text": ({"messages": "[]"}, "messages are text, not a list"),
    "no image": ({"prompt": "what", "images": [None]}, "an image must be PIL"),
    "an array": ({"prompt": "what", "images": [numpy.zeros((2, 2, 3))]}, "got ndarray"),
    "a tag": (
        {"prompt": "<image>what", "images": [Image.new("RGB", (8, 8))]},
        "its text has the tag <image>: put a part",
    ),
    "text under another key": (
        {"prompt": [{"role": "user", "content": [{"type": "text", "value": "a"}]}]},
        "have text",
    ),
    "text with an image": (
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "a", "image": "b.png"}]}]},
        "must have text, and no image",
    ),
    "a tag without images": ({"prompt": "<image>\nwhat", "picture": "a.png"}, "the row has 0 images"),
    "base64": ({"prompt": "what", "images": ["iVBORw0KGgo" * 1000]}, "Base64 text needs data:image/png;base64"),
}


@pytest.mark.parametrize("name", NOT_READ)
def test_rows_that_cannot_be_read_say_why(name):
    row, match = NOT_READ[name]
    with pytest.raises(ValueError, match=f"row 3 of the data set: .*{match}"):
        conversation({**row, ROW: 3})


def test_messages_in_arrays_are_read():
    """As pandas and `with_format("numpy")` keep them."""
    parts = numpy.array([{"type": "text", "text": "what"}], dtype=object)
    for messages in (
        numpy.array([{"role": "user", "content": parts}] * 2, dtype=object),
        [{"role": "user", "content": parts}],
    ):
        assert [m["content"] for m in conversation({"messages": messages})] == [[*parts]] * len(messages)
    images = numpy.array([Image.new("RGB", (8, 8)), None], dtype=object)[:1]
    content = conversation({"prompt": "what", "images": images})[0]["content"]
    assert [part["type"] for part in content] == ["image", "text"]
    assert len(conversation({"prompt": "what", "images": images[:0]})[0]["content"]) == 1


def test_an_answer_that_became_a_date_is_refused():
    with pytest.raises(ValueError, match="must be text, but was read as date"):
        answer({"prompt": "when", "answer": datetime.date(2024, 1, 2)})


@pytest.mark.parametrize(("given", "read"), [(7, "7"), (7.0, "7"), (2.5, "2.5"), (math.nan, None), (None, None)])
def test_numbers_are_answers(given, read):
    """A gap makes floats of a column of whole numbers."""
    assert answer({"prompt": "how many", "answer": given}) == read


def test_a_part_of_another_data_set_is_numbered():
    part = torch.utils.data.Subset([{"prompt": "what"}, {"prompt": "why"}], [1])
    assert [row[ROW] for row in numbered(part)] == [0]


def test_parts_of_parts_keep_the_folder_of_their_images(tmp_path):
    png(tmp_path / "red.png")
    rows = Rows([{"prompt": "what", "image": "red.png"}] * 3, tmp_path)
    part = torch.utils.data.Subset(torch.utils.data.Subset(rows, [2, 1]), [1])
    (row,) = [*numbered(part)]
    assert (row[ROW], [part["type"] for part in conversation(row)[0]["content"]]) == (0, ["image", "text"])


REFUSED = {
    "deepspeed": ({"deepspeed": "zero3.json"}, "DeepSpeed is not supported"),
    "compile": ({"torch_compile": True}, "torch.compile is not supported"),
    "batch size": ({"auto_find_batch_size": True}, "auto_find_batch_size is not supported"),
    "split": ({"accelerator_config": {"split_batches": True}}, "split_batches is not supported"),
    "columns": ({"remove_unused_columns": True}, "remove_unused_columns is not supported"),
    "labels": ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is not supported"),
    "data seed": ({"data_seed": 7}, "data_seed is not supported.*: pass it as seed"),
    "order": ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy is not supported"),
    "float16": ({"fp16": True}, "float16 is not supported"),
    "beta": ({"beta": 0.5}, "use --decomposition forward"),
    "two temperatures": ({"generation_kwargs": {"temperature": 0.5}}, "sample at temperature 0.5, losses at 1.0"),
    "another end": (
        {"generation_kwargs": {"eos_token_id": [1, 5]}},
        r"eos_token_id \[5\] of --generation_kwargs would not",
    ),
    "rule": ({"rule": "Best()"}, "rule must be one of"),
    "code": ({"rule": "Steer(__import__('os'))"}, "rule must be one of"),
    "no such component": ({"rule": "Steer('foo')"}, "foo"),
    "decomposition": ({"decomposition": "vgz"}, "decomposition must be one of"),
    "unread": ({"decomposition": "standard", "lam": 0.1}, "no component of 'standard' reads lam"),
}


@pytest.mark.parametrize("start", [True, "pissa", False])
def test_a_frozen_prior_is_copied_where_adapters_do_not_begin_at_zero(tmp_path, start):
    """PiSSA takes their start out of the weights; False stands for adapters that were trained before."""
    student = make_model(seed=0)
    config = tiny_trainer.peft.LoraConfig(**tiny_trainer.LORA, init_lora_weights=start)
    student = tiny_trainer.peft.get_peft_model(student, config)
    prompt = {"input_ids": torch.tensor([[9, 10]])}
    with torch.no_grad():
        meant = student.eval()(**prompt).logits
    trainer = make_trainer(tmp_path, student=student)
    assert (trainer.prior is None) == (start is True)
    if trainer.prior is not None:
        torch.testing.assert_close(trainer.prior(**prompt).logits, meant)
        assert not any(p.requires_grad for p in trainer.prior.parameters())
    trainer.train()


@pytest.mark.parametrize("kind", ["IA3", "unfrozen"])
def test_a_frozen_prior_is_copied_if_more_than_lora_is_trained(tmp_path, kind):
    lora = tiny_trainer.peft.LoraConfig(**tiny_trainer.LORA)
    scales = tiny_trainer.peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    student = tiny_trainer.peft.get_peft_model(make_model(seed=0), scales if kind == "IA3" else lora)
    for name, parameter in student.named_parameters():
        if "ia3" in name:
            parameter.data.mul_(2)  # trained before
        elif "projector" in name:
            parameter.requires_grad_(True)
    prompt = {"input_ids": torch.tensor([[9, 10]])}
    with torch.no_grad():
        meant = student.eval()(**prompt).logits
    trainer = make_trainer(tmp_path, student=student, max_steps=1)
    torch.testing.assert_close(trainer.prior(**prompt).logits, meant)
    trainer.train()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_at_the_start(tmp_path, name):
    options, match = REFUSED[name]
    with pytest.raises(ValueError, match=match):
        make_trainer(tmp_path, **options)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.NAdam, Adafactor])
def test_filling_the_state_of_a_parameter_changes_no_later_update(kind):
    """Of one that gets its first gradient after a checkpoint."""
    found = []
    for fills in (True, False):
        parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
        optimizer = kind(parameters, lr=0.1, **({"relative_step": False} if kind is Adafactor else {}))
        for step in range(4):
            parameters[0].grad = torch.full((3,), 0.5 + step)
            parameters[1].grad = torch.full((3,), 1.0 - step) if step > 1 else None
            optimizer.step()
            if fills and step == 1:
                _fill_state(optimizer)
                assert parameters[1].grad is None
        found.append([p.detach() for p in parameters])
    assert_equal(*found)


@pytest.mark.parametrize("option", [{"decomposition": DECOMPOSITIONS["vgs"]}, {"rule": Steer("vis")}])
def test_a_configuration_has_names(tmp_path, option):
    (name,) = option
    with pytest.raises(TypeError, match=f"{name} must be text, such as .*DECOMPOSITIONS"):
        SteeredDistillationConfig(str(tmp_path), use_cpu=True, **option)


def test_a_student_without_anything_to_train_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no parameter of the student requires grad"):
        make_trainer(tmp_path, student=make_model(seed=0).requires_grad_(False))


def test_tools_are_refused(tmp_path):
    config = SteeredDistillationConfig(str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="tools are not supported"):
        SteeredDistillationTrainer(make_model(seed=0), make_model(seed=1), config, make_rows(), tools=[len])


def test_more_responses_than_prompts_are_refused(tmp_path):
    trainer = make_trainer(tmp_path, generation_kwargs={"num_return_sequences": 2})
    with pytest.raises(ValueError, match=r"there are 8 responses to 4 prompts: leave num_return_sequences"):
        trainer.train()


def test_fsdp1_and_other_parallelism_are_refused(tmp_path, monkeypatch):
    from accelerate.parallelism_config import ParallelismConfig

    from steer_optim.vlm.trainer import refuse

    config = SteeredDistillationConfig(str(tmp_path), use_cpu=True)
    monkeypatch.setenv("FSDP_VERSION", "1")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"FSDP1 is not supported.*fsdp_version: 2"):
        refuse(config)
    monkeypatch.undo()
    config.parallelism_config = ParallelismConfig(tp_size=2)
    with pytest.raises(ValueError, match="tp_size=2 is not supported"):
        refuse(config)


def test_another_version_of_trl_is_refused(monkeypatch):
    import importlib

    import trl

    from steer_optim.vlm import trainer

    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.raises(ImportError, match=r"found 1\.17\.0: pip install 'trl==1\.16"):
        importlib.reload(trainer)


def test_a_teacher_with_other_tokens_or_none_is_refused(tmp_path):
    other = make_model(seed=1)
    other.resize_token_embeddings(7)
    with pytest.raises(ValueError, match="both must have one vocabulary"):
        make_trainer(tmp_path, teacher=other)


def test_a_teacher_with_the_same_words_under_other_ids_is_refused(tmp_path):
    make_model(seed=1).save_pretrained(tmp_path)
    make_processor([*reversed(COLOURS)]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"id \d+ is '\w+' for the student and '\w+' for .*: both must have one vocab"):
        make_trainer(tmp_path / "out", teacher=str(tmp_path))


def test_a_teacher_whose_tokenizer_cannot_be_loaded_is_a_teacher(tmp_path):
    make_model(seed=1).save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    make_trainer(tmp_path / "out", teacher=str(tmp_path))


def test_rows_without_images_move_no_weight_of_the_vision_tower(tmp_path):
    rows = [{"messages": row["messages"], "images": []} for row in make_rows()]
    trainer = make_trainer(tmp_path, rows=rows, optim="adamw_torch", weight_decay=0.1, max_steps=1)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    moved = {name for name, x in trainer.model.state_dict().items() if not torch.equal(x, before[name])}
    assert moved
    assert not [name for name in moved if "vision" in name or "projector" in name]


def test_a_teacher_inside_the_student_is_refused(tmp_path):
    base = make_model(seed=0)
    student = tiny_trainer.peft.get_peft_model(base, tiny_trainer.peft.LoraConfig(**tiny_trainer.LORA))
    for teacher in (student, base):
        with pytest.raises(ValueError, match="the teacher is the student itself, or inside it"):
            make_trainer(tmp_path, student=student, teacher=teacher)


def test_several_splits_are_no_data_to_train_on(tmp_path):
    config = SteeredDistillationConfig(str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="train_dataset has the splits train, test: pass one"):
        SteeredDistillationTrainer(make_model(seed=0), make_model(seed=1), config, {"train": [], "test": []})


def test_a_prior_in_bfloat16_keeps_the_rotary_frequencies(tmp_path):
    """As a checkpoint that is loaded in bfloat16 does: rounded ones turn far positions by other angles."""
    trainer = make_trainer(tmp_path, bf16=True)
    assert {p.dtype for p in trainer.prior.parameters()} == {torch.bfloat16}
    buffers, expected = dict(trainer.prior.named_buffers()), dict(trainer.model.named_buffers())
    assert any("inv_freq" in name for name in expected)
    assert_equal(buffers, expected)


@pytest.mark.parametrize("name", ["glm4v_moe", "ernie4_5_vl_moe", "emu3", "qwen3_vl"])
def test_a_prior_is_rounded_as_a_checkpoint_is_loaded(tmp_path, name):
    """Biases of routers and rotary frequencies stay exact; running statistics do not."""
    model = Zoo(name).model
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = {n: x.dtype for n, x in (*loaded.named_parameters(), *loaded.named_buffers())}
    _round(model)
    assert {n: x.dtype for n, x in (*model.named_parameters(), *model.named_buffers())} == expected


def test_the_order_of_rows_follows_from_the_epoch_alone(tmp_path):
    """Whatever wraps the sampler: accelerate does not tell that of a resumed epoch on several processes."""
    trainer, orders = make_trainer(tmp_path), []
    sampler = trainer._get_train_sampler()
    for epoch in (0.0, 1.0, 1.5, 0.25):
        trainer.state.epoch = epoch
        orders.append([*sampler])
    assert orders[0] == orders[3] != orders[1] == orders[2]


def test_responses_are_sampled_in_the_precision_in_which_they_are_scored(tmp_path):
    """Also the image tower, and a student with adapters, which `generate` calls by themselves."""
    student = tiny_trainer.peft.get_peft_model(make_model(seed=0), tiny_trainer.peft.LoraConfig(**tiny_trainer.LORA))
    trainer, found = make_trainer(tmp_path, student=student, bf16=True, max_steps=1), set()
    for name, module in trainer.model.named_modules():
        if isinstance(module, torch.nn.Linear) and ("vision" in name or "q_proj" in name):
            module.register_forward_hook(lambda module, args, output: found.add((module.training, output.dtype)))
    with torch.no_grad():
        trainer.sample([trainer.train_dataset[i] for i in range(2)], parts=1)
    assert found == {(False, torch.bfloat16)}


def test_a_checkpoint_is_loaded_in_the_widest_precision(tmp_path):
    student = make_model(seed=0)
    student.model.vision_tower.bfloat16().requires_grad_(False)
    student.save_pretrained(tmp_path / "saved")
    trainer = make_trainer(tmp_path / "out", student=student)
    before = {name: x.clone() for name, x in trainer.model.state_dict().items()}
    trainer._load_from_checkpoint(str(tmp_path / "saved"))
    assert_equal(trainer.model.state_dict(), before)


def test_ids_to_suppress_are_added_to_those_of_images_and_padding(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, generation_kwargs={"suppress_tokens": [WORDS.index("red")]})
    suppressed = [WORDS.index(word) for word in ("<pad>", "<image>", "red")]
    assert trainer.generation_kwargs["suppress_tokens"] == suppressed
    batches = recorded(trainer)
    trainer.train()
    for batch in batches:
        assert not torch.isin(batch.response.response_BT[batch.response.mask_BT], torch.tensor(suppressed)).any()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "decomposition", ["vgs-frozen", "vgs", "both-views"]
)  # those of the text view have no gradient
def test_vision_alone_may_be_trained_on_rows_without_images(tmp_path, checkpointing, decomposition):
    student = make_model(seed=0).requires_grad_(False)
    projector = student.model.multi_modal_projector.requires_grad_(True)
    before = copy.deepcopy(projector.state_dict())
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 12}
    options |= {"decomposition": decomposition, "gradient_checkpointing": checkpointing}
    trainer = make_trainer(tmp_path, student=student, **options)
    trainer.train()
    norms = [entry["grad_norm"] for entry in losses_of(trainer)]
    assert norms.count(0.0) == 1  # of the row without an image
    assert all(math.isfinite(entry["loss"]) for entry in losses_of(trainer))
    assert not torch.equal(before["linear_1.weight"], projector.state_dict()["linear_1.weight"])


def test_the_loss_of_right_answers_counts_their_words_only(tmp_path):
    """Models end a turn with other ids than their tokenizer's."""
    trainer = make_trainer(tmp_path)
    (row,) = numbered(make_rows()[:1])
    (record,) = examine(trainer, trainer.model, [row])[1]
    ids = make_processor().tokenizer("it is red")["input_ids"]
    prompt = trainer.render([conversation(row)], [0]).text["input_ids"][0].tolist()
    with torch.no_grad():
        log_p = trainer.model.eval()(torch.tensor([[*prompt, *ids]])).logits[0, -1 - len(ids) : -1].log_softmax(-1)
    assert record["scores"]["text_loss"] == pytest.approx(-float(log_p[range(len(ids)), ids].mean()), rel=1e-5)


def test_a_teacher_that_would_see_other_pixels_is_refused(tmp_path):
    processor = make_processor()
    size = {"height": 16, "width": 16}
    changes = [({}, None), ({"crop_size": size}, "crop_size"), ({"image_mean": [0.25] * 3}, "image_mean")]
    for number, (change, refused) in enumerate(changes):
        folder = tmp_path / str(number)
        make_model(seed=1, hidden_size=32).save_pretrained(folder)
        for name, value in change.items():
            setattr(processor.image_processor, name, value)
        processor.save_pretrained(folder)
        with pytest.raises(ValueError, match="of the images is ") if refused else nullcontext():
            make_trainer(tmp_path / "out", teacher=str(folder))
        processor = processor if refused != "crop_size" else make_processor()


def test_pixels_are_compared_at_the_revision_that_is_loaded(tmp_path, monkeypatch):
    make_model(seed=1, hidden_size=32).save_pretrained(tmp_path)
    read = []

    class Processors:
        @staticmethod
        def get_image_processor_dict(name, revision):
            read.append(revision)
            return {}, {}

    monkeypatch.setattr("steer_optim.vlm.trainer.ImageProcessingMixin", Processors)
    make_trainer(tmp_path / "out", teacher=str(tmp_path), teacher_model_init_kwargs={"revision": "v2"})
    assert read == ["v2"]


@pytest.mark.parametrize(
    ("own", "theirs", "equal"),
    [
        (14, {"height": 14, "width": 14}, True),
        ([0.5, 0.5, 0.5], 0.5, True),
        (14, {"height": 16, "width": 16}, False),
        ([0.5, 0.4, 0.5], 0.5, False),
    ],
)
def test_settings_of_images_are_compared_as_numbers(own, theirs, equal):
    assert (_numbers(own) == _numbers(theirs)) == equal


@pytest.mark.filterwarnings("ignore:The new embeddings will be initialized")
def test_a_teacher_may_have_rows_of_padding(tmp_path):
    """As Qwen2.5-VL-7B has, and its student of 3B has not."""
    trained = []
    for rows in (0, 64):
        teacher = make_model(seed=1, hidden_size=32)
        if rows:
            teacher.resize_token_embeddings(rows)
        trainer = make_trainer(tmp_path / str(rows), teacher=teacher, max_steps=1)
        trainer.train()
        trained.append(trainer.model.state_dict())
    assert_equal(*trained)


@pytest.mark.parametrize(
    "option", [{"teacher_model_init_kwargs": {"dtype": "bfloat16"}}, {"teacher_model_revision": "v2"}]
)
def test_options_to_load_a_teacher_that_is_loaded_are_refused(tmp_path, option):
    with pytest.raises(ValueError, match="are not read if the teacher is loaded already"):
        make_trainer(tmp_path, **option)


def test_a_rule_is_written_as_in_python(tmp_path):
    def rule(text):
        return repr(
            SteeredDistillationConfig(str(tmp_path), use_cpu=True, decomposition="exact", rule=text).make_rule()
        )

    assert rule("PCGrad") == rule("PCGrad(seed=0)") == "PCGrad(seed=0)"
    assert "gain=2.0, project='never'" in rule("Steer('vis', gain=2.0, project='never')")


def test_a_response_with_a_placeholder_is_dropped(tmp_path):
    """vLLM suppresses no tokens."""
    trainer = make_trainer(tmp_path, max_steps=1)
    place = trainer.model.config.image_token_id
    generate = trainer._generate_single_turn
    trainer._generate_single_turn = lambda ids, *args: [[place], *generate(ids, *args)[1:]]
    batches = recorded(trainer)
    trainer.train()
    assert losses_of(trainer)[0]["steer/dropped"] == 0.25
    assert sum(int(b.response.mask_BT.any(dim=1).sum()) for b in batches) == 3


class Engine:
    """What TRL asks of vLLM, answered by `generate`."""

    def __init__(self, trainer):
        self.trainer, self.asked, self.synced, self.reset = trainer, [], 0, 0
        self.llm = self.llm_engine = self

    def sync_weights(self):
        self.synced += 1

    def reset_encoder_cache(self):
        self.reset += 1

    def generate(self, prompts, images, num_generations, profiler):
        self.asked.append((prompts, images))
        return None, [[5, 1]] * len(prompts), None, None


@pytest.mark.parametrize(("mode", "per_image"), [("colocate", 1), ("server", 4)])
def test_vllm_gets_the_prompts_with_their_images(tmp_path, mode, per_image):
    """Colocated it expands the placeholder of an image itself; TRL places features in the expanded ids for a server."""
    trainer = make_trainer(tmp_path, max_steps=2, vllm_mode=mode)
    engine = trainer.vllm_generation = Engine(trainer)
    trainer.use_vllm, trainer._last_loaded_step = True, -1
    trainer.train()
    assert engine.synced == 2
    assert engine.reset == (2 if mode == "colocate" else 0)
    place = trainer.model.config.image_token_id
    for prompts, images in engine.asked:
        for ids, own in zip(prompts, images, strict=True):
            assert ids.count(place) == per_image * len(own or [])


def test_an_empty_response_of_vllm_has_ended(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.vllm_generation = Engine(trainer)
    trainer.vllm_generation.generate = lambda prompts, **_: (None, [[]] * len(prompts), None, None)
    trainer.use_vllm, trainer._last_loaded_step = True, -1
    batches = recorded(trainer)
    trainer.train()
    assert {tuple(batch.response.response_BT.shape) for batch in batches} == {(2, 1)}


def test_completions_are_logged(tmp_path):
    from datasets import load_dataset

    trainer, decoded = make_trainer(tmp_path, max_steps=1, log_completions=True), []
    decode = trainer.processing_class.batch_decode
    trainer.processing_class.batch_decode = lambda ids, **options: decoded.append(ids) or decode(ids, **options)
    trainer.train()
    rows = load_dataset("parquet", data_files=str(tmp_path / "completions" / "*.parquet"), split="train")
    assert len(rows) == 4
    assert all(row["prompt"].startswith(("what", "name", "is")) for row in rows)
    assert not any(0 in ids for ids in decoded[0])  # the padding of a view, which is a word of most vocabularies


def test_an_optimizer_that_is_given_is_steered(tmp_path):
    student = make_model(seed=0)
    trainer = make_trainer(tmp_path, student=student, optimizers=(torch.optim.SGD(student.parameters(), lr=0.01), None))
    trainer.train()
    assert trainer.steered.geometry is not None
