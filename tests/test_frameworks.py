"""The examples of examples/frameworks: each framework reaches the weights of the plain loop, and resumes.

Equality is bit for bit in one process: the frameworks do the same operations in the same order.
"""

import importlib.util
import sys

import pytest
import torch
from preloaded import preloaded, two_processes
from safetensors.torch import load_file
from torch.nn.utils import clip_grad_norm_
from torchrun import EXAMPLES, run_two_processes
from toys import assert_equal, memory

from steer_optim import SteeredOptimizer, Steering, Sum, callbacks
from steer_optim.monitor import scalars

sys.path.insert(0, str(EXAMPLES))

import plain_loop

pytestmark = [
    # What the frameworks say about themselves.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:`(is_|)gradient_checkpointing.*` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def run_two_forks():
    """Runs an example in two processes that find what torchrun tells them; returns their output."""
    needed = {"transformers": "transformers_trainer", "lightning": "lightning_automatic"}
    modules = [module for package, module in needed.items() if importlib.util.find_spec(package)]
    with preloaded(EXAMPLES, *modules, ACCELERATE_USE_CPU="true") as server:

        def run(module, out):
            code = f"import runpy; runpy.run_path('{module}.py', run_name='__main__')"
            done = server.run(code, ["--out", out], each=two_processes())
            output = "".join(process.stdout + process.stderr for process in done)
            assert [process.returncode for process in done] == [0, 0], output
            return output

        yield run


def weights(model):
    return list(model.state_dict().values())


def assert_same(found, expected):
    """Weights, the memory of the rule, and what was recorded: of models, steered optimizers and monitors."""
    assert_equal(weights(found[0]), weights(expected[0]))
    assert memory(found[1]) == memory(expected[1])
    assert_recorded(found[2], expected[2])


def assert_recorded(found, expected):
    """All but the losses: those of the plain loop are divided by the number of micro-batches first."""
    found, expected = found.history(), expected.history()
    assert found.pop("step").tolist() == (expected.pop("step") + 1).tolist()
    assert found.keys() == expected.keys()
    shared = [key for key in expected if not key.startswith("steer/loss/")]
    assert_equal([found[key] for key in shared], [expected[key] for key in shared])


def assert_close_to(state_dict, expected):
    """After two processes: float64 sums of gradients of order 1, in another order, over six steps."""
    torch.testing.assert_close(state_dict, dict(expected[0].state_dict()), rtol=0, atol=1e-14)


# The plain loop: what could hide a mistake below


def test_the_plain_loop_clips_and_conflicts():
    """Else clipping, and the memory of a rule that only remembers conflicts, would not be tested."""
    norms = []
    model = plain_loop.Regression()
    steered, _ = plain_loop.make_optimizer(model)
    loader = torch.utils.data.DataLoader(plain_loop.make_dataset(), plain_loop.BATCH)
    for batch in loader:
        steered.zero_grad()
        geometry = steered.backward_components(plain_loop.components(model(batch["x"]), batch["labels"]))
        norms.append(clip_grad_norm_(model.parameters(), plain_loop.CLIP))
    assert min(norms) > plain_loop.CLIP
    assert not torch.equal(geometry.weights, torch.ones_like(geometry.weights))


# Accelerate


@pytest.fixture
def accelerate_loop(fresh_accelerate):
    import accelerate_loop

    return accelerate_loop


def test_accelerate_reaches_the_plain_loop_and_resumes(accelerate_loop, tmp_path):
    expected = plain_loop.train()
    assert_same(accelerate_loop.train(tmp_path), expected)
    assert_same(accelerate_loop.train(tmp_path, first_epoch=1), expected)


def test_a_resumed_run_without_the_memory_of_the_rule_ends_elsewhere(accelerate_loop, tmp_path):
    """So that equality after resuming shows that the memory was saved."""
    expected = accelerate_loop.train(tmp_path)
    file = tmp_path / "epoch-1" / "optimizer.bin"
    state_dict = torch.load(file, weights_only=True)
    del state_dict["param_groups"][0]["steer_optim"]
    torch.save(state_dict, file)
    model, *_ = accelerate_loop.train(tmp_path, first_epoch=1)
    assert not all(map(torch.equal, weights(model), weights(expected[0])))


@pytest.mark.usefixtures("fresh_accelerate")
def test_accelerate_logs_the_means_since_the_last_line():
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

    class Log(GeneralTracker):
        name, requires_logging_directory, tracker = "log", False, None

        def __init__(self):
            super().__init__()
            self.lines = {}

        def log(self, values, step=None, **options):
            self.lines[step] = values

    log = Log()
    accelerator = Accelerator(log_with=log)
    accelerator.init_trackers("run")
    model = plain_loop.Regression()
    optimizer = accelerator.prepare(plain_loop.make_optimizer(model)[0])
    monitor = callbacks.watch_accelerator(accelerator, optimizer, log_every=2)
    numbers = []
    for batch in torch.utils.data.DataLoader(plain_loop.make_dataset(), plain_loop.BATCH):
        optimizer.zero_grad()
        accelerator.backward(optimizer.optimizer.join(plain_loop.components(model(batch["x"]), batch["labels"])))
        optimizer.step()
        numbers.append(scalars(optimizer.optimizer.geometry))
    assert log.lines == {n: mean_of(numbers[n - 2 : n]) for n in (2, 4)}
    assert len(monitor) == 5


def mean_of(steps):
    """Of two steps: halves are exact, and a sum of two has no order."""
    assert len(steps) == 2
    return {key: (steps[0][key] + steps[1][key]) / 2 for key in steps[0]}


@pytest.mark.usefixtures("fresh_accelerate")
def test_watching_needs_one_steered_optimizer():
    from accelerate import Accelerator

    plain = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    with pytest.raises(TypeError, match="one SteeredOptimizer is needed, and 0 were found"):
        callbacks.watch_accelerator(Accelerator(), plain)
    x = torch.zeros(1, requires_grad=True)
    steering, plain = Steering([x], Sum()), torch.optim.SGD([x])
    monitor = callbacks.watch_accelerator(Accelerator(), plain, steering, log_every=0)
    steering.join({"a": x.sum()}).backward()
    plain.step()
    assert len(monitor) == 1


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_step_that_is_not_steered_is_named():
    from accelerate import Accelerator

    x = torch.zeros(1, requires_grad=True)
    optimizer = SteeredOptimizer(torch.optim.SGD([x]), Sum())
    monitor = callbacks.watch_accelerator(Accelerator(), optimizer, log_every=0)
    x.sum().backward()
    with pytest.warns(UserWarning, match="step 1 was not steered"):
        optimizer.step()
    assert len(monitor) == 0


@pytest.mark.slow
def test_accelerate_in_two_processes_reaches_the_plain_loop(tmp_path):
    pytest.importorskip("accelerate")
    run_two_processes("accelerate_loop.py", "--out", tmp_path)
    assert len(list((tmp_path / "epoch-2").glob("random_states_*"))) == 2  # there were two, and not one twice
    assert_close_to(load_file(tmp_path / "epoch-2" / "model.safetensors"), plain_loop.train())


# transformers.Trainer


@pytest.fixture
def transformers_trainer(fresh_accelerate):
    pytest.importorskip("transformers", minversion="5.0")
    import transformers_trainer

    return transformers_trainer


@pytest.mark.parametrize("checkpoint", [2, 3], ids=["within an epoch", "between epochs"])
def test_trainer_reaches_the_plain_loop_and_resumes(transformers_trainer, tmp_path, checkpoint):
    expected = plain_loop.train(left_over="actual")
    trainer, steered, monitor = transformers_trainer.make_trainer(tmp_path)
    trainer.train()
    assert_same((trainer.model, steered, monitor), expected)

    trainer, steered, monitor = transformers_trainer.make_trainer(tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}"))
    assert_same((trainer.model, steered, monitor), expected)


def test_a_trainer_with_a_compute_loss_of_its_own_reaches_the_plain_loop(transformers_trainer, tmp_path, monkeypatch):
    """The trainer then divides by the number of micro-batches itself."""

    class Steering(transformers_trainer.Trainer):
        def __init__(self, *args, compute_loss_func, **options):
            super().__init__(*args, **options)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(inputs["x"])
            steered = self.optimizer.optimizer  # within Accelerate's
            loss = steered.join(plain_loop.components(outputs, inputs["labels"]))
            return (loss, outputs) if return_outputs else loss

    monkeypatch.setattr(transformers_trainer, "Trainer", Steering)
    trainer, steered, monitor = transformers_trainer.make_trainer(tmp_path)
    trainer.train()
    assert_same((trainer.model, steered, monitor), plain_loop.train(left_over="actual"))


def test_trainer_logs_the_sum_of_the_components_and_evaluates(transformers_trainer, tmp_path):
    trainer, steered, _ = transformers_trainer.make_trainer(tmp_path)
    samples = torch.utils.data.default_collate(plain_loop.make_dataset())
    step = 2 * plain_loop.BATCH
    with torch.no_grad():
        expected = [
            sum(plain_loop.components(trainer.model(samples["x"][:n]), samples["labels"][:n]).values()).item()
            for n in (step, plain_loop.SAMPLES)
        ]
    evaluated = trainer.evaluate(plain_loop.make_dataset())["eval_loss"]
    assert steered.geometry is None
    trainer.train()
    logged = trainer.state.log_history[0]["loss"]
    # Sums of float64 means in another order; the log is of a float32 accumulator.
    assert evaluated == pytest.approx(expected[1], rel=1e-6)
    assert logged == pytest.approx(expected[0], rel=1e-6)


def test_every_logger_of_the_trainer_gets_the_means_since_the_last_line(transformers_trainer, tmp_path, monkeypatch):
    from transformers import TrainerCallback

    lines = []

    class Log(TrainerCallback):
        def on_log(self, args, state, control, logs, **options):
            lines.append(dict(logs))

    def watch_late(trainer):  # as those that the trainer makes for TensorBoard and W&B
        trainer.add_callback(Log())
        return callbacks.watch_trainer(trainer)

    monkeypatch.setattr(transformers_trainer, "watch_trainer", watch_late)
    trainer, steered, monitor = transformers_trainer.make_trainer(tmp_path)
    trainer.args.logging_steps = 2
    steered.refresh_every = 2
    trainer.train()
    history = monitor.history()
    *training, end = trainer.state.log_history
    assert "steer/loss/fit" not in end
    assert [line["step"] for line in training] == [2, 4, 6]
    for i, (line, logged) in enumerate(zip(training, lines, strict=False)):
        found = {key: value for key, value in line.items() if key.startswith("steer/")}
        assert found == {key: value for key, value in logged.items() if key.startswith("steer/")}
        expected = {key: column[2 * i : 2 * i + 2].nanmean().item() for key, column in history.items() if key != "step"}
        assert found == expected
        assert found["steer/angle/fit~total"] == history["steer/angle/fit~total"][2 * i]  # none of the step between


@pytest.mark.parametrize("watched", [True, False], ids=["restoring all callbacks", "from a run that was not watched"])
def test_trainer_resumes_its_record(transformers_trainer, tmp_path, monkeypatch, watched):
    with monkeypatch.context() as patch:
        if not watched:
            patch.setattr(transformers_trainer, "watch_trainer", by_hand)
        transformers_trainer.make_trainer(tmp_path)[0].train()
    trainer, _, monitor = transformers_trainer.make_trainer(tmp_path)
    trainer.args.restore_callback_states_from_checkpoint = watched
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert monitor.history()["step"].tolist() == ([1, 2, 3, 4, 5, 6] if watched else [5, 6])
    assert sum("steer/loss/fit" in line for line in trainer.state.log_history) == (6 if watched else 2)


def test_a_step_that_an_exception_cut_short_is_forgotten(transformers_trainer, tmp_path):
    """As with `auto_find_batch_size`, which trains anew with smaller batches when memory runs out."""
    trainer, _, monitor = transformers_trainer.make_trainer(tmp_path)
    steered_loss, calls = trainer.compute_loss_func, []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 4:  # in the second step
            raise RuntimeError("CUDA out of memory.")
        return steered_loss(*args, **options)

    trainer.compute_loss_func = interrupted
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    trainer.train()
    assert monitor.history()["step"].tolist() == [1, 2, 3, 4, 5, 6]


def test_a_trainer_is_watched_once(transformers_trainer, tmp_path):
    trainer, _, _ = transformers_trainer.make_trainer(tmp_path)
    with pytest.raises(ValueError, match="watched already"):
        callbacks.watch_trainer(trainer)


def test_the_log_after_a_rollback_has_no_step_from_before(transformers_trainer, tmp_path):
    trainer, _, monitor = transformers_trainer.make_trainer(tmp_path)
    trainer.args.save_steps, trainer.args.logging_steps = 2, 3
    steered_loss = trainer.compute_loss_func

    def interrupted(*args, **options):
        if trainer.state.global_step == 5:
            raise RuntimeError("CUDA out of memory.")
        return steered_loss(*args, **options)

    trainer.compute_loss_func = interrupted
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    trainer.compute_loss_func = steered_loss
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    (line,) = (line for line in trainer.state.log_history if line["step"] == 6 and "loss" in line)
    name = next(key for key in line if key.startswith("steer/loss/"))
    assert line[name] == pytest.approx(monitor.means(last=2)[name], rel=1e-12)


def by_hand(trainer):
    """Says which micro-batch is the last, and no more."""
    trainer.optimizer.steering.accumulating = lambda: not trainer.accelerator.sync_gradients


@pytest.mark.slow
def test_trainer_in_two_processes_reaches_the_plain_loop(run_two_forks, tmp_path):
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers", minversion="5.0")
    run_two_forks("transformers_trainer", tmp_path)
    assert len(list((tmp_path / "checkpoint-6").glob("rng_state_*.pth"))) == 2
    assert_close_to(load_file(tmp_path / "checkpoint-6" / "model.safetensors"), plain_loop.train(left_over="actual"))


# Lightning


@pytest.fixture(params=["automatic", "manual"])
def lightning_fit(request):
    """Fits a new module, in automatic or manual optimization; returns it, its trainer, and the record."""
    pytest.importorskip("lightning")
    import lightning_automatic
    import lightning_manual

    def fit(directory, *, checkpoint=None, **options):
        if request.param == "automatic":
            module = lightning_automatic.Module()
            trainer, monitor = lightning_automatic.make_trainer(directory, **options)
        else:
            module = lightning_manual.ManualModule()
            trainer, monitor = lightning_manual.make_manual_trainer(directory, **options)
        trainer.fit(module, ckpt_path=checkpoint)
        return module, trainer, monitor

    return fit


def steered_of(trainer):
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, SteeredOptimizer)
    return optimizer


