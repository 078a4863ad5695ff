"""Distil a vision-language model from the command line, with steered losses.

    python -m steer_optim.vlm.train --model_name_or_path STUDENT --teacher_model_name_or_path TEACHER
        --dataset_name DATA --output_dir runs/vgs

or ``accelerate launch --config_file FILE -m steer_optim.vlm.train ...`` on several GPUs; ``python -m
steer_optim.vlm.configs`` prints where the configurations for one GPU, DDP and FSDP2 are. All options of TRL's
``distillation`` command are there, and can stand in a YAML file given as ``--config``. A run that was killed goes on
from its last checkpoint with the same command.

``output_dir`` has in the end the student with its processor, ``evaluation.json``, ``answers.jsonl`` and
``training.png``.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from datasets import DatasetDict, IterableDatasetDict, load_dataset, load_from_disk
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from steer_optim.vlm.advice import advise, investigate
from steer_optim.vlm.data import Rows, numbered
from steer_optim.vlm.examination import Examination
from steer_optim.vlm.trainer import SteeredDistillationConfig, SteeredDistillationTrainer, refuse

# Options that may differ when a run goes on.
_FREE = "logging log_ save report push hub eval disable_tqdm run_name resume dataloader output_dir vllm max_steps "
_FREE += "num_train_epochs per_device_eval local_rank distributed do_ project trackio"


@dataclass
class DataArguments(ScriptArguments):  # type: ignore[misc]  # trl is untyped
    """Which data to train on, and how many rows to examine."""

    held_out: int = field(
        default=200, metadata={"help": "Rows that are examined before and after training, at most; 0 for none."}
    )
    measure_only: bool = field(
        default=False, metadata={"help": "Score a few batches, print what they say about steering, and stop."}
    )


def load(data: DataArguments) -> tuple[Any, Any]:
    """Return the training rows and the held-out ones: those of the test split, or else up to a twentieth of the rows.

    Args:
        data: ``dataset_name`` is a name on the hub, a folder, or a file of parquet or JSON lines.

    Raises:
        ValueError: there is no data set, or no such split; or a stream has no test split.
    """
    name = data.dataset_name
    if name is None:
        raise ValueError("--dataset_name is needed: a name on the hub, a folder, or a .parquet, .json or .jsonl file")
    path = Path(name)
    if path.is_file():
        kind = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}.get(path.suffix)
        if kind is None:
            raise ValueError(f"--dataset_name must be a folder or a .parquet, .json or .jsonl file; got {name}")
        splits = load_dataset(kind, data_files=name, streaming=data.dataset_streaming)
    elif (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        splits = load_from_disk(name)
    else:
        splits = load_dataset(name, name=data.dataset_config, streaming=data.dataset_streaming)
    if not isinstance(splits, (DatasetDict, IterableDatasetDict)):
        splits = DatasetDict({data.dataset_train_split: splits})
    if data.dataset_train_split not in splits:
        raise ValueError(f"{name} has the splits {', '.join(splits)}: choose one with --dataset_train_split")
    train = splits[data.dataset_train_split]
    if data.dataset_test_split in splits:
        rows = splits[data.dataset_test_split]
        count = data.held_out if data.dataset_streaming else min(data.held_out, len(rows))
        rows = list(rows.take(count)) if data.dataset_streaming else rows.select(range(count))
        return numbered(train), Rows(rows) if count else None
    if not data.held_out:
        return numbered(train), None
    if data.dataset_streaming:
        raise ValueError(f"{name} has no split {data.dataset_test_split!r}: name one, or pass --held_out 0")
    everything, count = Rows(train), min(data.held_out, max(1, len(train) // 20))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    return torch.utils.data.Subset(everything, order[count:]), torch.utils.data.Subset(everything, order[:count])


def last_checkpoint(path: Path) -> str | None:
    """Return the newest complete checkpoint in a directory: a kill may have left one half-written."""
    found = sorted(path.glob("checkpoint-*"), key=lambda p: int(re.sub(r"\D", "", p.name) or 0), reverse=True)
    for checkpoint in found:
        try:
            # The trainer writes this file last.
            json.loads((checkpoint / "trainer_state.json").read_text())
            for file in checkpoint.glob("rng_state*.pth"):
                torch.load(file, weights_only=False)
        except (OSError, ValueError, RuntimeError, EOFError, UnpicklingError):
            print(f"{checkpoint} is incomplete and left aside", file=sys.stderr)
            continue
        return str(checkpoint)
    return None


def check_settings(path: Path, settings: dict[str, Any], *, write: bool) -> None:
    """Raise ValueError if a directory holds a run with other settings; note them down if it holds none."""
    file = path / "run.json"
    settings = json.loads(
        json.dumps({k: v for k, v in settings.items() if not k.startswith(tuple(_FREE.split()))}, default=str)
    )
    if not (file.exists() and last_checkpoint(path)):
        if write:
            path.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(settings, indent=2) + "\n")
        return
    before = json.loads(file.read_text())
    changed = [key for key in settings if before.get(key) != settings[key]]
    if changed:
        raise ValueError(
            f"{path} holds a run with other settings: "
            + "; ".join(f"{key} is {before.get(key)!r} there and {settings[key]!r} here" for key in changed)
            + ". Choose another --output_dir, or ask for the same settings"
        )


def main(arguments: list[str] | None = None) -> int:
    """Run the command; see the header of this module."""
    program = "python -m steer_optim.vlm.train"
    parser = TrlParser((DataArguments, SteeredDistillationConfig, ModelConfig), prog=program, description=__doc__)
    try:
        data, args, model = parser.parse_args_and_config(arguments, fail_with_unknown_args=True)
        for name, value in (
            ("model_name_or_path", model.model_name_or_path),
            ("teacher_model_name_or_path", args.teacher_model_name_or_path),
        ):
            if value is None:
                raise ValueError(f"--{name} is needed: a name on the hub, or a folder")
        refuse(args)
        train, held_out = load(data)
        settings = {**asdict(data), **args.to_dict(), **asdict(model)}
        path = Path(args.output_dir)
        check_settings(path, settings, write=args.should_save and not data.measure_only)
    except (ValueError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    # transformers warns of the names that TRL uses.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    options = {"revision": model.model_revision, "attn_implementation": model.attn_implementation}
    options |= {"dtype": model.dtype, "trust_remote_code": args.trust_remote_code}
    args.model_init_kwargs = {**options, **(args.model_init_kwargs or {})}
    trainer = SteeredDistillationTrainer(
        model=model.model_name_or_path,
        teacher_model=args.teacher_model_name_or_path,
        args=args,
        train_dataset=train,
        eval_dataset=held_out if args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    if data.measure_only:
        rows = torch.utils.data.Subset(train, range(min(200, len(train)))) if held_out is None else held_out
        findings, text = investigate(trainer, rows)
        print(f"\n{text}\n\n{advise(findings)}")
        return 0
    examination = None
    if held_out is not None:
        examination = Examination(trainer, held_out)
        trainer.add_callback(examination)
    resume = args.resume_from_checkpoint or last_checkpoint(path)
    trainer.train(resume_from_checkpoint=resume)
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(args.output_dir)
    trainer.save_state()
    if examination is not None:
        trainer.accelerator.print(f"\n{examination.finish()}\nwritten to {path}")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=data.dataset_name)
    trainer.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
