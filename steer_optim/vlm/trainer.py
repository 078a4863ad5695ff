"""Decomposed on-policy distillation as a TRL trainer: ``DistillationTrainer`` with steered losses.

TRL samples the responses (with ``generate`` or vLLM), batches, accumulates, clips, schedules, logs and saves. This
trainer renders prompts with their images and without; scores student and teacher under the views of a
:class:`~steer_optim.vlm.distillation.DecomposedDistillation`, from hidden states; and wraps the optimizer of the
arguments into a :class:`~steer_optim.SteeredOptimizer`.

It uses private parts of TRL: ``_generate`` with ``_tokenize_prompts`` and ``_generate_single_turn``,
``_prepare_inputs``, ``_step``, ``_buffered_inputs``, ``_metrics``, ``_logs``, ``_last_loaded_step`` and ``_tokenizer``.
They may change with any release, so other versions are refused.
"""

from __future__ import annotations

import ast
import copy
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

try:
    import trl
    from accelerate.utils import broadcast_object_list, gather_object, is_peft_model
    from transformers import AutoTokenizer, ImageProcessingMixin, PreTrainedModel, ProcessorMixin, TrainerState
    from trl import DistillationConfig, DistillationTrainer
    from trl.trainer.utils import RepeatSampler, create_model_from_path
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"there is no {error.name}: pip install 'steer_optim[trl]'") from error

import steer_optim.rules
from steer_optim import SteeredOptimizer
from steer_optim.capture import graph, is_reentrant
from steer_optim.monitor import scalars
from steer_optim.rules import Rule
from steer_optim.vlm.data import ROW, conversation, numbered
from steer_optim.vlm.distillation import DECOMPOSITIONS, DecomposedDistillation
from steer_optim.vlm.divergences import View
from steer_optim.vlm.families import flat, image_ids
from steer_optim.vlm.forward import score, shares_trained
from steer_optim.vlm.gate import sampled_log_probs, visual_dependency, visual_tokens
from steer_optim.vlm.prompts import BadConversation, Prompts, Rollout, render, unpadded
from steer_optim.vlm.rollout import evaluating

