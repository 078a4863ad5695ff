"""Every snippet of the README runs, in order and in one namespace, and its numbers are those of a committed result."""

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import common, steering_cost

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "docs" / "guide.md").read_text()
WATCHING = (ROOT / "docs" / "watching.md").read_text()
CHOOSE = (ROOT / "docs" / "how-to-choose.md").read_text()


def snippets(language, page=README):
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def diff_sides(page=README):
    """The loop before and after the README's diff."""
    (diff,) = snippets("diff", page)
    lines = diff.splitlines()
    return ("\n".join(line[1:] for line in lines if line[:1] in ("", " ", sign)) for sign in "-+")


def setting():
    """What the snippets take for granted: a model on a device, a loader, and two losses that conflict."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)

    def losses(model, batch):
        first, second = model(batch).unbind(-1)
        return (first - second).mean() + first.square().mean(), (second - first).mean() + second.square().mean()

    batches = [torch.randn(8, 4) for _ in range(3)]
    namespace = {"torch": torch, "model": model, "loader": batches, "micro_batches": batches, "losses": losses}
    namespace["device"] = "cpu"
    exec("from steer_optim import Steer, SteeredOptimizer", namespace)
    return namespace


def test_the_diff_changes_at_most_six_lines_and_both_sides_train():
    (diff,) = snippets("diff")
    assert sum(line[:1] in ("+", "-") for line in diff.splitlines()) <= 6
    trained = []
    for side in diff_sides():
        namespace = setting()
        before = namespace["model"].weight.clone()
        exec(side, namespace)
        trained.append(namespace["model"].weight)
        assert not torch.equal(trained[-1], before)
    assert not torch.equal(*trained)  # steering changed something


@pytest.fixture
def models(monkeypatch):
    """A student, a teacher, their processor and conversations, in place of what transformers would download."""
    for needed in ("transformers", "tokenizers", "PIL"):
        pytest.importorskip(needed)
    import tiny_llava
    import transformers

    def model(name, *, dtype=torch.float32):
        return tiny_llava.make_model(seed=0 if "2B" in name else 1).to(dtype).eval()

    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", model)
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda name: tiny_llava.make_processor())
    messages = []
    for sample in tiny_llava.make_dataset()[:2]:
        (message,) = sample["prompt"]
        content = [{"type": "image", "image": sample["image"]}, {"type": "text", "text": message["content"]}]
        messages.append([{"role": "user", "content": content}])
    namespace = {"student": model("2B"), "teacher": model("8B"), "processor": tiny_llava.make_processor()}
    return {**namespace, "messages": messages}


# The name that every transformers from 5.0 on has.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_the_snippets_of_the_guide_run(capsys, models):
    namespace = setting()
    _, after = diff_sides(GUIDE)
    exec(after, namespace)
    namespace["messages"] = models["messages"]
    blocks = snippets("python", GUIDE)
    assert len(blocks) >= 6
    for block in blocks:
        exec(block, namespace)
    assert "degrees apart" in capsys.readouterr().out
    assert namespace["optimizer"].geometry.names == ("std", "vis")
    assert not any(p.requires_grad for p in namespace["prior"].parameters())
    weights = zip(namespace["student"].parameters(), namespace["prior"].parameters(), strict=True)
    assert not all(torch.equal(new, old) for new, old in weights)


def test_the_first_snippets_run_as_they_stand(capsys, monkeypatch, tmp_path):
    first, watching = snippets("python")
    assert len(first.splitlines()) <= 11
    namespace = {}
    exec(first, namespace)
    assert "degrees between the gradients of main and side" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    namespace = setting()
    exec('optimizer = SteeredOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), Steer(toward="main"))', namespace)
    exec(watching, namespace)
    assert "steer/weight/main" in capsys.readouterr().out
    assert Path("geometry.png").stat().st_size > 1000


def test_the_readme_is_read_in_a_minute():
    assert len(README.split()) < 900


def test_a_step_of_distillation_takes_at_most_ten_lines():
    (step,) = (block for block in snippets("python", GUIDE) if "score(student" in block)
    assert len(step.splitlines()) <= 10


def test_the_snippets_on_how_to_choose_run(capsys, models):
    namespace = setting() | models
    namespace |= {"batches": namespace["loader"], "answer_BT": torch.tensor([[4, 5], [6, 7]])}
    namespace["mask_BT"] = namespace["real_BT"] = torch.ones(2, 2, dtype=torch.bool)
    assert len(snippets("python", CHOOSE)) == 3
    for block in snippets("python", CHOOSE):
        exec(block, namespace)
    printed = capsys.readouterr().out.splitlines()
    assert "are 1" in printed[0]
    assert "degrees apart, and conflict in 100% of the batches" in printed[0]
    assert [line.split()[0] for line in printed[-2:]] == ["student", "teacher"]


def test_the_snippets_on_watching_run(capsys, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)

    class Writer:
        names = []  # noqa: RUF012

        def add_scalar(self, name, value, global_step):
            self.names.append(name)

    namespace = setting() | {"writer": Writer()}
    for block in snippets("python", WATCHING):
        exec(block, namespace)
    assert "degrees apart, and conflict" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"run.safetensors", "geometry.png", "weights.png", "loss.png"}
    assert namespace["history"]["step"].tolist() == [0, 1, 2]
    documented = set(re.findall(r"`(steer/[a-z_/~]+)`", WATCHING))
    assert documented == {name for name in Writer.names if not re.search(r"(loss|norm|weight)/side", name)}


def test_the_commands_exist():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    commands = re.findall(r"make ([a-z]+)", README)
    assert {"demo", "test"} <= set(commands) <= set(targets)


def test_the_links_and_pictures_exist():
    pages = [ROOT / "README.md", ROOT / "examples" / "README.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_costs_are_those_of_the_newest_result():
    result = common.newest("steering_cost")
    assert steering_cost.markdown(result) in GUIDE
    rows = {
        row["variant"]: row["ratio to plain"]
        for row in result["rows"]
        if (row["model"], row["graphs"], row["components"]) == ("transformer", "one", 2)
    }
    for said, variant in (
        ("two backward passes, nothing else", "k backward passes"),
        ("`Steer`", "steer_optim Steer"),
        ("`Steer`, `refresh_every=10`", "steer_optim Steer, refresh_every=10"),
    ):
        assert f"| {said} | {rows[variant]:.2f} |" in README


def test_the_snippets_of_the_documentation_are_lines_of_the_examples():
    text = (ROOT / "docs" / "frameworks.md").read_text()
    snippets = re.findall(r"\(\.\./examples/frameworks/(\w+\.py)\):\n\n```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == text.count("```python")
    for file, snippet in snippets:
        lines = iter([line.strip() for line in (ROOT / "examples" / "frameworks" / file).read_text().splitlines()])
        missing = [line for line in snippet.splitlines() if line.strip() and line.strip() not in lines]
        assert not missing, f"{file} has no {missing}, or not in this order"


def test_the_numbers_beside_the_costs_are_those_of_the_newest_results():
    losses, step = common.newest("losses_cost"), common.newest("vgs_step")
    trained, frozen = (
        1 / row["peak ratio"]
        for head in ("trained", "frozen")
        for row in losses["rows"]
        if (row["tokens"], row["vocabulary"], row["head"]) == (1024, 151_936, head)
    )
    ratios = {row["variant"]: row["ratio"][1] for row in step["rows"] if row["setting"] == "larger"}
    text = " ".join(GUIDE.split())
    assert f"{trained:.1f} times less memory than their eager form, {frozen:.1f} times less with a frozen head" in text
    assert f"takes {ratios['VGS']:.2f} times as long as one of standard distillation" in text
    assert f"and {ratios['VGS, refresh_every=10']:.2f} times with `refresh_every=10`" in text


def test_the_accuracies_of_the_main_job_are_those_of_the_committed_results():
    page = (ROOT / "examples" / "README.md").read_text()
    files = [ROOT / "examples" / "results" / f"digits-seed{seed}.json" for seed in range(3)]
    for file in files:
        rows = json.loads(file.read_text())["rows"]
        for score in ("answer", "perception"):
            cells = " | ".join(f"{100 * row[score]:.1f}" for row in rows.values())
            assert f"| {score}, {file.stem.replace('digits-seed', 'seed ')} | {cells} |" in page


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs(path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    namespace = {}
    for cell in cells:
        exec("".join(line for line in cell["source"] if not line.startswith("%")), namespace)
    printed = "".join("".join(out["text"]) for cell in cells for out in cell["outputs"] if "text" in out)
    assert capsys.readouterr().out == printed  # what the page shows
