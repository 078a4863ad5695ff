"""Optimizers of other packages, by themselves and inside `SteeredOptimizer`: do they train to the same bits?

    python -m benchmarks.third_party        # writes docs/third-party.md; half a minute

`make third-party` installs the packages, runs tests/third_party, where the same is checked, and writes the page.
"""

import inspect
import io
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from steer_optim import GradVac, SteeredOptimizer, Steering, Sum

RESULT = Path(__file__).parents[1] / "docs" / "third-party.md"
PACKAGES = ("pytorch_optimizer", "schedulefree", "heavyball", "bitsandbytes")
STEPS = 6  # half of them before the interruption; RAdam moves nothing before the sixth
SAME, AS_BARE, NO = "same bits", "as bare", "no"


@dataclass(frozen=True)
class Case:
    """One optimizer, and how it is trained with.

    Attributes:
        make: the optimizer of a model; it passes what is to be steered through the function that it gets.
        loop: "step"; "graph", where the gradients need a graph; "closure"; "pair", where the closure returns a pair;
            "twice", where a step with a closure needs gradients before, too.
        biases: whether the model has any.
        unsteerable: a part of the error that a steered step must raise.
        beside: whether a checkpoint needs the state of the steered optimizer beside that of the one around it.
        cannot: why it does not train the model by itself.
    """

    package: str
    name: str
    make: Callable[[nn.Module, Callable[[Optimizer], Optimizer]], Any]
    loop: str = "step"
    biases: bool = True
    unsteerable: str = ""
    beside: bool = False
    remark: str = ""
    cannot: str = ""


class Run:
    """A model and its optimizer.

    Of a kind: "bare"; "plain", inside the wrapper with ``loss.backward()``; "one", with the sum as the only component;
    "rule", with three components and a rule that remembers; "reference", the same with a `Steering` beside a bare one.
    """

    def __init__(self, case: Case, kind: str) -> None:
        self.case, self.kind = case, kind
        _seed(0)
        self.model = nn.Sequential(nn.Linear(3, 8, case.biases), nn.Tanh(), nn.Linear(8, 3, case.biases))
        self.optimizer = case.make(self.model, self._wrap)

    def _wrap(self, inner: Optimizer) -> Optimizer:
        self.inner = self.steered = inner
        if self.kind == "reference":
            self.steering: Any = Steering(inner, GradVac(beta=0.5))
        elif self.kind != "bare":
            self.steering = self.steered = SteeredOptimizer(inner, GradVac(beta=0.5) if self.kind == "rule" else Sum())
        return self.steered

    def step(self, number: int) -> None:
        _seed(number)  # so that a resumed optimizer draws what it would have drawn
        x, y = torch.randn(2, 5, 3)

        @torch.enable_grad()
        def closure() -> Any:
            self.optimizer.zero_grad()
            out = self.model(x)
            a, b, c = (out - y).square().mean(), (out.sum(1) + 1).square().mean(), (out - y.roll(1, 1)).abs().mean()
            loss = a + b + c
            if self.kind in ("bare", "plain"):
                loss.backward(create_graph=self.case.loop == "graph")
            else:
                self.steering.backward_components({"sum": loss} if self.kind == "one" else {"a": a, "b": b, "c": c})
            return (None, loss.detach()) if self.case.loop == "pair" else loss.detach()

        if self.case.loop not in ("closure", "pair"):
            closure()
        self.optimizer.step(*(() if self.case.loop in ("step", "graph") else (closure,)))

    def mode(self, name: str) -> None:
        if hasattr(self.optimizer, name):
            getattr(self.optimizer, name)()

    def resumed(self) -> "Run":
        """A run that goes on from a checkpoint of this one."""
        file, run = io.BytesIO(), Run(self.case, self.kind)
        torch.save([owner.state_dict() for owner in self._owners()], file)
        file.seek(0)
        for owner, state in zip(run._owners(), torch.load(file, weights_only=False), strict=True):
            owner.load_state_dict(state)
        return run

    def _owners(self) -> list[Any]:
        beside = self.kind == "reference" or (self.case.beside and self.kind != "bare")
        return [self.model, self.optimizer, *([self.steering] if beside else [])]

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def train(case: Case, kind: str, *, resume: bool = False) -> list[Tensor] | str:
    """The parameters after training, and again after ``optimizer.eval()``; or what went wrong."""
    try:
        run = Run(case, kind)
        start = run.weights()
        run.mode("train")
        for number in range(STEPS):
            if number == STEPS // 2:
                run.mode("eval")  # as before any checkpoint
                run = run.resumed() if resume else run
                run.mode("train")
            run.step(number)
        end = run.weights()
        run.mode("eval")
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    if any(torch.equal(p, q) or not q.isfinite().all() for p, q in zip(start, end, strict=True)):
        return "a parameter did not move, or is not finite"
    return [*end, *run.weights()]