TESTED = "1.16"
_METRICS = "steer_optim metrics"  # in a checkpoint
_PIXELS = ["image_mean", "image_std", "rescale_factor", "crop_size", "patch_size", "temporal_patch_size", "merge_size"]
_COUNTS = ["refresh_every", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"]

if trl.__version__.rsplit(".", 1)[0] != TESTED:
    raise ImportError(
        f"steer_optim.vlm.trainer uses private parts of trl {TESTED}; found {trl.__version__}: pip install "
        f"'trl=={TESTED}.*'"
    )


def option(default: Any, help: str) -> Any:
    """Return the field of an option of the command line."""
    return field(default=default, metadata={"help": help})


@dataclass
class SteeredDistillationConfig(DistillationConfig):  # type: ignore[misc]  # trl is untyped
    """Extend TRL's ``DistillationConfig`` by the decomposition and how it is steered.

    ``temperature`` is that of sampling and losses. ``beta`` must be 1: the decomposition names its divergence.

    Args:
        decomposition: one of :data:`~steer_optim.vlm.distillation.DECOMPOSITIONS`.
        gamma: the strength of steering.
        lam: the weight of language preservation; that of the decomposition by default.
        prior: ``live`` or ``frozen``; that of the decomposition by default. A frozen prior is a copy of the student
            before training, or, if its adapters are untrained, the student with its adapters switched off.
        floor: the smallest probability of the teacher in ``q*``; that of the decomposition by default, 0 for none.
        quantile: a token above this quantile of visual dependency is visual.
        rule: how components are weighed, in Python: ``Steer("vis", gain=2.0)``, ``PCGrad()``. That of the decomposition
            by default.
        refresh_every: take the Gramian once in this many steps.

    Raises:
        ValueError: a value is out of range, or set and not read; or the rule is invalid.

    Example:
        >>> from steer_optim.vlm.trainer import SteeredDistillationConfig
        >>> config = SteeredDistillationConfig("runs", decomposition="exact", rule='Steer("vis")', use_cpu=True)
        >>> config.method().views
        ('student', 'student_text', 'teacher', 'teacher_text')
        >>> config.make_rule()
        Steer(toward='vis', gain=0.0, project='conflict', preserve_norm=True)
    """

    decomposition: str = option(
        "vgs-frozen", "vgs-frozen (recommended), vgs (the paper's), standard, tokens, exact, language, ..."
    )
    gamma: float = option(2.0, "Strength of steering.")
    lam: float | None = option(None, "Weight of language preservation. Default: that of the decomposition.")
    prior: str | None = option(
        None, "The student's text-only view in q*: live, or frozen. Default: that of the decomposition."
    )
    floor: float | None = option(
        None, "Floor of the teacher's probabilities in q*; 0 for none. Default: the decomposition's."
    )
    quantile: float = option(0.7, "Tokens above it in visual dependency are visual.")
    rule: str | None = option(None, "Such as 'Steer(\"vis\", gain=2.0)' or 'PCGrad()'. Default: the decomposition's.")
    refresh_every: int = option(10, "Steps from one Gramian to the next.")

    def __post_init__(self) -> None:
        if self.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
            raise ValueError("DeepSpeed is not supported, because its engine takes one loss: use FSDP2")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, about the names that TRL uses
            super().__post_init__()
        if self.beta != 1.0:
            raise ValueError(
                f"beta={self.beta} is not read here: use --decomposition forward, jsd, or standard (reverse KL)"
            )
        given = (self.generation_kwargs or {}).get("temperature", self.temperature)
        if given != self.temperature:
            raise ValueError(
                f"--generation_kwargs sample at temperature {given}, losses at {self.temperature}: pass it as "
                "--temperature, which is that of both"
            )
        least = dict.fromkeys(_COUNTS, 1) | {"learning_rate": 0}
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise ValueError(f"{name} must be at least {bound}; got {getattr(self, name)}")
        for name, example in (("decomposition", "vgs"), ("rule", 'Steer("vis")')):
            if not isinstance(getattr(self, name), str | None):
                raise TypeError(
                    f"{name} must be text, such as {example!r}; got {getattr(self, name)!r}. Give a Decomposition of "
                    "your own a name in steer_optim.vlm.DECOMPOSITIONS"
                )
        method = self.method()
        entry = DECOMPOSITIONS[self.decomposition]
        steers = self.rule is None and repr(entry.rule(0.0)) != repr(entry.rule(1.0))
        scales = any(part.factor == "gamma" for part in entry.components.values())
        reads = {"gamma": steers or scales, "quantile": method.gated}
        for name, read in reads.items():
            if not read and getattr(self, name) != getattr(type(self), name):
                beside = f"--decomposition {self.decomposition}" + (f" with --rule {self.rule}" if self.rule else "")
                raise ValueError(f"--{name} {getattr(self, name)} is not read by {beside}: leave it out")
        self.make_rule().check(method.components)

    def method(self) -> DecomposedDistillation:
        """Return the decomposition with its hyperparameters."""
        names = ("gamma", "lam", "prior", "floor", "quantile", "temperature")
        return DecomposedDistillation(self.decomposition, **{name: getattr(self, name) for name in names})

    def make_rule(self) -> Rule:
        """Return the rule that steers."""
        return self.method().rule() if self.rule is None else _parse(self.rule)


@dataclass
class MicroBatch:
    """The inputs of one backward pass: prompts, sampled responses, and numbers of the entire step."""

    prompts: Prompts
    response: Rollout
    count: Tensor  # tokens of the step, divided by the number of processes
    teacher: dict[str, View] = field(default_factory=dict)
    gate_BT: Tensor | None = None


class SteeredDistillationTrainer(DistillationTrainer):  # type: ignore[misc]  # trl is untyped
    """Distil a vision-language model on-policy with decomposed, steered losses, on TRL's trainer.

    It runs in one process, under DDP and under FSDP2, with PEFT adapters, and with TRL's vLLM modes. Keep the student's
    weights in float32: ``bf16`` computes in bfloat16 under autocast. Teacher and prior are loaded in bfloat16 then.

    The log adds to TRL's numbers those of :mod:`steer_optim.monitor` (``steer/angle/...``, ``steer/weight/...``,
    ``steer/loss/...``), ``steer/floored`` (the share of response tokens whose probability a floor raised) and
    ``steer/dropped`` (that of responses with a placeholder for an image, which are not scored). ``loss`` is the
    weighted sum of the components that is trained; ``eval_loss`` is ``std``, or the plain sum if there is no ``std``.

    Args:
        model: the student, a path or a model.
        teacher_model: the teacher, a path or a model, with the same vocabulary.
        args: the configuration.
        train_dataset: rows as in :mod:`steer_optim.vlm.data`.
        eval_dataset: the same, or a dictionary of such data sets.
        processing_class: the processor; by default that of the student's path.
        options: go to ``DistillationTrainer``: ``callbacks``, ``peft_config``, ``quantization_config``.

    Raises:
        TypeError: there is no processor of images and text.
        ValueError: there is no teacher, its vocabulary differs, a step takes more rows than there are, or the run asks
            for something that is not supported: DeepSpeed, FSDP1, tensor, pipeline or context parallelism, float16,
            ``torch.compile``, ``auto_find_batch_size``, ``split_batches``, ``remove_unused_columns``, tools.

    Example:
        >>> config = SteeredDistillationConfig("runs", gamma=2.0)  # doctest: +SKIP
        >>> trainer = SteeredDistillationTrainer(student, teacher, config, rows)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP

    References:
        arXiv 2606.00564; Agarwal et al., *On-Policy Distillation of Language Models*, arXiv 2306.13649.
    """

    _name = "Decomposed on-policy distillation"
    _tag_names = ("trl", "distillation", "steer_optim")

    def __init__(
        self,
        model: Any,
        teacher_model: Any,
        args: SteeredDistillationConfig,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **options: Any,
    ) -> None:
        refuse(args)
        if isinstance(train_dataset, Mapping):
            raise ValueError(f"train_dataset has the splits {', '.join(train_dataset)}: pass one of them")
        if options.get("tools"):
            raise ValueError("tools are not supported: prompts would not name them, and their answers be trained on")
        self.method = args.method()
        if isinstance(model, str):
            # TRL would spread a model over all GPUs that this process sees; the losses need it on one.
            args.model_init_kwargs = {"device_map": None, **(args.model_init_kwargs or {})}
        super().__init__(
            model=model,
            args=args,
            train_dataset=numbered(train_dataset),
            eval_dataset=None if eval_dataset is None else numbered(eval_dataset),
            processing_class=processing_class,
            **options,
        )
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and args.bf16 and plugin.mixed_precision_policy is not None:
            # Accelerate would add up the gradients of all processes in bfloat16.
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)
        step = args.per_device_train_batch_size * self.accelerator.num_processes * args.gradient_accumulation_steps
        if hasattr(self.train_dataset, "__len__") and len(self.train_dataset) < step:
            raise ValueError(
                f"there are {len(self.train_dataset)} rows to train on, and a step takes {step}: pass smaller "
                "per_device_train_batch_size or gradient_accumulation_steps, or more rows"
            )
        if not isinstance(self.processing_class, ProcessorMixin):
            raise TypeError(
                f"{type(self.processing_class).__name__} is not a processor of images and text: the student must be a "
                "vision-language model; pass processing_class if its folder has no processor"
            )
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ValueError("there is nothing to train: no parameter of the student requires grad")
        self._tokenizer.padding_side = "left"
        suppressed = image_ids(self.model.config) | ({self._tokenizer.pad_token_id} - {*self.eos_token_ids})
        given = args.generation_kwargs or {}
        if ends := {*flat(given.get("eos_token_id"))} - {*self.eos_token_ids}:
            raise ValueError(
                f"eos_token_id {sorted(ends)} of --generation_kwargs would not end the responses that are scored: set "
                "it in the generation_config of the student"
            )
        suppressed |= {*flat(given.get("suppress_tokens"))}
        self.generation_kwargs["suppress_tokens"] = sorted(suppressed)
        self.generation_config.suppress_tokens = sorted(suppressed)
        if self._colocated:
            given = dict(self.vllm_generation.generation_kwargs)
            given.pop("suppress_tokens", None)  # vLLM has no such option
            given["logit_bias"] = {**(given.get("logit_bias") or {}), **dict.fromkeys(suppressed, -100.0)}
            self.vllm_generation.generation_kwargs = given
        self._check_precision()
        # Copied before the student is prepared, wrapped or loaded from a checkpoint.
        self.prior = None
        # Switched off, only adapters that begin at zero leave the initial student.
        untrained = ("lora_", "modules_to_save", "trainable_tokens")
        moved = any(
            p.any() if "lora_B" in name else p.requires_grad and not any(x in name for x in untrained)
            for name, p in self.model.named_parameters()
        )
        if self.method.prior == "frozen" and moved:
            prior = copy.deepcopy(self.model)
            if args.bf16:
                _round(prior)
            self.prior = self._frozen(prior)
        self.teacher_model = self._frozen(self._load_teacher(teacher_model))

    @property
    def _colocated(self) -> bool:
        return bool(self.use_vllm and self.vllm_mode == "colocate")

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return the optimizer of the arguments, steered."""
        optimizer = super().create_optimizer(model)
        if not hasattr(self, "steered"):
            if not isinstance(optimizer, SteeredOptimizer):
                replicas = True if self.accelerator.num_processes > 1 and not self.is_fsdp_enabled else None
                options = {"refresh_every": self.args.refresh_every, "data_parallel": replicas}
                optimizer = SteeredOptimizer(optimizer, self.args.make_rule(), **options)
            self.steered = self.optimizer = optimizer
        return self.optimizer

    def compute_loss(
        self, model: Any, inputs: MicroBatch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the joined components of a micro-batch; the backward pass of the step's last one steers."""
        response = inputs.response
        with self.accelerator.autocast():
            views = self._score(model, inputs, names=None)
            trained: list[Any] = [views["student"]] + ([views["student_text"]] if self.method.trains_text else [])
            for view in trained:
                if self.model.training and not view.requires_grad:
                    view.hidden_BTd.requires_grad_()  # only the vision tower is trained, and this view has no image
            losses = self.method(views, response.scored_BT, count=inputs.count, gate_BT=inputs.gate_BT)
        if not self.model.training:
            values = self._mean(losses)
            self._record({f"steer/loss/{name}": value for name, value in values.items()})
            loss = torch.tensor(values.get("std", sum(values.values())), device=self.accelerator.device)
            return (loss, None) if return_outputs else loss
        if self.method.floor and (self.state.global_step + 1) % max(int(self.state.logging_steps), 1) == 0:
            self._record({"steer/floored": self._share_floored(views, response, self.method.floor)})
        if self.method.trains_text or inputs.prompts.image.keys() <= inputs.prompts.text.keys():
            losses = {name: self._reaching(loss) for name, loss in losses.items()}
        loss = self.steered.join(losses, accumulate=not self.accelerator.sync_gradients)
        return (loss, None) if return_outputs else loss

    def _reaching(self, loss: Tensor) -> Tensor:
        """Return a loss with a zero gradient if it has none: of a view without images, if only the tower is trained."""
        nodes = [*graph([loss])]
        # Not only those of the model: FSDP2 gathers others for a pass. Reentrant checkpoints hide theirs.
        hidden = self.is_fsdp_enabled and any(map(is_reentrant, nodes))
        if hidden or any(isinstance(getattr(node, "variable", None), torch.nn.Parameter) for node in nodes):
            return loss
        *_, last = (p for p in self.model.parameters() if p.requires_grad)  # not of the tower, if possible
        zero: Tensor = 0 * last.sum()
        return loss + zero.to(loss)

    def train(self, *args: Any, **options: Any) -> Any:
        """Train as TRL does, from the beginning of a step: an earlier call may have been interrupted within one."""
        self._step = 0
        if hasattr(self, "steered"):
            self.steered.zero_grad()
        return super().train(*args, **options)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any) -> Tensor:
        """Backpropagate a micro-batch; return the trained loss at the last one of a step, else 0."""
        if self.is_fsdp_enabled:
            # Every micro-batch takes its gradients, so FSDP2 must reduce them each time.
            model.set_requires_gradient_sync(True)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        geometry = self.steered.geometry
        if not self.accelerator.sync_gradients or geometry is None:
            return torch.zeros_like(loss)
        losses = self._mean(dict(zip(geometry.names, cast(Tensor, geometry.losses), strict=True)))
        numbers = scalars(geometry) | {f"steer/loss/{name}": value for name, value in losses.items()}
        trained = sum(numbers[f"steer/weight/{name}"] * value for name, value in losses.items())
        self._record({**numbers, "loss": trained})  # in place of the sum of the components, which is `loss`
        return torch.full_like(loss, trained)

    def _prepare_inputs(self, rows: Sequence[dict[str, Any]]) -> MicroBatch:
        """Return a micro-batch; sample the responses of an entire step, and gate its tokens, at once."""
        if not self.model.training:
            return self.sample(rows, parts=1)[0]
        parts = self.args.gradient_accumulation_steps
        if self._step % parts == 0:
            self._buffered_inputs = self.sample(rows, parts)
        return cast(MicroBatch, self._buffered_inputs[self._step % parts])

    @torch.no_grad()
    def sample(self, rows: Sequence[dict[str, Any]], parts: int) -> list[MicroBatch]:
        """Return the rows as ``parts`` micro-batches of one step, each with its responses."""
        messages = [conversation(row) for row in rows]
        self._sources = [row.get(ROW, "?") for row in rows]  # evaluate and predict may get other data
        size = -(-len(rows) // parts)
        slices = [slice(i, i + size) for i in range(0, len(rows), size)]
        self._rendered = [self.render(messages[part], self._sources[part]) for part in slices]
        _, ids, *_ = self._generate(messages)
        if len(ids) != len(rows):
            raise ValueError(
                f"there are {len(ids)} responses to {len(rows)} prompts: leave num_return_sequences and n out of "
                "--generation_kwargs"
            )
        forbidden = image_ids(self.model.config)
        dropped = [bool(forbidden & {*response}) for response in ids]
        share = torch.tensor(sum(dropped) / len(ids), device=self.accelerator.device)
        self._record(self._mean({"steer/dropped": share}))
        if self.log_completions:
            asked: list[list[int]] = []
            for part, view in zip(slices, self._rendered, strict=True):
                asked += unpadded(view.text["input_ids"], view.text["attention_mask"])[: len(rows[part])]
            for name, texts in {"prompt": asked, "completion": ids}.items():
                decoded = self.processing_class.batch_decode(texts, skip_special_tokens=True)
                self._logs[name].extend(gather_object(decoded))
        ids = [[] if drop else response for drop, response in zip(dropped, ids, strict=True)]
        config, device = self.model.config, self.accelerator.device
        responses = [Rollout.of(ids[part], config=config, device=device) for part in slices]
        total = torch.stack([self.method.count(response.scored_BT) for response in responses]).sum()
        count = self.accelerator.reduce(total) / self.accelerator.num_processes
        batches = [
            MicroBatch(prompts.to(device), response, count.clamp(min=1e-9))
            for prompts, response in zip(self._rendered, responses, strict=True)
        ]
        if self.method.gated:
            self._gate(batches)
        return batches

    def _gate(self, batches: Sequence[MicroBatch]) -> None:
        """Score the teacher in all micro-batches, and select the visual tokens of the step on all processes."""
        masks, scores = [batch.response.scored_BT for batch in batches], []
        for batch, mask_BT in zip(batches, masks, strict=True):
            with self.accelerator.autocast():
                batch.teacher = self._score(self.model, batch, names=("teacher", "teacher_text"))
            both = batch.teacher["teacher"], batch.teacher["teacher_text"]
            vds_BT = visual_dependency(*both, mask_BT, temperature=self.method.temperature)
            scores.append(vds_BT.flatten())
        every_N = torch.cat([mask_BT.flatten() for mask_BT in masks])
        group = dist.group.WORLD if self.accelerator.num_processes > 1 else None
        gate_N = visual_tokens(torch.cat(scores), every_N, quantile=self.method.quantile, group=group)
        for batch, gate in zip(batches, gate_N.split([mask_BT.numel() for mask_BT in masks]), strict=True):
            batch.gate_BT = gate.view_as(batch.response.scored_BT)

    def _score(self, model: Any, batch: MicroBatch, *, names: Sequence[str] | None) -> dict[str, View]:
        return score(
            # DDP's own reduction would run for the first of several forward passes.
            self.accelerator.unwrap_model(model),
            self.teacher_model,
            batch.prompts,
            batch.response,
            method=self.method,
            prior=self.prior,
            names=names,
            known=batch.teacher,
        )

    def render(self, messages: Sequence[Any], sources: Sequence[Any]) -> Prompts:
        """Return both views of conversations; ``sources`` are the numbers of their rows, which errors name.

        Raises:
            ValueError: a conversation cannot be rendered.
        """
        # All processes must run the vision tower that FSDP2 shards.
        options = {**self.chat_template_kwargs, "blank_image": self.is_fsdp_enabled}
        try:
            return render(self.processing_class, messages, **options)
        except BadConversation as error:
            if error.number >= len(messages):  # the blank one
                raise
            raise ValueError(f"row {sources[error.number]} of the data set: {error}") from error

    def _tokenize_prompts(self, prompts: Sequence[Any]) -> tuple[list[list[int]], Any, dict[str, Any]]:
        """Return ids, images and pixels for TRL's sampling, from :func:`render`: rows may have no image."""
        # vLLM reads no pixels; `generate` reads all prompts of the step in one batch.
        views = self._rendered
        if len(views) > 1 and not self.use_vllm:
            views = [self.render(prompts, self._sources)]
        ids: list[list[int]] = []
        for view in views:
            batch = dict(view.image)
            ids_BL, real_BL = batch.pop("input_ids"), batch.pop("attention_mask")
            fields = {
                key: unpadded(x, real_BL) if isinstance(x, Tensor) and x.shape == ids_BL.shape else x
                for key, x in batch.items()
            }
            rows = unpadded(ids_BL, real_BL)
            real = len(rows) - view.blank
            ids, self._blank_ids = ids + rows[:real], rows[real:]
        if self._colocated:
            texts = self.processing_class.apply_chat_template(
                prompts, tokenize=False, add_generation_prompt=True, **self.chat_template_kwargs
            )
            # Like the processor, whose templates may write the first token themselves.
            special = not texts[0].startswith(self._tokenizer.bos_token or "\0")
            self._bare_ids = self._tokenizer(texts, add_special_tokens=special)["input_ids"]
        images = [[part["image"] for m in row for part in m["content"] if part["type"] == "image"] for row in prompts]
        return ids, [each or None for each in images] if any(images) else None, fields

    def _generate_single_turn(self, prompt_ids: list[list[int]], images: Any, fields: Any, **options: Any) -> Any:
        if self.use_vllm:
            # A colocated vLLM expands each placeholder, even one that the processor has expanded (trl#6294).
            if self._colocated:
                prompt_ids = self._bare_ids
                if self.state.global_step != self._last_loaded_step:
                    # It keeps the features of images when the weights change (trl#7198).
                    self.vllm_generation.llm.llm_engine.reset_encoder_cache()
            said = super()._generate_single_turn(prompt_ids, images, fields, **options)
            return [response or [self._tokenizer.eos_token_id] for response in said]
        # Autocast here too: the model's own begins at its forward pass, which `generate` does not always call.
        with self.accelerator.autocast(), evaluating(self.model):
            ids = super()._generate_single_turn([*prompt_ids, *self._blank_ids], images, fields, **options)
        return ids[: len(ids) - len(self._blank_ids)]

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        """Return TRL's sampler; its order then depends only on the epoch, so that a resumed run repeats it."""
        sampler = super()._get_train_sampler(dataset)
        sampler.__class__, sampler.trainer = _EpochSampler, self
        return sampler

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # The metrics since the last line of the log.
        self.state.stateful_callbacks[_METRICS] = {"args": dict(self._metrics["train"])}
        super()._save_checkpoint(model, trial)
        # Under FSDP2 one process may see the folder of the best checkpoint, and another not yet.
        self.state.best_model_checkpoint = broadcast_object_list([self.state.best_model_checkpoint])[0]

    def _load_callback_state(self) -> None:
        super()._load_callback_state()
        self._metrics["train"].update(self.state.stateful_callbacks.get(_METRICS, {}).get("args", {}))

    def restore(self, checkpoint: str) -> None:
        """Load weights and log from the checkpoint at the end of training, to train no further."""
        prepared: Any = self.accelerator.prepare(self.model, self.create_optimizer())  # FSDP2 needs both
        self.model_wrapped = prepared[0]
        if self.is_fsdp_enabled:
            self.model: Any = prepared[0]
        self._load_from_checkpoint(checkpoint, self.model)
        self.state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            self._load_best_model()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_fsdp_enabled:
            _fill_state(self.steered.inner)
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the weights of a checkpoint, under the names of the model, which may differ from those on disk."""
        if self.is_fsdp_enabled or is_peft_model(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            # Some parts may be frozen in half precision.
            kinds = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
            dtype = kinds.pop() if len(kinds) == 1 else torch.float32
            saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=dtype)
            self.model.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or is_peft_model(self.model):
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_teacher(self, teacher: Any) -> PreTrainedModel:
        if isinstance(teacher, torch.nn.Module) and shares_trained(self.model, teacher):
            raise ValueError("the teacher is the student itself, or inside it, and would be trained: pass a copy")
        if teacher is None:
            raise ValueError(
                "a teacher is needed: pass teacher_model (--teacher_model_name_or_path on the command line)"
            )
        if isinstance(teacher, str):
            options = {
                "dtype": "bfloat16" if self.args.bf16 else "float32",
                "trust_remote_code": self.args.trust_remote_code,
                "revision": self.args.teacher_model_revision or "main",
                "device_map": None,
                **(self.args.teacher_model_init_kwargs or {}),
            }
            self._check_processor(teacher, options)
            teacher = create_model_from_path(teacher, **options)
        elif self.args.teacher_model_init_kwargs or self.args.teacher_model_revision:
            raise ValueError(
                "teacher_model_init_kwargs and teacher_model_revision are not read if the teacher is loaded already: "
                "leave them out, or pass its path"
            )
        own, theirs = (model.config.get_text_config().vocab_size for model in (self.model, teacher))
        if own > theirs or (own < theirs and own < len(self._tokenizer)):
            raise ValueError(
                f"the student has {own} tokens, the teacher {theirs} and the tokenizer {len(self._tokenizer)}: both "
                "must have one vocabulary; only the teacher may have further rows of padding"
            )
        return teacher

    def _check_processor(self, teacher: str, options: Mapping[str, Any]) -> None:
        """Raise ValueError if the teacher's processor differs: the teacher gets the ids and pixels of the student's."""
        source = {name: options[name] for name in ("revision", "trust_remote_code")}
        try:
            words = AutoTokenizer.from_pretrained(teacher, **source)
            special = self._tokenizer.added_tokens_decoder.keys() | words.added_tokens_decoder.keys()
            vocabulary = words.get_vocab()
        except Exception:  # it has none, or one that cannot be loaded here: only its weights are needed
            special, vocabulary = set(), {}
        own = {number: token for token, number in self._tokenizer.get_vocab().items() if number not in special}
        for token, number in vocabulary.items():
            if own.get(number, token) != token:
                raise ValueError(
                    f"id {number} is {own[number]!r} for the student and {token!r} for {teacher}: both must have one "
                    "vocabulary"
                )
        try:
            theirs, _ = ImageProcessingMixin.get_image_processor_dict(teacher, revision=source["revision"])
        except OSError:  # it has no processor
            return
        ours = json.loads(self.processing_class.image_processor.to_json_string())
        for name in _PIXELS:
            values = ours.get(name), theirs.get(name)
            if name == "crop_size" and not theirs.get("do_center_crop", ours.get("do_center_crop")):
                continue
            if all(values) and _numbers(values[0]) != _numbers(values[1]):
                raise ValueError(
                    f"{name} of the images is {values[0]} for the student and {values[1]} for {teacher}, which would "
                    "see other images: take a teacher whose processor makes the same pixels"
                )

    def _frozen(self, model: Any) -> Any:
        """Return the frozen model, on its device or sharded."""
        model.requires_grad_(False).eval()
        if not self.is_fsdp_enabled:
            return self.accelerator.prepare_model(model, evaluation_mode=True)
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        plugin = self.accelerator.state.fsdp_plugin
        layers, plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap, _layers(model)
        sharded = fsdp2_prepare_model(self.accelerator, model)
        plugin.transformer_cls_names_to_wrap = layers or _layers(self.model)
        return sharded

    def _check_precision(self) -> None:
        """Warn if over a tenth of a half-precision student's weights are too large to move by the learning rate."""
        half = [p for p in self.model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
        still = sum(
            int((p.detach().abs() * torch.finfo(p.dtype).eps / 4 > self.args.learning_rate).sum()) for p in half
        )
        share = still / max(1, sum(p.numel() for p in half))
        if share > 0.1:
            warnings.warn(
                f"{share:.0%} of the student's {str(half[0].dtype)[6:]} weights cannot move by a learning rate of "
                f"{self.args.learning_rate:g}: it is rounded away. Load the student in float32 (--dtype float32), and "
                "compute in bfloat16 with --bf16",
                stacklevel=3,
            )

    def _record(self, numbers: Mapping[str, float]) -> None:
        """Add to the numbers whose means are the next line of the log."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, number in numbers.items():
            metrics[name].append(number)

    def _mean(self, numbers: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the means of scalars over all processes, read at once."""
        values = torch.stack([value.detach().float() for value in numbers.values()])
        values = self.accelerator.reduce(values, reduction="mean")
        return dict(zip(numbers, values.tolist(), strict=True))

    def _share_floored(self, views: dict[str, Any], response: Rollout, floor: float) -> float:
        """Return the share of response tokens to which the teacher, in either view, gives less than the floor."""
        low_BT = torch.zeros_like(response.scored_BT)
        for name in ("teacher", "teacher_text"):
            log_p_BT = sampled_log_probs(
                views[name], response.response_BT, response.scored_BT, temperature=self.method.temperature
            )
            low_BT |= log_p_BT.exp() < floor  # 1 where not scored
        counts: Tensor = self.accelerator.reduce(torch.stack([low_BT.sum(), response.scored_BT.sum()]))
        return float(counts[0] / counts[1].clamp(min=1))


def _numbers(value: Any) -> list[Any]:
    """Return the numbers of a setting of images; one if all are equal: 14 is also written [14, 14], or by name."""
    values = [*value.values()] if isinstance(value, Mapping) else value
    numbers = values if isinstance(values, list) else [values]
    return numbers[:1] if len({*numbers}) == 1 else numbers


def refuse(args: SteeredDistillationConfig) -> None:
    """Raise ValueError, by name, if a run is configured for something that steering does not support."""
    dynamo = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
    version = (args.fsdp_config or {}).get("version", 2) if args.fsdp else os.environ.get("FSDP_VERSION", "1")
    parallel = getattr(args, "parallelism_config", None)
    axes = {name: getattr(parallel, f"{name}_size", 1) for name in ("tp", "cp", "sp", "pp")}
    reasons = {
        "FSDP1": ((launched or args.fsdp) and str(version) == "1", "set fsdp_version: 2"),
        "torch.compile": (args.torch_compile or dynamo.lower() != "no", "leave it out"),
        "float16": (args.fp16, "use --bf16"),
        # TRL's sampler goes on as before, and rows would be left out.
        "auto_find_batch_size": (args.auto_find_batch_size, "set per_device_train_batch_size"),
        "split_batches": (args.accelerator_config.split_batches, "set per_device_train_batch_size"),
        "label_smoothing_factor": (args.label_smoothing_factor != 0, "leave it out, as there are no labels"),
        "data_seed": (args.data_seed not in (None, args.seed), "pass it as seed"),
        "train_sampling_strategy": (args.train_sampling_strategy != "random", "leave it out: rows are shuffled"),
        "remove_unused_columns": (args.remove_unused_columns, "leave it out, as messages would be removed, too"),
    }
    reasons |= {f"parallelism_config.{name}_size={n}": (n > 1, "use FSDP2") for name, n in axes.items()}
    for name, (asked, remedy) in reasons.items():
        if asked:
            raise ValueError(f"{name} is not supported by SteeredDistillationTrainer: {remedy}")


def _round(model: PreTrainedModel) -> None:
    """Round a model to bfloat16 as ``from_pretrained`` does.

    What a checkpoint does not hold, such as rotary frequencies, and what the model names to be kept stays as it is.
    """
    keep = model._keep_in_fp32_modules_strict or ()
    for prefix, module in model.named_modules():
        for name, x in (*module._parameters.items(), *module._buffers.items()):
            kept = any(fnmatch(f"{prefix}.{name}", f"*{part}*") for part in keep)
            if x is not None and x.is_floating_point() and not kept and name not in module._non_persistent_buffers_set:
                x.data = x.data.bfloat16()


class _EpochSampler(RepeatSampler):  # type: ignore[misc]  # trl is untyped
    """Seeded by the epoch of the trainer: on several processes nothing else reaches the sampler of a resumed epoch."""

    trainer: SteeredDistillationTrainer

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + int(self.trainer.state.epoch or 0))
        yield from super().__iter__()


def _fill_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the state of a zero gradient for parameters without state: FSDP2 loads that of all parameters, or none."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients, rates = [p.grad for p in parameters], [group["lr"] for group in optimizer.param_groups]
    without = [p for p in parameters if p not in optimizer.state]
    for p in parameters:
        p.grad = None if p in optimizer.state else torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for p in without:
        for name, value in (("step", 0.0), ("mu_product", 1.0)):  # of Adam and NAdam: it was no step of the run
            old = optimizer.state[p].get(name)
            if old is not None:
                optimizer.state[p][name] = old.fill_(value) if isinstance(old, Tensor) else type(old)(value)
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient


def _layers(model: Any) -> list[str]:
    """Return the classes of the layers that FSDP2 shards one by one; accelerate fails on missing ones."""
    there = {type(module).__name__ for module in model.modules()}
    return [name for name in model._no_split_modules or () if name in there]


def _parse(text: str) -> Rule:
    """Return the rule that ``text`` calls with literal arguments."""
    names = [name for name in steer_optim.rules.__all__ if name not in ("Rule", "State", "Weighting")]
    known = {name: getattr(steer_optim.rules, name) for name in names}
    try:
        call: Any = ast.parse(text.strip(), mode="eval").body
        if isinstance(call, ast.Name):
            call = ast.Call(call, [], [])
        options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        rule: Rule = known[call.func.id](*map(ast.literal_eval, call.args), **options)
        return rule
    except (SyntaxError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'rule must be one of {", ".join(known)} with its arguments, as in Steer("vis", gain=2.0); got {text!r}: '
            f"{error}"
        ) from error


__all__ = ["SteeredDistillationConfig", "SteeredDistillationTrainer"]
