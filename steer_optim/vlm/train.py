"""Distil a vision-language model from the command line, with steered losses.

    python -m steer_optim.vlm.train --model_name_or_path STUDENT --teacher_model_name_or_path TEACHER
        --dataset_name DATA --output_dir runs/vgs

or ``accelerate launch --config_file FILE -m steer_optim.vlm.train ...`` on several GPUs; ``python -m
steer_optim.vlm.configs`` prints where the configurations for one GPU, DDP and FSDP2 are. All options of TRL's
``distillation`` command are accepted, also from a YAML file given as ``--config``. The same command resumes a killed
run from its last checkpoint.

``output_dir`` holds in the end the student with its processor, ``evaluation.json``, ``answers.jsonl`` and
``training.png``.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError

try:
    from datasets import IterableDataset, load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError
    from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"there is no {error.name}: pip install 'steer_optim[trl]'") from error

from steer_optim.vlm.advice import advise, investigate
from steer_optim.vlm.data import Rows, answer, conversation, numbered
from steer_optim.vlm.examination import Examination
from steer_optim.vlm.trainer import SteeredDistillationConfig, SteeredDistillationTrainer, option

# Options that may differ when a run resumes.
_FREE = "logging log_ save report push hub eval disable_tqdm run_name resume dataloader output_dir vllm max_steps "
_FREE += "num_train_epochs per_device_eval local_rank distributed do_ project trackio"


@dataclass
class DataArguments(ScriptArguments):  # type: ignore[misc]  # trl is untyped
    """Which data to train on, and how many rows to examine."""

    held_out: int = option(200, "Rows that are examined before and after training, at most; 0 for none.")
    measure_only: bool = option(False, "Score a few batches, print what they say about steering, and stop.")


def load(data: DataArguments) -> tuple[Any, Any]:
    """Return the training rows and the held-out ones: those of the test split, or else up to a twentieth of the rows.

    Args:
        data: ``dataset_name`` is a name on the hub, a folder, or a file of parquet or JSON lines.

    Raises:
        ValueError: there is no data set, or no such split; or a stream has no test split.
    """
    name = data.dataset_name
    if data.held_out < 0:
        raise ValueError(f"--held_out must be at least 0; got {data.held_out}")
    if not name:
        raise ValueError("--dataset_name is needed: a name on the hub, a folder, or a .parquet, .json or .jsonl file")
    path = Path(name)
    if data.dataset_config and path.exists() and not path.is_dir():
        raise ValueError(f"--dataset_config {data.dataset_config} is not read for a file: leave it out")
    if not path.exists() and (path.suffix in (".parquet", ".json", ".jsonl") or name.startswith((".", "/", "~"))):
        raise ValueError(f"there is no file or folder {name}")
    try:
        splits = _splits(path, data)
    except (DatasetGenerationError, StopIteration) as error:
        raise ValueError(f"{name} cannot be read: {str(error.__cause__ or error) or 'it has no rows'}") from error
    if not isinstance(splits, dict):
        splits = {data.dataset_train_split: splits}
    for split, chosen in (("train", data.dataset_train_split), ("test", data.dataset_test_split)):
        if chosen not in splits and (split, chosen) != ("test", "test"):  # a data set may have no test split
            raise ValueError(f"{name} has the splits {', '.join(splits)}: choose one with --dataset_{split}_split")
    train, root = splits[data.dataset_train_split], path.parent if path.is_file() else path
    if unread := {*(train.column_names or ())} - {"messages", "prompt", "images", "image", "answer"}:
        print(f"columns that are not read: {', '.join(sorted(unread))}", file=sys.stderr)
    streams = isinstance(train, IterableDataset)  # a data set that was saved to disk does not
    train = numbered(train, root)
    held_out: Any = None
    if not streams:
        if not len(train):
            raise ValueError(f"the split {data.dataset_train_split} of {name} has no rows")
        first = conversation(train[0])  # before any model is loaded
        if not any(part["type"] == "image" for message in first for part in message["content"]):
            print("row 0 has no image: they are read from images, image and messages", file=sys.stderr)
        if data.measure_only and not data.held_out:
            answer(train[0])
    if data.dataset_test_split in splits and data.dataset_test_split != data.dataset_train_split:
        rows = splits[data.dataset_test_split]
        if streams:
            rows = list(numbered(rows, root).take(data.held_out))
        else:
            rows = rows.select(range(min(data.held_out, len(rows))))
        held_out = Rows(rows, root) if len(rows) else None
    elif data.held_out and streams:
        raise ValueError(f"{name} has no split {data.dataset_test_split!r}: name one, or pass --held_out 0")
    elif data.held_out:
        count = min(data.held_out, max(1, len(train) // 20))
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
        train, held_out = (torch.utils.data.Subset(train, part) for part in (order[count:], order[:count]))
    if held_out is not None:
        conversation(held_out[0])
        answer(held_out[0])
    return train, held_out


def _splits(path: Path, data: DataArguments) -> Any:
    name = str(data.dataset_name)
    if path.is_file():
        kind = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}.get(path.suffix)
        if kind is None:
            raise ValueError(f"--dataset_name must be a folder or a .parquet, .json or .jsonl file; got {name}")
        return load_dataset(kind, data_files=name, streaming=data.dataset_streaming)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        try:
            return load_from_disk(name)
        except IndexError as error:  # from a data set without rows
            raise ValueError(f"{name} has no rows") from error
    return load_dataset(name, name=data.dataset_config, streaming=data.dataset_streaming)


def last_checkpoint(path: Path) -> str | None:
    """Return the newest complete checkpoint in a directory: a kill may have left one half-written."""
    found = sorted(path.glob("checkpoint-*"), key=lambda p: int(re.sub(r"\D", "", p.name) or 0), reverse=True)
    for checkpoint in found:
        try:
            # The trainer writes this file last.
            json.loads((checkpoint / "trainer_state.json").read_text())
            if not [*checkpoint.glob("optimizer*")]:
                raise ValueError("--save_only_model leaves out what a run needs to resume")
            for file in checkpoint.glob("rng_state*.pth"):
                torch.load(file, weights_only=False)
        except (OSError, ValueError, RuntimeError, EOFError, UnpicklingError) as error:
            print(f"{checkpoint} is incomplete and skipped: {error}", file=sys.stderr)
            continue
        return str(checkpoint)
    return None


def _done(checkpoint: str) -> tuple[int, float]:
    """Return the steps and the epochs of a checkpoint."""
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    return state.get("global_step", 0), state.get("epoch") or 0.0


def check_settings(path: Path, settings: dict[str, Any], *, trained: bool, write: bool) -> None:
    """Raise ValueError if a directory holds a run with other settings; save them if it holds none."""
    file = path / "run.json"
    settings = json.loads(
        json.dumps({k: v for k, v in settings.items() if not k.startswith(tuple(_FREE.split()))}, default=str)
    )
    if file.exists() and not trained:  # a finished run may have no checkpoints, and files from before are not its own
        trained = any(x.stat().st_mtime >= file.stat().st_mtime for x in path.glob("*.safetensors"))
    if file.exists() and trained:
        before = json.loads(file.read_text())
        before = {"num_processes": settings.get("num_processes"), **before}  # not in older files
        if changed := [key for key in settings if before.get(key) != settings[key]]:
            raise ValueError(
                f"{path} holds a run with other settings: "
                + "; ".join(f"{key} is {before.get(key)!r} there and {settings[key]!r} here" for key in changed)
                + ". Choose another --output_dir, or use the same settings"
            )
    elif write:
        path.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(settings, indent=2) + "\n")


def prepare(data: DataArguments, args: SteeredDistillationConfig, model: ModelConfig) -> tuple[Any, Any, str | None]:
    """Return the trainer, the held-out rows, and the checkpoint to resume from.

    Raises:
        ValueError, OSError: the command cannot be run as it is.
    """
    given = {"model_name_or_path": model.model_name_or_path}
    given |= {"teacher_model_name_or_path": args.teacher_model_name_or_path}
    for name, value in given.items():
        if value is None:
            raise ValueError(f"--{name} is needed: a name on the hub, or a folder")
        if (Path(value) / "adapter_config.json").exists() and not (Path(value) / "config.json").exists():
            raise ValueError(
                f"{value} holds an adapter only: pass a folder with the whole model, as merge_and_unload()"
            )
    if model.dtype == "float16":
        raise ValueError("--dtype float16 is not supported: keep the student in float32, and compute in bfloat16")
    adapter = [x for x in fields(model) if x.name.startswith(("lora_", "use_rslora", "use_dora"))]
    if unread := [x.name for x in adapter if not model.use_peft and getattr(model, x.name) != x.default]:
        raise ValueError(f"--{unread[0]} is not read without --use_peft: add it, or all weights would be trained")
    if model.use_peft and model.lora_target_modules is None:
        model.lora_target_modules = "all-linear"  # peft knows the names of few vision-language models
    train, held_out = load(data)
    if data.measure_only:
        args.eval_strategy = "no"
    if args.eval_strategy != "no" and held_out is None:
        raise ValueError("--eval_strategy needs held-out rows: leave out --held_out 0")
    path = Path(args.output_dir)
    if args.resume_from_checkpoint and not (Path(args.resume_from_checkpoint) / "trainer_state.json").exists():
        raise ValueError(
            f"--resume_from_checkpoint {args.resume_from_checkpoint} is no folder of a checkpoint: leave it out to "
            "resume from the last one in --output_dir"
        )
    resume = args.resume_from_checkpoint or last_checkpoint(path)
    if resume and 0 < args.max_steps < _done(resume)[0]:
        raise ValueError(f"{resume} has more steps than --max_steps {args.max_steps}: choose another --output_dir")
    if not data.measure_only:
        if resume and not args.resume_from_checkpoint and not (path / "run.json").exists():
            raise ValueError(
                f"{resume} is not from this command, as there is no run.json: choose another --output_dir, or pass it "
                "as --resume_from_checkpoint"
            )
        settings = {**asdict(data), **args.to_dict(), **asdict(model), "num_processes": args.world_size}
        check_settings(path, settings, trained=resume is not None, write=args.should_save)
    options = {"revision": model.model_revision, "attn_implementation": model.attn_implementation, "dtype": model.dtype}
    args.model_init_kwargs = {**options, **(args.model_init_kwargs or {})}
    try:
        trainer = SteeredDistillationTrainer(
            model=model.model_name_or_path,
            teacher_model=args.teacher_model_name_or_path,
            args=args,
            train_dataset=train,
            eval_dataset=held_out if args.eval_strategy != "no" else None,
            quantization_config=get_quantization_config(model),
            peft_config=get_peft_config(model),
        )
    except (OSError, ImportError, SafetensorError) as error:
        raise OSError(f"{' or '.join(map(str, given.values()))} cannot be loaded: {error}") from error
    if data.measure_only and trainer.accelerator.num_processes > 1:
        raise ValueError("--measure_only runs in one process: leave out accelerate launch")
    return trainer, held_out, resume


def main(arguments: list[str] | None = None) -> int:
    """Run the command; see the header of this module."""
    program = "python -m steer_optim.vlm.train"
    parser = TrlParser((DataArguments, SteeredDistillationConfig, ModelConfig), prog=program, description=__doc__)
    # transformers warns of the names that TRL uses.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        data, args, model = parser.parse_args_and_config(arguments, fail_with_unknown_args=True)
        trainer, held_out, resume = prepare(data, args, model)
    except (ValueError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    if data.measure_only:
        rows = [*islice(trainer.train_dataset, data.held_out or 200)] if held_out is None else held_out
        try:
            findings, text = investigate(trainer, rows)
        except ValueError as error:
            print(f"{program}: {error}", file=sys.stderr)
            return 2
        print(f"\n{text}\n\n{advise(findings)}")
        return 0
    examination = None if held_out is None else Examination(trainer, held_out)
    if examination is not None:
        trainer.add_callback(examination)
    steps, epochs = _done(resume) if resume else (0, 0.0)
    if resume and (steps >= args.max_steps if args.max_steps > 0 else epochs >= args.num_train_epochs):
        # Training would run one more step.
        if (Path(args.output_dir) / "answers.jsonl").exists():
            trainer.accelerator.print(f"the run in {args.output_dir} is finished")
            return 0
        trainer.restore(resume)
    else:
        trainer.train(resume_from_checkpoint=resume)
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(args.output_dir)
    trainer.save_state()
    if examination is not None:
        trainer.accelerator.print(f"\n{examination.finish()}\nwritten to {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=data.dataset_name)
    trainer.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