def _seed(number: int) -> None:
    for seed in (torch.manual_seed, random.seed, numpy.random.seed):
        seed(number)


def check(case: Case) -> dict[str, str]:
    """What each way of training gives, by the columns of the page; raises if the case does not train by itself."""
    bare = train(case, "bare")
    if isinstance(bare, str):
        raise RuntimeError(f"{case.package} {case.name} does not train by itself: {bare}")
    kind, beside = ("plain", "bare") if case.unsteerable else ("rule", "reference")
    whole, resumed = train(case, kind), train(case, kind, resume=True)
    kept = _compare(resumed, whole)
    if kept != SAME and isinstance(whole, list) and _compare(resumed, train(case, beside, resume=True)) == SAME:
        kept = AS_BARE
    run = Run(case, "one")
    unlike = any(hasattr(run.inner, mode) != hasattr(run.steered, mode) for mode in ("train", "eval"))
    return {
        "plain": _compare(train(case, "plain"), bare),
        "steered": _compare(train(case, "one"), bare),
        "resumed": kept,
        "train/eval": NO if unlike else "yes" if hasattr(run.optimizer, "train") else "has none",
    }


def _compare(found: list[Tensor] | str, expected: list[Tensor] | str) -> str:
    if isinstance(found, str) or isinstance(expected, str):
        return SAME if found == expected else f"{NO}: {found}"
    pairs = zip(found, expected, strict=True)
    return SAME if all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in pairs) else NO


CLOSURE, MATRICES = {"loop": "closure"}, {"biases": False, "remark": "takes matrices only"}
GRAPH_REMARK = "needs the graph of the gradients; steered gradients have none, and its step raises"
GRAPH = {"loop": "graph", "unsteerable": "does not require grad", "remark": GRAPH_REMARK}
NO_STEP = {"cannot": "has no step: hooks update the parameters in the backward pass"}
NO_CPU = {"cannot": "its step fails on a CPU: the shapes of its state do not fit"}
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("AdamWScheduleFreeClosure", "RAdamScheduleFreeClosure", "SGDScheduleFreeClosure"), CLOSURE),
    **dict.fromkeys(("AliG", "LBFGS"), CLOSURE),
    **dict.fromkeys(("LoRARite", "SpectralSphere", "torch Muon"), MATRICES),
    **dict.fromkeys(("AdaHessian", "SophiaH"), GRAPH),
    **dict.fromkeys(("AdaLOMO", "LOMO"), NO_STEP),
    **dict.fromkeys(("AdEMAMix32bit", "PagedAdEMAMix32bit"), NO_CPU),
    "BSAM": {"loop": "twice"},
    "DeMo": {"cannot": "needs einops and a process group"},
    "DistributedMuon": {"cannot": "needs a process group"},
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "AdaShift": {"keep_num": 2},
    "BSAM": {"num_data": 5},
    "PytorchLARS": {"momentum": 0.9},
    "Ranger21": {"num_iterations": 100},
    "SaRA": {"threshold": 10.0, "lr": 0.01},
}
FLAGGED = ("AdaGO", "AdaMuon", "DistributedMuon", "Muon", "MuonClip", "NorMuon")  # of pytorch_optimizer


