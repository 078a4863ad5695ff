"""The head, which maps hidden states to logits, and hidden states with their head in place of logits.

A head is a linear map to the vocabulary, with an optional bias and low-rank adapter (LoRA). Its output may be scaled
and then soft-capped::

    logits = cap * tanh(scale * (x W^T + b + s (x A^T) B^T) / cap)

The matrix product returns logits in float32: in half precision, rounding would hide the difference between a student
and a teacher that are close.

Dimensions: ``B`` prompts, ``T`` response tokens, ``N`` rows, ``d`` hidden size, ``r`` rank, ``V`` vocabulary entries.
"""

from __future__ import annotations

import inspect
from dataclasses import KW_ONLY, dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

# The names of the factor of the logits in configs, and its exponent: Granite divides by it.
_SCALES = {"logit_scale": 1, "logits_scaling": -1, "lm_head_multiplier": 1, "output_multiplier": 1}
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
_WAY_OUT = "pass logits instead, those of response_logits or score(..., hidden_states=False)"


@dataclass(frozen=True, eq=False)
class Head:
    """Map hidden states to logits.

    Sharded tensors (a DTensor of FSDP2 or tensor parallelism) are gathered when the head is made, once for all views
    that use it. Their gradients are averaged over the processes and sharded again, as in FSDP2: losses must be means
    over the tokens of a process, and equal on processes with the same tokens, as in tensor parallelism.

    Attributes:
        weight_Vd: ``(V, d)``, floating; a parameter, tied to the embedding or not, or a constant.
        bias_V: ``(V,)``, or None.
        softcap: a tanh keeps logits within ``(-softcap, softcap)`` (Gemma 2); None for no cap.
        scale: logits are multiplied by it, before the cap.
        lora_A_rd: ``(r, d)``, the adapter's first factor, or None.
        lora_B_Vr: ``(V, r)``, its second.
        lora_scaling: the adapter's output is multiplied by it.

    Raises:
        ValueError: shapes differ; one factor of the adapter is missing; the cap is not positive.

    Example:
        >>> import torch
        >>> head = Head(torch.eye(3, 2), softcap=30.0)
        >>> head(torch.tensor([[1.0, 2.0]]))
        tensor([[0.9996, 1.9970, 0.0000]])
    """

    weight_Vd: Tensor
    _: KW_ONLY
    bias_V: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    lora_A_rd: Tensor | None = None
    lora_B_Vr: Tensor | None = None
    lora_scaling: float = 1.0

    def __post_init__(self) -> None:
        for name, x in self.tensors().items():
            # By name, because importing DTensor takes half a second.
            if type(x).__name__ == "DTensor":
                object.__setattr__(self, name, gather(x))
        if self.weight_Vd.ndim != 2 or not self.weight_Vd.is_floating_point():
            raise ValueError(
                f"weight_Vd must be (V, d) and floating; got {tuple(self.weight_Vd.shape)}, {self.weight_Vd.dtype}: "
                "if a sharding framework has flattened or emptied it, pass logits from response_logits"
            )
        V, d = self.weight_Vd.shape
        if (self.lora_A_rd is None) != (self.lora_B_Vr is None):
            raise ValueError("lora_A_rd and lora_B_Vr are the two factors of one adapter: pass both or none")
        r = 0 if self.lora_A_rd is None else len(self.lora_A_rd)
        for name, shape in (("bias_V", (V,)), ("lora_A_rd", (r, d)), ("lora_B_Vr", (V, r))):
            if (x := getattr(self, name)) is not None and tuple(x.shape) != shape:
                raise ValueError(f"{name} must be {shape} beside a weight of {(V, d)}; got {tuple(x.shape)}")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be positive, or None for no cap; got {self.softcap}")

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits ``(..., V)`` of hidden states ``(..., d)``, differentiable, all at once.

        They are float32, or float64 if the states or the head are. Both are upcast: use it for a few rows, and for
        checks.
        """
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, self.weight_Vd.dtype), torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            bias_V = None if self.bias_V is None else self.bias_V.to(dtype)
            logits = nn.functional.linear(hidden.to(dtype), self.weight_Vd.to(dtype), bias_V)
            if self.lora_A_rd is not None and self.lora_B_Vr is not None:
                logits = logits + self.adapt(hidden.to(dtype)) @ self.lora_B_Vr.to(dtype).T
            logits = logits * self.scale
            return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def adapt(self, hidden: Tensor) -> Tensor:
        """Return ``s x A^T``, ``(..., r)``, the input of the adapter's second factor, in the dtype of ``hidden``."""
        assert self.lora_A_rd is not None
        return self.lora_scaling * (hidden @ self.lora_A_rd.to(hidden.dtype).T)

    def tensors(self) -> dict[str, Tensor]:
        """Return its tensors, by the name of the attribute."""
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}

    def cut(self, vocabulary: int) -> Head:
        """Return the head of the first ``vocabulary`` ids; itself if these are all."""
        if vocabulary == len(self.weight_Vd):
            return self
        cut: dict[str, Any] = {name: x[:vocabulary] for name, x in self.tensors().items() if name != "lora_A_rd"}
        return replace(self, **cut)

    def same(self, other: Head) -> bool:
        """Return whether both have the same tensors, detached or not, and the same numbers."""
        return [*map(_key, vars(self).values())] == [*map(_key, vars(other).values())]

    @classmethod
    def of(cls, model: nn.Module) -> Head:
        """Return the head of a transformers model, a wrapper around it, or a PEFT model with LoRA on the head.

        It reads ``get_output_embeddings()`` and, in the configuration, how the model changes its logits afterwards:
        Gemma's soft-cap; the scales of Cohere, Granite, Falcon H1 and MuP heads. The tensors are the model's own, so
        that gradients reach its parameters, and those of tied weights add up.

        Under FSDP2, call it after a forward pass, when the parameters of the root, usually the head's too, are gathered
        and their gradients reach FSDP2 itself. Otherwise the head is gathered.

        Raises:
            ValueError: the model names no head; the head is not linear; its adapter is not a plain LoRA, has dropout in
                training mode, or is one of several.

        Example:
            >>> import torch
            >>> from types import SimpleNamespace
            >>> class Model(torch.nn.Linear):
            ...     config = SimpleNamespace(final_logit_softcapping=30.0)
            ...     def get_output_embeddings(self):
            ...         return self
            >>> Head.of(Model(4, 7)).softcap
            30.0
        """
        owner, module = output_embeddings(model)
        # PEFT's wrapper of a fully trained module.
        if (copies := getattr(module, "modules_to_save", None)) is not None:
            active = [] if module.disable_adapters else list(module.active_adapters)
            if len(active) > 1:
                raise ValueError(f"only one trained copy of the head may be active; got {active}: {_WAY_OUT}")
            module = copies[active[0]] if active else module.original_module
        adapter = {}
        if hasattr(module, "base_layer"):
            adapter, module = _lora(module), module.base_layer
        if not isinstance(module, nn.Linear):
            raise ValueError(f"the head must be a torch.nn.Linear; got {type(module).__name__}: {_WAY_OUT}")
        return cls(module.weight, bias_V=module.bias, **_after(owner), **adapter)


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """Hold hidden states and their head, in place of ``(B, T, V)`` logits. Indexing selects rows.

    Attributes:
        hidden_BTd: ``(B, T, d)``, or rows of any other shape, floating: the input of the head.
        head: the head.
        autocast: the dtype in which an accelerator multiplies them, with float32 results; None for their own.

    Raises:
        ValueError: the states are not floating, or do not fit the head's size or device.

    Example:
        >>> import torch
        >>> states = HiddenStates(torch.randn(2, 3, 4), Head(torch.randn(7, 4)))
        >>> states[:1].logits().shape
        torch.Size([1, 3, 7])
    """

    hidden_BTd: Tensor
    head: Head
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        x, weight = self.hidden_BTd, self.head.weight_Vd
        if x.ndim < 1 or x.shape[-1] != weight.shape[1] or not x.is_floating_point() or x.device != weight.device:
            raise ValueError(
                f"hidden states must be floating, (..., {weight.shape[1]}) for the head's weight {tuple(weight.shape)} "
                f"and on {weight.device}; got {x.dtype}, {tuple(x.shape)} on {x.device}"
            )

    @property
    def shape(self) -> torch.Size:
        """The shape of the logits, ``(B, T, V)``."""
        return torch.Size((*self.hidden_BTd.shape[:-1], len(self.head.weight_Vd)))

    @property
    def device(self) -> torch.device:
        """The device of the states and the head."""
        return self.hidden_BTd.device

    @property
    def dtype(self) -> torch.dtype:
        """The wider dtype of the states and the head."""
        return torch.promote_types(self.hidden_BTd.dtype, self.head.weight_Vd.dtype)

    @property
    def requires_grad(self) -> bool:
        """Whether the states or a tensor of the head require grad."""
        return any(x.requires_grad for x in (self.hidden_BTd, *self.head.tensors().values()))

    def __getitem__(self, index: Any) -> HiddenStates:
        return replace(self, hidden_BTd=self.hidden_BTd[index])

    def logits(self) -> Tensor:
        """Return all logits at once, ``(..., V)``, float32 or float64, differentiable: what this type avoids."""
        return self.head(self.hidden_BTd)

    def detach(self) -> HiddenStates:
        """Return the same with the states and the head detached."""
        detached: dict[str, Any] = {name: x.detach() for name, x in self.head.tensors().items()}
        return replace(self, hidden_BTd=self.hidden_BTd.detach(), head=replace(self.head, **detached))


