"""What turns hidden states into logits, and hidden states whose logits have not been computed.

A head is a linear map to the vocabulary, perhaps with a bias and a low-rank adapter (LoRA), whose output may be scaled
and then soft-capped::

    logits = cap * tanh(scale * (x W^T + b + s (x A^T) B^T) / cap)

Logits leave the matrix product in float32: rounded to half precision they lose what distinguishes a student from its
teacher once the two are close.

Dimensions: ``B`` prompts, ``T`` response tokens, ``N`` rows, ``d`` hidden size, ``r`` rank, ``V`` vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from steer_optim.vlm.families import family_of

# How a model type names the factor of its logits, and the exponent it is raised to: Granite divides by its own.
_SCALES = {"logit_scale": 1, "logits_scaling": -1, "lm_head_multiplier": 1, "output_multiplier": 1}
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")


@dataclass(frozen=True, eq=False)
class Head:
    """What turns hidden states into logits.

    Attributes:
        weight_Vd: ``(V, d)``, floating; a parameter, tied to the embedding or not, or a constant.
        bias_V: ``(V,)``, or None.
        softcap: logits are kept within ``(-softcap, softcap)`` by a tanh (Gemma 2); None for no cap.
        scale: logits are multiplied by it, before the cap.
        lora_A_rd: ``(r, d)``, the adapter's first factor, or None.
        lora_B_Vr: ``(V, r)``, its second.
        lora_scaling: what the adapter's output is multiplied by.

    A tensor that is sharded (a DTensor, of FSDP2 or tensor parallelism) is gathered when the head is made, once for all
    views that meet it, and its gradient is averaged over the processes and sharded again, as FSDP2 does: losses are
    means over the tokens of a process, and processes that share a shard's rows, as in tensor parallelism, compute the
    same.

    Raises:
        ValueError: shapes do not fit each other; half an adapter; the cap is not positive.

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
            # By name: importing DTensor costs half a second, and whoever holds one has imported it.
            if type(x).__name__ == "DTensor":
                object.__setattr__(self, name, gather(x))
        if self.weight_Vd.ndim != 2 or not self.weight_Vd.is_floating_point():
            raise ValueError(
                f"weight_Vd must be (V, d) and floating; got {tuple(self.weight_Vd.shape)}, {self.weight_Vd.dtype}: "
                "a weight that a sharding framework has flattened or emptied needs logits from response_logits"
            )
        V, d = self.weight_Vd.shape
        if (self.lora_A_rd is None) != (self.lora_B_Vr is None):
            raise ValueError("lora_A_rd and lora_B_Vr are two factors of one adapter: pass both or none")
        r = 0 if self.lora_A_rd is None else len(self.lora_A_rd)
        for name, shape in (("bias_V", (V,)), ("lora_A_rd", (r, d)), ("lora_B_Vr", (V, r))):
            if (x := getattr(self, name)) is not None and tuple(x.shape) != shape:
                raise ValueError(f"{name} must be {shape} beside a weight of {(V, d)}; got {tuple(x.shape)}")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be positive, or None for no cap; got {self.softcap}")

    def __call__(self, hidden: Tensor) -> Tensor:
        """The logits ``(..., V)`` of hidden states ``(..., d)``, differentiable, all at once.

        Float32, or float64 where the states or the head are. It upcasts both: for a few rows, and for checks.
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
        """``s x A^T``, ``(..., r)``, what the adapter's second factor is multiplied by; in the dtype of ``hidden``."""
        assert self.lora_A_rd is not None
        return self.lora_scaling * (hidden @ self.lora_A_rd.to(hidden.dtype).T)

    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by the name of the attribute."""
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}

    def cut(self, vocabulary: int) -> Head:
        """The head of the first ``vocabulary`` ids; itself where these are all."""
        if vocabulary == len(self.weight_Vd):
            return self
        return replace(
            self,
            weight_Vd=self.weight_Vd[:vocabulary],
            bias_V=None if self.bias_V is None else self.bias_V[:vocabulary],
            lora_B_Vr=None if self.lora_B_Vr is None else self.lora_B_Vr[:vocabulary],
        )

    def same(self, other: Head) -> bool:
        """Whether both are made of the same tensors, detached or not, and the same numbers."""
        return all(_same(getattr(self, field.name), getattr(other, field.name)) for field in fields(self))

    @classmethod
    def of(cls, model: nn.Module) -> Head:
        """The head of a transformers model, a wrapper around it, or a PEFT model with LoRA on the head.

        Reads ``get_output_embeddings()`` and, in the configuration, what the model does to its logits afterwards:
        Gemma's soft-cap; the scales of Cohere, Granite, Falcon H1 and MuP heads. The head's tensors are the model's
        own, so that gradients reach its parameters, and tied ones add up.

        Of a model that FSDP2 shards it is read after a forward pass, when the parameters of the root are whole, the
        head's among them as a rule, and their gradients reach FSDP2 itself. Elsewhere the head is gathered.

        Raises:
            ValueError: the model names no head; the head is no linear layer; its adapter is not a plain LoRA, has
                dropout in training mode, or is one of several.

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
        # PEFT's wrapper of a module that is trained whole.
        if (copies := getattr(module, "modules_to_save", None)) is not None:
            active = [] if module.disable_adapters else list(module.active_adapters)
            if len(active) > 1:
                raise ValueError(f"one trained copy of the head can be active; got {active}: pass logits instead")
            module = copies[active[0]] if active else module.original_module
        adapter = {}
        if hasattr(module, "base_layer"):
            adapter, module = _lora(module), module.base_layer
        weight_Vd, bias_V = getattr(module, "weight", None), getattr(module, "bias", None)
        if not isinstance(module, nn.Linear) or weight_Vd is None:
            raise ValueError(f"the head must be a torch.nn.Linear; got {type(module).__name__}: pass logits instead")
        return cls(weight_Vd, bias_V=bias_V, **_after(owner), **adapter)


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """Logits that have not been computed: the hidden states of the rows, and the head that they meet.

    Takes the place of ``(B, T, V)`` logits where it is accepted. Indexing gives the states of a part.

    Attributes:
        hidden_BTd: ``(B, T, d)``, or rows of any other shape, floating: what the head takes.
        head: what it meets.
        autocast: the dtype in which an accelerator multiplies them, results in float32; None for their own.

    Raises:
        ValueError: the states are not floating, of another size than the head takes, or on another device.

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
                f"hidden states must be floating, (..., {weight.shape[1]}) as the head's weight {tuple(weight.shape)} "
                f"takes them, and on {weight.device}; got {x.dtype}, {tuple(x.shape)} on {x.device}"
            )

    @property
    def shape(self) -> torch.Size:
        """That of the logits, ``(B, T, V)``."""
        return torch.Size((*self.hidden_BTd.shape[:-1], len(self.head.weight_Vd)))

    @property
    def device(self) -> torch.device:
        """Where the states and the head are."""
        return self.hidden_BTd.device

    @property
    def dtype(self) -> torch.dtype:
        """The wider of the states' and the head's."""
        return torch.promote_types(self.hidden_BTd.dtype, self.head.weight_Vd.dtype)

    @property
    def requires_grad(self) -> bool:
        """Whether the states or a tensor of the head do."""
        return any(x.requires_grad for x in (self.hidden_BTd, *self.head.tensors().values()))

    def __getitem__(self, index: Any) -> HiddenStates:
        return replace(self, hidden_BTd=self.hidden_BTd[index])

    def logits(self) -> Tensor:
        """All logits at once, ``(..., V)``, float32 or float64, differentiable: what this type is there to avoid."""
        return self.head(self.hidden_BTd)

    def detach(self) -> HiddenStates:
        """The same without gradients, to the states or to the head."""
        detached: dict[str, Any] = {name: x.detach() for name, x in self.head.tensors().items()}
        return replace(self, hidden_BTd=self.hidden_BTd.detach(), head=replace(self.head, **detached))


def output_embeddings(model: nn.Module) -> tuple[nn.Module, Any]:
    """The transformers model inside ``model``, and its head.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if callable(find := getattr(module, "get_output_embeddings", None)) and (head := find()) is not None:
            return module, head
    raise ValueError(
        f"{type(model).__name__} names no head: it needs get_output_embeddings(), as transformers' models have. Build "
        "Head(weight_Vd, ...) and HiddenStates(hidden_BTd, head) by hand, or pass logits"
    )


