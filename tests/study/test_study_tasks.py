"""The tasks of the study: their answers are right about their images, and graded as they say."""

import math

import pytest
import torch

for needed in ("sklearn", "scipy", "tokenizers", "tqdm", "transformers", "matplotlib"):
    pytest.importorskip(needed)

from studies.vgs import models  # noqa: E402
from studies.vgs.prepare import Examination  # noqa: E402
from studies.vgs.shapes import SIDES, polygons  # noqa: E402
from studies.vgs.tasks import TASKS  # noqa: E402

pytestmark = pytest.mark.study


@pytest.fixture(scope="module")
def questions():
    return {name: task.questions(held_out=True) for name, task in TASKS.items()}


def sentences(task, rows):
    return [" ".join(task.words[i] for i in row) for row in rows.tolist()]


def test_sums_of_nine_digits_are_right_about_the_image(questions):
    task = questions["digits-3x3"]
    prompt, answer_BT = task.draw(64, generator=torch.Generator().manual_seed(0))
    lines = {"top row": [0, 1, 2], "middle row": [3, 4, 5], "bottom row": [6, 7, 8]}
    lines |= {"left column": [0, 3, 6], "middle column": [1, 4, 7], "right column": [2, 5, 8]}
    asked = set()
    for image, question, answer in zip(
        prompt["pixel_values"], sentences(task, prompt["input_ids"]), sentences(task, answer_BT), strict=True
    ):
        line = " ".join(question.split()[-3:-1])
        cells = image[0].view(3, 8, 3, 8).transpose(1, 2).reshape(9, 8, 8)
        shown = [int(task.kinds[(task.cells == cell).all(2).all(1)][0]) for cell in cells]
        a, b, c = (shown[cell] for cell in lines[line])
        assert answer == f"<reason> {a} + {b} = {a + b} + {c} = {a + b + c} </reason> {a + b + c} <eos>"
        asked.add(line)
    assert asked == set(lines)


def assert_counted(task, words):
    sides = dict(zip(task.names, SIDES, strict=True))
    total = 0
    for name, running in zip(words[:-1:2], words[1::2], strict=True):
        total += sides[name]
        assert running == str(total)
    assert (len(words), words[-1]) == (9, "<eos>")


def test_sides_are_counted_with_a_running_sum(questions):
    task = questions["shapes"]
    _, answer_BT = task.draw(32, generator=torch.Generator().manual_seed(0))
    for answer in sentences(task, answer_BT):
        assert_counted(task, answer.split())


def test_polygons_have_the_area_of_their_sides():
    pictures, kinds = polygons(400, seed=3)
    for kind, sides in enumerate(SIDES):
        # Of n / 2 sin(2 pi / n) times the mean squared radius, uniform over 5.5 to 7.5.
        area = sides / 2 * math.sin(2 * math.pi / sides) * (6.5**2 + 1 / 3)
        mean = (pictures[kinds == kind] + 1).sum(dim=(1, 2)).mean() / 2
        assert mean == pytest.approx(area, rel=0.06)  # of a hundred pictures whose areas spread by 18 %
    assert not torch.equal(polygons(400, seed=4)[0], pictures)


def test_no_picture_is_trained_and_tested_on():
    for task in (TASKS["digits-3x3"], TASKS["shapes"]):
        train_set, test_set = (
            {cell.numpy().tobytes() for cell in task.questions(held_out=held_out).cells} for held_out in (False, True)
        )
        assert not train_set & test_set


def test_grading_reads_the_last_word_before_the_end(questions):
    task = questions["shapes"]
    right = "square 4 triangle 7 hexagon 13 pentagon 18 <eos>"
    responses = [
        (right, 1, 1),
        ("square 4 triangle 7 hexagon 13 pentagon 17 <eos>", 0, 1),
        ("square 4 square 8 hexagon 14 square 18 <eos>", 1, 0),
        ("square 4 triangle 7 hexagon 13 pentagon 18 18", 0, 1),  # did not end
        ("square 4 triangle 7 hexagon 18 <eos> pentagon 18", 1, 0),
        ("18 4 triangle 7 hexagon 13 pentagon 18 18", 0, 0),  # nor here
        ("<eos> 4 triangle 7 hexagon 13 pentagon 18 <eos>", 0, 0),
    ]
    ids = torch.tensor([[task.ids[word] for word in text.split()] for text, *_ in [(right,), *responses]])
    answer_BT = ids[:1].expand(len(responses), -1)
    assert task.right(ids[1:], answer_BT).int().tolist() == [right for _, right, _ in responses]
    assert task.perceived(ids[1:], answer_BT).int().tolist() == [seen for *_, seen in responses]


