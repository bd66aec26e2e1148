"""What is said of the texts of a recipe adds up to the rows of its files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rotdistill_core.data.reading import read_conversations
from rotdistill_core.data.summary import text_notes, texts_in_words
from rotdistill_core.recipe.document import SamplesRef


def rows(count: int, **changes: Any) -> list[dict[str, Any]]:
    return [
        {"question": f"w{k} w1", "answer": f"w{k} w2", "language": "en", **changes}
        for k in range(count)
    ]


def write(path: Path, texts: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))


def test_rows_are_counted_once_and_the_rest_is_named(tmp_path: Path) -> None:
    write(tmp_path / "i.jsonl", rows(10))
    write(tmp_path / "g.jsonl", [{"text": f"w{k}", "language": "en"} for k in range(4)])
    plain = SamplesRef(index="i.jsonl", heldout_share=0.2)
    found, _ = read_conversations(plain, tmp_path)
    words = "10 conversations of i.jsonl: 6 fit, 2 validation, 2 held out"
    assert texts_in_words(found, plain) == words
    whole = plain.model_copy(update={"guard": "g.jsonl", "own_answers": 8})
    found, _ = read_conversations(whole, tmp_path)
    assert texts_in_words(found, whole, lessons=5) == (
        f"{words}; 4 texts of g.jsonl: 2 guard-validation, 2 guard; 6 fit, 2 validation once more, "
        "with the teacher's own answer (samples.own_answers); 5 lessons that the teacher writes, "
        f"to fit on (lessons.count); {len(found) + 5} texts in all"
    )


def test_a_row_without_an_answer_counts_as_a_row_and_is_named(tmp_path: Path) -> None:
    texts = [{**row, "id": f"id{k}"} for k, row in enumerate(rows(10))]
    ref = SamplesRef(index="i.jsonl", heldout_share=0.2, own_answers=8)
    write(tmp_path / "i.jsonl", texts)
    found, _ = read_conversations(ref, tmp_path)
    assert not [note for note in text_notes(found, ref, "m") if "no answer" in note]
    fitted = next(each.question for each in found if each.split == "fit")
    next(text for text in texts if text["question"] == fitted).pop("answer")
    write(tmp_path / "i.jsonl", texts)
    found, _ = read_conversations(ref, tmp_path)
    notes = [note for note in text_notes(found, ref, "m") if "no answer" in note]
    assert notes == ["texts: 1 row has no answer: the teacher writes it (samples.own_answers)."]
    assert texts_in_words(found, ref).endswith(
        "2 held out (1 without an answer); 6 fit, 2 validation once more, with the teacher's own "
        f"answer (samples.own_answers); {len(found)} texts in all"
    )


def test_few_held_out_texts_are_named_and_what_scores_mean_is_said(tmp_path: Path) -> None:
    write(tmp_path / "i.jsonl", rows(20))
    for share, few in ((0.05, "only 1 text is held out"), (0.15, "only 3 texts are"), (0.2, "")):
        ref = SamplesRef(index="i.jsonl", heldout_share=share)
        *others, scores = text_notes(read_conversations(ref, tmp_path)[0], ref, "big")
        assert [few in note for note in others] == ([True] if few else [])
        assert "against the teacher's answers, not yours" in scores
        assert "`rotdistill chat --model big`" in scores


def test_few_texts_for_validation_are_named_where_a_step_has_to_show_a_gain(tmp_path: Path) -> None:
    write(tmp_path / "i.jsonl", rows(20))
    few = (
        "texts: only 3 texts are for validation, too few to tell a gain from chance, so `head`, "
        "`lora` would leave the student as it is: raise samples.validation, or give more texts."
    )
    judged = ["head", "lora"]
    for share, wanted in ((0.15, [few]), (0.2, [])):
        ref = SamplesRef(index="i.jsonl", heldout_share=0.2, validation=share)
        found, _ = read_conversations(ref, tmp_path)
        notes = text_notes(found, ref, "m", judged)
        assert [each for each in notes if "validation" in each] == wanted
        assert not [each for each in text_notes(found, ref, "m") if "validation" in each]


def test_copies_for_validation_count_once(tmp_path: Path) -> None:
    write(tmp_path / "i.jsonl", rows(20))
    ref = SamplesRef(index="i.jsonl", heldout_share=0.2, validation=0.2)
    found, _ = read_conversations(ref, tmp_path)
    one, *others = (each for each in found if each.split == "validation")
    copies = [replace(one, id=each.id) for each in others]
    notes = list(text_notes([one, *copies], ref, "m", ["head"]))
    assert "texts: only 1 text is for validation" in notes[0]


def test_questions_that_the_teacher_answers_count_once_for_validation(tmp_path: Path) -> None:
    """A step is judged on the teacher's own answers alone, where there are any."""
    write(tmp_path / "i.jsonl", rows(20))
    for share, few in ((0.1, True), (0.2, False)):
        ref = SamplesRef(index="i.jsonl", heldout_share=0.2, validation=share, own_answers=8)
        found, _ = read_conversations(ref, tmp_path)
        assert sum(each.split == "validation" for each in found) >= 4
        notes = list(text_notes(found, ref, "m", ["head"]))
        assert any("only 2 texts are for validation" in each for each in notes) == few