def test_lightning_reaches_the_plain_loop_and_resumes(lightning_fit, tmp_path):
    expected = plain_loop.train()
    for checkpoint in (None, tmp_path / "epoch=0.ckpt"):
        module, trainer, monitor = lightning_fit(tmp_path, checkpoint=checkpoint)
        assert_same((module.model, steered_of(trainer), monitor), expected)


def test_lightning_steps_at_the_end_of_a_shortened_epoch(lightning_fit, tmp_path, monkeypatch):
    samples = plain_loop.make_dataset()[: 3 * plain_loop.BATCH]
    module, trainer, monitor = lightning_fit(tmp_path, limit_train_batches=3)
    monkeypatch.setattr(plain_loop, "make_dataset", lambda: samples)
    assert_same((module.model, steered_of(trainer), monitor), plain_loop.train())


def test_the_loggers_of_lightning_get_the_means_since_the_last_line(lightning_fit, tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    lines = {}

    class Log(CSVLogger):
        def log_metrics(self, metrics, step=None):
            lines[step] = metrics

    _, _, monitor = lightning_fit(tmp_path, logger=Log(tmp_path), log_every_n_steps=4)
    history = monitor.history()
    del history["step"]
    assert {step: {k: v for k, v in line.items() if "steer" in k} for step, line in lines.items()} == {
        3: {key: column[:4].mean().item() for key, column in history.items()}
    }


def test_lightning_watches_a_steering_of_several_optimizers(tmp_path):
    pytest.importorskip("lightning")
    from lightning_automatic import Module, lightning

    class TwoOptimizers(Module):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.steering = Steering(self.parameters(), plain_loop.GradVac())

        def configure_optimizers(self):
            weights, biases = ([p for p in self.parameters() if p.ndim == n] for n in (2, 1))
            return [torch.optim.SGD(weights, 0.1), torch.optim.AdamW(biases)]

        def training_step(self, batch, batch_idx):
            self.steering.zero_grad()
            self.manual_backward(self.steering.join(plain_loop.components(self.model(batch["x"]), batch["labels"])))
            for optimizer in self.optimizers():
                optimizer.step()

    module = TwoOptimizers()
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(default_root_dir=tmp_path, accelerator="cpu", max_epochs=1, **options)
    monitor = callbacks.watch_lightning(trainer, module.steering)
    trainer.fit(module)
    assert monitor.history()["step"].tolist() == [2, 4, 6, 8, 10]  # Lightning counts the steps of both optimizers

    trainer = lightning.Trainer(default_root_dir=tmp_path, accelerator="cpu", max_epochs=1, **options)
    callbacks.watch_lightning(trainer)
    with pytest.raises(TypeError, match="one SteeredOptimizer is needed, and 0 were found"):
        trainer.fit(module)


def test_a_closure_that_lightning_runs_again_is_no_steering_in_training_step(tmp_path):
    pytest.importorskip("lightning")
    import lightning_automatic

    class Searches(lightning_automatic.Module):
        def configure_optimizers(self):
            return SteeredOptimizer(torch.optim.LBFGS(self.parameters(), max_iter=3), plain_loop.GradVac())

    options = {"accumulate_grad_batches": 1, "gradient_clip_val": None}
    trainer, monitor = lightning_automatic.make_trainer(tmp_path, **options)
    trainer.fit(Searches())
    assert len(monitor) == trainer.global_step > 0


@pytest.mark.slow
def test_lightning_in_two_processes_reaches_the_plain_loop(run_two_forks, tmp_path):
    pytest.importorskip("lightning")
    output = run_two_forks("lightning_automatic", tmp_path)
    assert "MEMBER: 2/2" in output
    checkpoint = torch.load(tmp_path / "epoch=1.ckpt", weights_only=False)
    found = {name.removeprefix("model."): weight for name, weight in checkpoint["state_dict"].items()}
    assert_close_to(found, plain_loop.train())


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("skipped", [1, 4])
def test_a_batch_that_lightning_skips_may_be_the_last_of_a_window(tmp_path, skipped):
    """Of two batches, and of one at the end of the epoch; as if its components were absent."""
    pytest.importorskip("lightning")
    import lightning_automatic

    class Skips(lightning_automatic.Module):
        def training_step(self, batch, batch_idx):
            if batch_idx == skipped and not self.all_absent:
                return None
            losses = plain_loop.components(self.model(batch["x"]), batch["labels"])
            losses = dict.fromkeys(losses) if batch_idx == skipped else losses
            return self.optimizers(use_pl_optimizer=False).join(losses)

    found = []
    for all_absent in (False, True):
        module = Skips()
        module.all_absent = all_absent
        trainer, _ = lightning_automatic.make_trainer(tmp_path)
        trainer.fit(module)
        found.append((trainer.global_step, [p.detach() for p in module.parameters()]))
    assert found[0][0] == found[1][0]
    for ours, expected in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("accumulate", [None, False])
def test_lightning_refuses_a_training_step_that_steers_itself(tmp_path, watched, accumulate):
    """It clears .grad afterwards, so that nothing would be trained."""
    lightning = pytest.importorskip("lightning")
    import lightning_automatic

    class Steers(lightning_automatic.Module):
        def training_step(self, batch, batch_idx):
            losses = plain_loop.components(self.model(batch["x"]), batch["labels"])
            self.optimizers(use_pl_optimizer=False).backward_components(losses, accumulate=accumulate)

    trainer, _ = lightning_automatic.make_trainer(tmp_path)
    if not watched:
        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(default_root_dir=tmp_path, accelerator="cpu", max_epochs=1, **options)
    with pytest.raises(RuntimeError, match=r"return optimizer\.join"):
        trainer.fit(Steers())


def test_lightnings_stand_in_steers_as_the_optimizer_itself(lightning_fit, tmp_path):
    module, trainer, _ = lightning_fit(tmp_path)
    stand_in, steered = module.optimizers(), steered_of(trainer)

    def losses():
        return plain_loop.components(module.model(torch.ones(2, 3).double()), torch.zeros(2, 3).double())

    before = steered.geometry
    stand_in.join(losses()).backward()
    assert stand_in.geometry is steered.geometry is not before
    stand_in.load_state_dict(steered.state_dict())
    stand_in.backward_components(losses(), accumulate=True)
    with pytest.raises(RuntimeError, match="accumulated and never steered"):
        stand_in.step()
    stand_in.zero_grad()
    stand_in.step()