def cases() -> list[Case]:
    """All of them; the packages must be installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        po, sf, hb, bnb = map(import_module, PACKAGES)
    hb.utils.compile_mode = None  # compiling takes a minute for each optimizer
    classes = [torch.optim.Muon, *map(po.load_optimizer, po.get_supported_optimizers())]
    for module in (sf, hb, bnb.optim):
        classes += [cls for cls in vars(module).values() if inspect.isclass(cls) and issubclass(cls, Optimizer)]
    nested_or_abstract = (hb.SplitOpt, hb.SAMWrapper, hb.SOAPBase, hb.PSGDBase)
    found = [_alone(cls) for cls in classes if cls not in nested_or_abstract] + _nested(po, sf, hb)
    return sorted(found, key=lambda case: (case.package, case.name.lower()))


def _alone(cls: type[Optimizer]) -> Case:
    package, name, parameters = cls.__module__.partition(".")[0], cls.__name__, inspect.signature(cls).parameters
    arguments = ARGUMENTS.get(name, {}) | ({"min_8bit_size": 1} if name.endswith("8bit") else {})
    if "lr" in parameters and parameters["lr"].default is inspect.Parameter.empty:
        arguments |= {"lr": 0.01, "momentum": 0.9}

    def make(model: nn.Module, wrap: Callable[[Optimizer], Optimizer]) -> Optimizer:
        first: Any = model if "model" in parameters else model.parameters()
        if package == "pytorch_optimizer" and name in FLAGGED:
            first = _groups(model, "use_muon", (True, False))
        return wrap(cls(first, **arguments))

    return Case(package, name, make, **SPECIAL.get(name, SPECIAL.get(f"{package} {name}", {})))


def _nested(po: Any, sf: Any, hb: Any) -> list[Case]:
    """Optimizers around another one, steered from outside and with the steered one inside."""

    def sgd(params: Any, **_: Any) -> Optimizer:
        return SGD(params, lr=0.05, momentum=0.9)

    around = (po.Lookahead, po.Magma, po.OrthoGrad, po.PCGrad, po.TRAC, po.ScheduleFreeWrapper)
    around += (sf.ScheduleFreeWrapper, sf.ScheduleFreeWrapperReference)
    rho = SimpleNamespace(step=lambda: 0.05)
    nests: list[tuple[type, str, Callable[[nn.Module, Callable[..., Optimizer]], Any]]] = [
        *((cls, "step", lambda m, base, cls=cls: cls(base(m.parameters()))) for cls in around),
        *(
            (cls, "twice", lambda m, base, cls=cls: cls(m.parameters(), base))
            for cls in (po.FriendlySAM, po.LookSAM, po.SAM)
        ),
        (po.WSAM, "closure", lambda m, base: po.WSAM(m, m.parameters(), base, lr=0.05)),
        (po.GSAM, "pair", lambda m, base: po.GSAM(m.parameters(), base(m.parameters()), m, rho)),
    ]
    pair, fp16 = (hb.Muon, hb.AdamW), "has a backward of its own, for float32 copies of the parameters"
    found = [
        Case(
            "pytorch_optimizer",
            "SafeFP16Optimizer",
            lambda m, _: po.SafeFP16Optimizer(sgd(m.parameters())),
            cannot=fp16,
        ),
        Case("heavyball", "SAMWrapper", lambda m, wrap: wrap(hb.SAMWrapper(m.parameters(), hb.SFAdamW)), "closure"),
        Case("heavyball", "SplitOpt", lambda m, wrap: wrap(hb.SplitOpt(_groups(m, "optimizer", pair)))),
    ]
    for cls, loop, make in nests:
        package, name = cls.__module__.partition(".")[0], cls.__name__
        inside = lambda m, wrap, make=make: make(m, lambda params, **_: wrap(sgd(params)))  # noqa: E731
        outside = lambda m, wrap, make=make: wrap(make(m, sgd))  # noqa: E731
        more = {"beside": True, "remark": "its state dict omits the inner one's: save both"} if cls is po.SAM else {}
        found.append(Case(package, f"{name}(SteeredOptimizer(SGD))", inside, loop, **more))
        if issubclass(cls, Optimizer):
            found.append(Case(package, f"SteeredOptimizer({name}(SGD))", outside, loop))
    return found


def _groups(model: nn.Module, key: str, values: tuple[Any, Any]) -> list[dict[str, Any]]:
    """The matrices with the first value, and the vectors with the second."""
    split = [[p for p in model.parameters() if (p.dim() > 1) is matrix] for matrix in (True, False)]
    return [{"params": params, key: value} for params, value in zip(split, values, strict=True)]


def report(results: dict[Case, dict[str, str]], cannot: list[Case]) -> str:
    found = {case: {key: value.partition(":")[0] for key, value in row.items()} for case, row in results.items()}
    columns = {key: [row[key] for row in found.values()] for key in ("plain", "steered", "resumed", "train/eval")}
    counts = [
        " | ".join(["", key, *(str(columns[key].count(value)) for value in (SAME, AS_BARE, NO)), ""]).strip()
        for key in ("plain", "steered", "resumed")
    ]
    rows = [
        " | ".join(["", c.package, version(c.package), c.name, *row.values(), c.remark, ""]).strip()
        for c, row in found.items()
    ]
    return TEMPLATE.format(
        torch=torch.__version__,
        steps=STEPS,
        number=len(rows),
        modes=columns["train/eval"].count("yes"),
        counts="\n".join(counts),
        rows="\n".join(rows),
        cannot="\n".join(f"| {c.package} | {version(c.package)} | {c.name} | {c.cannot} |" for c in cannot),
    )


TEMPLATE = """# Optimizers of other packages