def test_small_talk_comes_before_the_same_answers():
    task = TASKS["shapes-voices"]
    teacher, student = (task.questions(held_out=True, speaker=speaker) for speaker in ("teacher", "student"))
    for speaker in (teacher, student):
        _, answer_BT = speaker.draw(4000, generator=torch.Generator().manual_seed(0))
        assert answer_BT.shape[1] == speaker.length
        for answer in sentences(speaker, answer_BT[:20]):
            words = answer.split()
            assert set(words[:6]) <= set(speaker.small)
            assert_counted(speaker, words[6:])
        # Every place has probabilities of its own, given the word before.
        said = answer_BT[:, list(speaker.said)] - speaker.ids[speaker.small[0]]
        for place in (0, 3):
            before = said[:, place - 1] if place else torch.zeros(4000, dtype=torch.long)
            common = int(before.mode().values)
            shares = said[before == common, place].bincount(minlength=len(speaker.small)) / (before == common).sum()
            error = 4 * (0.25 / (before == common).sum()) ** 0.5  # four standard errors at most
            assert (shares - speaker.following[place, common]).abs().max() < error
    assert not torch.equal(teacher.following, student.following)


def test_talk_depends_on_topic_and_place():
    task = TASKS["shapes-topics"]
    teacher, student = (task.questions(held_out=True, speaker=speaker) for speaker in ("teacher", "student"))
    other = TASKS["shapes-topics-voices"].questions(held_out=True, speaker="student")
    assert torch.equal(teacher.tables, student.tables)
    assert not torch.equal(teacher.tables, other.tables)
    prompt, answer_BT = teacher.draw(20_000, generator=torch.Generator().manual_seed(0))
    for answer in sentences(teacher, answer_BT[:20]):
        words = answer.split()
        assert {words[column] for column in teacher.said} <= set(teacher.small)
        assert {words[column] for column in teacher.seen} <= set(teacher.names)
        assert_counted(teacher, [word for column, word in enumerate(words) if column not in teacher.said])
    topic = 7
    mine = prompt["input_ids"][:, -1] == teacher.ids[f"topic{topic}"]
    for place, column in enumerate(teacher.said):
        said = answer_BT[mine, column] - teacher.ids[teacher.small[0]]
        shares = said.bincount(minlength=len(teacher.small)) / mine.sum()
        error = 4 * (0.25 / mine.sum()) ** 0.5  # four standard errors at most
        assert (shares - teacher.tables[topic, place]).abs().max() < error


def test_how_answers_are_worded_counts_neither_as_language_nor_as_loss(monkeypatch):
    task = TASKS["shapes-voices"]
    settings, _ = task.settled(examined=20)
    examine = Examination(task, settings, 20)
    words, said = len(examine.questions.words), list(examine.questions.said)
    assert len(examine.batches) == 1

    def knows_all_but_small_talk(model, prefix, answer_BT):
        logits = 30 * torch.nn.functional.one_hot(answer_BT, words).float()
        logits[:, said] = 0
        return logits

    monkeypatch.setattr(models, "response_logits", knows_all_but_small_talk)
    model = task.model(examine.questions, 16)
    scores = examine(model)
    assert scores["language"] == 1
    assert scores["text_loss"] < 1e-6


@pytest.mark.parametrize("wrong", ["teacher", "student"])
def test_whoever_miscounts_says_no_multiple_of_seven_and_is_not_asked_for_right_answers(wrong):
    task = TASKS[f"shapes-miscounting-{wrong}"]
    sides = torch.cartesian_prod(*[torch.tensor(SIDES)] * 4)
    for speaker in ("teacher", "student"):
        questions = task.questions(held_out=True, speaker=speaker)
        totals = questions.count(sides)
        if speaker == wrong:
            steps = totals.diff(dim=1, prepend=torch.zeros(len(sides), 1, dtype=torch.long)) - sides
            assert not (totals % 7 == 0).any()
            assert torch.equal(steps, ((totals - steps) % 7 == 0).long())
            assert totals.max() < 25  # the words go to 24
        else:
            assert torch.equal(totals, sides.cumsum(1))
    examine = Examination(task, task.settled()[0], 500)
    for _, answer_BT in examine.batches:
        for answer in sentences(examine.questions, answer_BT):
            assert_counted(examine.questions, answer.split())


def test_right_answers_are_worded_by_both_where_both_are_right():
    task = TASKS["shapes-voices"]
    examine = Examination(task, task.settled()[0], 500)
    generator = torch.Generator().manual_seed(0)
    for speaker, (_, answer_BT) in zip(("teacher", "student"), examine.batches, strict=True):
        wanted = task.questions(held_out=True, speaker=speaker).draw(250, generator=generator)[1]
        assert torch.equal(answer_BT, wanted)