def gather(x: Tensor) -> Tensor:
    """The whole of a DTensor, whose gradient is averaged over the processes and sharded again."""
    apply: Callable[..., Tensor] = _Gather.apply
    return apply(x)


class _Gather(torch.autograd.Function):
    """``full_tensor`` would take the gradient of one process for that of all."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Tensor:
        ctx.mesh, ctx.placements = x.device_mesh, x.placements
        whole: Tensor = x.full_tensor()
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Partial

        share = gradient / ctx.mesh.size()
        total = DTensor.from_local(share, ctx.mesh, [Partial()] * ctx.mesh.ndim, run_check=False)
        return total.redistribute(placements=ctx.placements)


def _same(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return type(a) is type(b) and bool(a == b)
    return a.dtype == b.dtype and (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())


def _after(model: nn.Module) -> dict[str, Any]:
    """What the model does to its logits after the head."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found: dict[str, Any] = {}
    for name, exponent in _SCALES.items() if family_of(config).scaled else ():
        if (value := getattr(text, name, None)) is not None:
            # HyperCLOVA X multiplies by what Granite, under the same name, divides by.
            multiplies = exponent > 0 or str(getattr(text, "model_type", "")).startswith("hyperclovax")
            found["scale"] = float(value if multiplies else 1 / value)
    for name in _SOFTCAPS:
        if getattr(text, name, None) is not None:
            found["softcap"] = float(getattr(text, name))
    return found


def _lora(layer: Any) -> dict[str, Any]:
    """The active adapter of a PEFT layer; nothing where it is switched off or merged into the weight."""
    if layer.disable_adapters or layer.merged:
        return {}
    active = [name for name in layer.active_adapters if name in getattr(layer, "lora_A", {})]
    if not active:
        return {}
    name = active[0]
    dropout = getattr(layer.lora_dropout[name], "p", 0.0) if layer.training else 0.0
    A, B = layer.lora_A[name], layer.lora_B[name]
    plain = not getattr(layer, "lora_variant", {}) and B.bias is None
    if len(active) > 1 or dropout or not plain:
        raise ValueError(
            "the head's adapter must be one plain LoRA without bias and, in training mode, without dropout; got "
            f"adapters {active}, dropout {dropout}{'' if plain else ', and a variant or a bias'}: pass logits instead"
        )
    return {"lora_A_rd": A.weight, "lora_B_Vr": B.weight, "lora_scaling": float(layer.scaling[name])}
