"""Every family of vision-language models is right or refused by name; `make families` runs those outside the gate."""

import json

import pytest
import torch

from benchmarks import common
from benchmarks.families import PAGE, PROMPTS, REFUSED, RIGHT, WRONG, check, future, ids, padding, report
from steer_optim.vlm import families, response_logits
from steer_optim.vlm.prompts import Rollout, append_response
from tests.vlm.zoo import CONFIG_MAPPING, IMAGE, MODELS, Zoo
from tests.vlm.zoo_entries import ENTRIES, NOT_BUILT
from tests.vlm.zoo_pixels import transformers  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore")  # those of transformers about tiny configurations
GATE = (
    *("gemma3", "glm4v", "idefics3", "internvl", "llama4", "llava", "llava_onevision", "mistral3", "mllama"),
    *("mistral_large4", "paligemma", "qwen2_5_vl", "qwen3_vl", "smolvlm"),  # the first scales queries by position
)
# What a family cannot do by itself; all else of it is right.
NO_TEMPLATE = {"chameleon", "got_ocr2", "paligemma", "pp_chart2table"}
NO_STATES = {"chameleon"}


def names(chosen):
    return pytest.mark.parametrize("name", chosen)


def assert_right(name):
    found = check(name)
    wrong = {key: value for key, value in found.items() if value.startswith(WRONG)}
    assert not wrong
    allowed = {"messages": NO_TEMPLATE, "states": NO_STATES}
    for key, value in found.items():
        if key != "image" and not value.startswith("no model"):
            assert value.startswith(RIGHT) or name in allowed.get(key, ()), value


@names(GATE)
def test_the_most_used_families_are_right(name):
    assert_right(name)


@pytest.mark.parametrize("wrapper", ["peft", "compile"])
def test_padding_takes_no_position_inside_wrappers(wrapper):
    """Which forward the attributes of the model, but not the signature of its forward pass."""
    family = Zoo("mistral_large4")
    model, config = family.model, family.model.config
    rows = [[0] * 7 + [20, 21, 22], [*range(20, 30)]]
    prompts = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor([[0] * 7 + [1] * 3, [1] * 10])}
    batch = append_response(prompts, Rollout.of([[40, 41]] * 2, config=config), config)
    alone = append_response({"input_ids": torch.tensor([rows[0][7:]])}, Rollout.of([[40, 41]], config=config), config)
    with torch.no_grad():
        (expected,) = response_logits(model, alone, 2)
        if wrapper == "peft":
            peft = pytest.importorskip("peft")
            model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear")).eval()
        else:
            model = torch.compile(model, backend="eager")
        torch.testing.assert_close(response_logits(model, batch, 2)[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("given", ["positions", "mask"])
def test_positions_of_the_caller_are_kept(given):
    family = Zoo("qwen3_vl")
    batch = {"input_ids": torch.tensor([[20, 21, 22, 40]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    expected = response_logits(family.model, batch, 1)
    if given == "positions":
        batch["position_ids"] = torch.arange(4)[None]
    else:
        batch["attention_mask"] = torch.ones(4, 4, dtype=torch.bool).tril()[None, None]
    torch.testing.assert_close(response_logits(family.model, batch, 1), expected, rtol=0, atol=1e-4)


@pytest.mark.families
@names(sorted(ENTRIES.keys() - set(GATE)))
def test_every_other_family_is_right(name):
    assert_right(name)


@names(sorted(MODELS.keys() - ENTRIES.keys() - NOT_BUILT.keys()))
def test_the_others_are_refused_by_name(name):
    config = CONFIG_MAPPING[name]()
    responses = Rollout.of([[3, 4]], config=config)
    with pytest.raises(ValueError, match=f"^'{name}' cannot be distilled on responses that follow their prompts: "):
        append_response({"input_ids": torch.tensor([[5, 6]])}, responses, config)


def test_every_entry_of_the_table_is_a_family_that_transformers_has():
    known = {name.partition("/")[0] for name in families.FAMILIES}
    assert known <= {*CONFIG_MAPPING}


def broken(monkeypatch, name, **changes):
    """The family with another entry."""
    entry = families.family_of(Zoo(name).config)
    fields = {key: getattr(entry, key) for key in entry.__dataclass_fields__} | changes
    monkeypatch.setitem(families.FAMILIES, name, families.Family(**fields))
    zoo = Zoo(name)
    return zoo, [prompt for number in zoo.entry.images for prompt in PROMPTS[number]]


@torch.no_grad()
def test_the_checks_can_fail(monkeypatch):
    zoo, prompts = broken(monkeypatch, "paligemma", per_token={"token_type_ids": 0})
    assert future(zoo, prompts).startswith(f"{WRONG}: a late token moves earlier rows of the image view")
    assert padding(zoo, prompts).startswith(f"{WRONG}: logits differ")
    zoo, prompts = broken(monkeypatch, "gemma3", newlines=range(0))
    assert ids(zoo, prompts).startswith(f"{WRONG}: '<bos>a\\n\\n\\n\\nbc' where the processor writes '<bos>abc'")
    zoo, prompts = broken(monkeypatch, "llava", bare=False)
    with pytest.raises(ValueError, match="does not name the tokens around an image: pass tokenizer="):
        ids(zoo, prompts)
    zoo, prompts = broken(monkeypatch, "mllama", per_token={})
    with pytest.raises(ValueError, match=r"'cross_attention_mask' has the shape .* a value for each"):
        padding(zoo, [prompt for prompt in prompts if IMAGE in prompt])
    monkeypatch.undo()
    zoo, prompts = broken(monkeypatch, "mllama", mixed=True)
    assert padding(zoo, prompts).startswith(f"{WRONG}: logits differ")


def test_a_prompt_in_the_zoo_has_an_image_where_it_says_so():
    zoo = Zoo("llava")
    assert len(zoo.images([20, IMAGE, 21, IMAGE])) == 2
    assert zoo.batch([[20, IMAGE, 21, IMAGE]])["pixel_values"].shape[0] == 2
    assert zoo.without([20, IMAGE, 21]) == [20, 21]


def test_the_page_is_that_of_the_newest_result():
    assert PAGE.read_text() == report(common.newest("families"))


@pytest.mark.skipif("common.newest('families')['transformers'] != transformers.__version__")
def test_the_result_has_every_family_and_nothing_wrong():
    result = common.newest("families")["families"]
    assert {name.partition("/")[0] for name in result} == MODELS.keys()
    assert WRONG not in json.dumps(result)
    assert {name for name, found in result.items() if "refused" in found} == (
        MODELS.keys() - ENTRIES.keys() - NOT_BUILT.keys()
    )
    assert {name for name, found in result.items() if found.get("states", RIGHT).startswith(REFUSED)} <= NO_STATES