def output_embeddings(model: nn.Module) -> tuple[nn.Module, Any]:
    """Return the transformers model inside ``model`` and its head, or raise ValueError."""
    for module in model.modules():
        if callable(find := getattr(module, "get_output_embeddings", None)) and (head := find()) is not None:
            return module, head
    raise ValueError(
        f"{type(model).__name__} names no head: it needs get_output_embeddings(), as transformers' models have. Build "
        "Head(weight_Vd, ...) and HiddenStates(hidden_BTd, head) by hand, or pass logits"
    )


def gather(x: Any) -> Tensor:
    """Return the full tensor of a DTensor. Its gradient is averaged over the processes and sharded again."""
    from torch.distributed.tensor import Partial

    # Without grad_placements the gradient would be that of one process only.
    whole: Tensor = x.full_tensor(grad_placements=[Partial()] * x.device_mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / x.device_mesh.size())
    return whole


def _key(x: Any) -> Any:
    return (x.data_ptr(), x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x


def _after(model: nn.Module) -> dict[str, Any]:
    """Return how the model changes its logits after the head."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found: dict[str, Any] = {}
    for name, exponent in _SCALES.items():
        if (value := getattr(text, name, None)) is not None and _reads(model, name):
            # HyperCLOVA X multiplies by logits_scaling, by which Granite divides.
            multiplies = exponent > 0 or str(getattr(text, "model_type", "")).startswith("hyperclovax")
            found["scale"] = float(value if multiplies else 1 / value)
    for name in _SOFTCAPS:
        if (value := getattr(text, name, None)) is not None and _reads(model, name):
            found["softcap"] = float(value)
    return found


def _reads(model: nn.Module, name: str) -> bool:
    """Return whether the code of a model with a head has ``name``, or is unknown.

    LLaVA ignores the factor of its text model.
    """
    owners = [x for x in model.modules() if callable(find := getattr(x, "get_output_embeddings", None)) and find()]
    classes = {each for x in owners for each in type(x).__mro__ if hasattr(each, "get_output_embeddings")}
    unknown = any(vars(each).keys() & {"forward", "get_output_embeddings"} and not _source(each) for each in classes)
    return unknown or any(name in _source(each) for each in classes)


@cache
def _source(kind: type) -> str:
    """Return the code of a class; empty if there is none, as in a notebook and for the classes that FSDP2 makes."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""


def _lora(layer: Any) -> dict[str, Any]:
    """Return the active adapter of a PEFT layer; empty if it is disabled or merged into the weight."""
    parts = {part: getattr(layer, part) for part in layer.adapter_layer_names}
    active = [name for name in layer.active_adapters if any(name in part for part in parts.values())]
    if layer.disable_adapters or layer.merged or not active:
        return {}
    name = active[0]
    factors: Any = (parts[part][name] if name in parts.get(part, {}) else None for part in ("lora_A", "lora_B"))
    A, B = factors
    plain = isinstance(A, nn.Linear) and isinstance(B, nn.Linear) and B.bias is None
    plain = plain and not getattr(layer, "lora_variant", {})
    dropout = getattr(layer.lora_dropout[name], "p", 0.0) if plain and layer.training else 0.0
    if len(active) > 1 or dropout or not plain:
        raise ValueError(
            "the head's adapter must be one plain LoRA without bias and, in training mode, without dropout; got "
            f"{type(layer).__name__} with adapters {active}, dropout {dropout}"
            f"{'' if plain else ', and a variant, a bias, or no LoRA'}: {_WAY_OUT}"
        )
    return {"lora_A_rd": A.weight, "lora_B_Vr": B.weight, "lora_scaling": float(layer.scaling[name])}
