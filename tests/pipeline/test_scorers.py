"""The independent scorers, and what is said when one cannot be used."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_api.errors import UserError
from rlhf_api.run import Scorer
from rlhf_pipeline.scorers import FittedClassifier, load_scorers, vader

GOOD = ["a warm and funny film", "wonderful acting, a joy", "great fun from start to end", "moving and beautiful"]
BAD = ["a cold and dull film", "terrible acting, a bore", "no fun from start to end", "ugly and tedious"]


def write(folder: Path, train: dict[str, bool], held_out: dict[str, bool]) -> Path:
    for name, rows in (("train", train), ("heldout", held_out)):
        table = pa.table(
            {"text": pa.array(list(rows), pa.string()), "label": pa.array(list(rows.values()), pa.bool_())}
        )
        pq.write_table(table, folder / f"{name}.parquet")
    return folder


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    held_out = {"warm and wonderful": True, "dull and terrible": False, "a beautiful joy": True, "tedious": True}
    return write(tmp_path, dict.fromkeys(GOOD, True) | dict.fromkeys(BAD, False), held_out)


def test_vader_tells_good_from_bad_and_reads_the_response_alone() -> None:
    good, bad, neutral = vader(["horrible"] * 3, ["I love this great film!", "An awful, boring mess.", "The table."])
    assert good > 0.5
    assert bad < -0.3
    assert neutral == 0


def test_fitted_classifier_gives_the_probability_of_the_good_label(labelled: Path) -> None:
    fitted = FittedClassifier.fit(labelled)
    good, bad = fitted(["terrible dull bore"] * 2, ["wonderful joy, warm and funny", "terrible bore, cold and dull"])
    assert 0 < bad < 0.4 < 0.6 < good < 1
    assert fitted.fitted_on == 8


def test_held_out_accuracy_counts_what_it_got_wrong(labelled: Path) -> None:
    fitted = FittedClassifier.fit(labelled)
    assert fitted.held_out == 4
    assert fitted.accuracy == 0.75  # "tedious" is labelled good there, and bad in what it was fitted on
    assert fitted.accuracy_low < 0.75 < fitted.accuracy_high


def test_one_label_alone_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, dict.fromkeys(GOOD, True), {"good": True})
    with pytest.raises(UserError, match=r"data\.evaluation: all 4 texts have the label good.*chosenLabel"):
        FittedClassifier.fit(folder)


def test_no_held_out_text_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, dict.fromkeys(GOOD, True) | dict.fromkeys(BAD, False), {})
    with pytest.raises(UserError, match=r"data\.evaluation\.heldOut"):
        FittedClassifier.fit(folder)


def test_scorers_are_loaded_by_name(labelled: Path) -> None:
    scorers = [
        Scorer(name="vader", function="rlhf_pipeline.scorers:vader"),
        Scorer(name="words", fitted=True),
    ]
    loaded = load_scorers(scorers, labelled)
    assert [(scorer.name, scorer.about["type"]) for scorer in loaded] == [("vader", "function"), ("words", "fitted")]
    assert all(len(scorer(["a"], ["good film"])) == 1 for scorer in loaded)
    assert loaded[1].about["accuracy"] == 0.75


def test_a_function_that_is_not_there_names_the_field() -> None:
    with pytest.raises(UserError, match=r"evaluate\.scorers\.mine\.function: rlhf_pipeline\.scorers:nothing"):
        load_scorers([Scorer(name="mine", function="rlhf_pipeline.scorers:nothing")], None)


def test_a_function_that_misbehaves_names_the_scorer() -> None:
    (scorer,) = load_scorers([Scorer(name="mine", function="builtins:zip")], None)
    with pytest.raises(UserError, match=r"evaluate\.scorers\.mine returned"):
        scorer(["a"], ["b"])