Written by `python -m benchmarks.third_party` with torch {torch} on a CPU. `make third-party` installs the packages,
runs the same checks as tests, and writes this page.

Each optimizer trains a small model (two layers, with biases) for {steps} steps by itself, and again in each way below.
The parameters are compared bit for bit.

| {number} optimizers | same bits | as bare | no |
| --- | --- | --- | --- |
{counts}

- **plain**: inside `SteeredOptimizer`, with `loss.backward()`, against the bare optimizer.
- **steered**: inside `SteeredOptimizer`, with the loss as the only component of `Sum()`, against the bare optimizer.
- **resumed**: with three components and `GradVac`, saved and loaded in the middle, against the same training without
  interruption. "As bare" means that the bare optimizer does not resume to the same bits either, and that the wrapper
  resumes to the bits of the bare one.
- **train/eval**: the wrapper has both methods if the inner optimizer has them, and calls those; {modes} have them.

Arguments are the defaults, except those that an optimizer requires, or needs to change this model in {steps} steps. The
8-bit optimizers of bitsandbytes keep 8-bit state (`min_8bit_size=1`), and heavyball does not compile. Each step has the
same random seed in every run. If an optimizer wraps another one, both nestings are listed. The `ScheduleFreeWrapper` of
schedulefree is no `torch.optim.Optimizer`, so only the optimizer inside it can be steered.

| package | version | optimizer | plain | steered | resumed | train/eval | remark |
| --- | --- | --- | --- | --- | --- | --- | --- |
{rows}

## Optimizers that do not train this model here

| package | version | optimizer | why |
| --- | --- | --- | --- |
{cannot}
"""


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # those of the packages
    found = cases()
    results = {case: check(case) for case in found if not case.cannot}
    RESULT.write_text(report(results, [case for case in found if case.cannot]), encoding="utf-8")
    print(RESULT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
