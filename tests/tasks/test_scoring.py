from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from math import exp
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_chinese import Rouge
from rouge_score.rouge_scorer import RougeScorer

from configs.errors import UserError
from configs.scoring import Metrics
from tasks.scoring import MOST_SLICES, longest_common_subsequence, score, score_rows, summarise

WORDS = ("turn", "the", "light", "on", "off", "in", "kitchen", "please", "at", "noon", "heater", "and")
quick = settings(max_examples=60, deadline=None, database=None)


def metrics(prediction: str, reference: str) -> dict[str, float]:
    return score([(prediction, reference)]).model_dump(include=set(Metrics.model_fields))


def test_figures_of_the_platform_are_reproduced() -> None:
    found = score([("周末去澄迈采摘杨桃，入园免费，带走按2.5元/斤，快来报名！", "这个周末自驾游去摘杨桃啦！")])
    assert found.bleu_4 == pytest.approx(2.71, abs=0.01)
    assert found.rouge_1 == pytest.approx(30.77, abs=0.01)
    assert found.rouge_2 == 0.0
    assert found.rouge_l == pytest.approx(28.57, abs=0.01)
    assert (found.rouge_1_recall, found.rouge_2_recall, found.rouge_l_recall) == (50.0, 0.0, 50.0)


def test_chinese_by_hand() -> None:
    # 打开|卧室|的|灯 against 打开|客厅|的|灯: three of four tokens, one of three pairs, no triple, no four.
    found = metrics("打开卧室的灯", "打开客厅的灯")
    assert found["accuracy"] == 0.0
    assert found["contains"] == 0.0
    assert found["f1"] == pytest.approx(75)
    assert found["rouge_1"] == pytest.approx(75)
    assert found["rouge_2"] == pytest.approx(100 / 3)
    assert found["rouge_l"] == pytest.approx(75)
    # Smoothing 3: the first order without a match counts 1/2, the second 1/4, of its number of n-grams.
    assert found["bleu_4"] == pytest.approx(100 * (3 / 4 * 1 / 3 * (1 / 2 / 2) * (1 / 4 / 1)) ** 0.25)


def test_english_by_hand() -> None:
    # 11 tokens each, blanks included, one differs; 6 words each, of which "the" stands twice.
    found = metrics("the cat sat on the mat", "the cat lay on the mat")
    assert found["f1"] == pytest.approx(100 * 10 / 11)
    assert found["rouge_1"] == pytest.approx(100 * 4 / 5)  # distinct words: the, cat, on, mat of five
    assert found["rouge_2"] == pytest.approx(100 * 3 / 5)  # the cat, on the, the mat of five
    assert found["rouge_l"] == pytest.approx(100 * 5 / 6)  # the cat on the mat of six
    # The differing token stands in 1, 2, 3 and 4 of the 11, 10, 9 and 8 n-grams.
    assert found["bleu_4"] == pytest.approx(100 * (10 / 11 * 8 / 10 * 6 / 9 * 4 / 8) ** 0.25)


def test_short_answer_by_hand() -> None:
    found = metrics("turn off the light", "please turn off the light now")
    assert found["f1"] == pytest.approx(100 * 2 * 1 * (7 / 11) / (1 + 7 / 11))  # 7 tokens of 7, of 11
    assert found["rouge_1"] == pytest.approx(80)  # precision 4/4, recall 4/6
    assert found["rouge_1_recall"] == pytest.approx(100 * 4 / 6)
    assert found["rouge_2"] == pytest.approx(75)  # precision 3/3, recall 3/5
    assert found["rouge_l"] == pytest.approx(80)
    assert found["bleu_4"] == pytest.approx(100 * exp(1 - 11 / 7))  # all n-grams match; brevity penalty
    assert found["contains"] == 0.0


def test_longer_answer_contains_the_reference_without_being_it() -> None:
    found = metrics("The capital is Paris.", "Paris")
    assert (found["contains"], found["accuracy"]) == (100.0, 0.0)
    assert metrics("one comparison", "paris")["contains"] == 0.0


def test_paragraph_break_counts_as_the_platform_counts_it() -> None:
    # A recorded row, 豆类油脂 against a two-paragraph answer, only agrees if the empty line is a word: here
    # 5 words (a, b, the empty one, c, d) against 1, so precision 1/5 and recall 1.
    assert metrics("a b\n\nc d", "a")["rouge_1"] == pytest.approx(100 * 2 * (1 / 5) / (1 + 1 / 5))


@pytest.mark.parametrize("blank", ["", "  ", "\n", "\u3000"])
def test_empty_answer_scores_zero_and_counts_in_the_mean(blank: str) -> None:
    found = score([(blank, "turn on the light"), ("turn on the light", "turn on the light")])
    assert (found.rows, found.empty_predictions) == (2, 1)
    assert {getattr(found, name) for name in Metrics.model_fields} == {50.0}


@pytest.mark.parametrize("odd", [".", ". .", "。", "？ ？", "..........", "a", "\ud800", "\x00", "\u200b", "🙂"])
def test_odd_answers_get_figures_instead_of_an_exception(odd: str) -> None:
    assert metrics(odd, "turn on the light")["accuracy"] == 0.0
    assert metrics("turn on the light", odd)["accuracy"] == 0.0
    assert metrics(odd, odd)["accuracy"] == 100.0


@quick
@given(st.lists(st.sampled_from(WORDS), min_size=4))
def test_identical_answers_score_100_everywhere(words: list[str]) -> None:
    text = " ".join(words)
    assert set(metrics(text, text).values()) == {100.0}


@pytest.mark.parametrize(("text", "bleu"), [("灯", 35.36), ("客厅的", 59.46), ("客厅的灯", 84.09)])
def test_identical_answers_of_fewer_than_four_tokens_have_the_documented_bleu(text: str, bleu: float) -> None:
    found = metrics(text, text)
    assert found["bleu_4"] == pytest.approx(bleu, abs=0.005)
    assert (found["accuracy"], found["f1"], found["rouge_1"], found["rouge_l"]) == (100, 100, 100, 100)


@quick
@given(
    st.lists(st.sampled_from(WORDS), min_size=1, unique=True),
    st.lists(st.sampled_from(WORDS), min_size=1, unique=True),
)
def test_english_rouge_agrees_with_rouge_score_where_no_word_repeats(first: list[str], second: list[str]) -> None:
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    theirs = scorer.score(target=" ".join(second), prediction=" ".join(first))
    ours = metrics(" ".join(first), " ".join(second))
    for name, key in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        assert ours[name] == pytest.approx(100 * theirs[key].fmeasure)
        assert ours[f"{name}_recall"] == pytest.approx(100 * theirs[key].recall)


@quick
@given(
    st.text("灯开关客厅的 ab。？.\n…”", min_size=1).filter(str.strip),
    st.text("灯开关客厅的 ab。？.\n…”", min_size=1).filter(str.strip),
)
def test_rouge_l_agrees_with_rouge_chinese(first: str, second: str) -> None:
    from tasks.scoring import _tokeniser

    def join(text: str) -> str:
        return " ".join(_tokeniser().cut(text))

    theirs = Rouge().get_scores(join(first), join(second))[0]["rouge-l"]
    assert metrics(first, second)["rouge_l"] == pytest.approx(100 * theirs["f"], abs=1e-4)


def test_longest_common_subsequence_of_long_answers_is_quick() -> None:
    first, second = ["a", "b", "c"] * 2000, ["c", "b", "a"] * 2000
    assert longest_common_subsequence(first, first) == 6000
    assert longest_common_subsequence(first, ["x"] * 6000) == 0
    assert longest_common_subsequence(first, second) >= 2000


@quick
@given(st.data())
def test_order_of_rows_does_not_matter(data: st.DataObject) -> None:
    answer = st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map(" ".join)
    pairs = data.draw(st.lists(st.tuples(st.just("") | answer, answer), min_size=1, max_size=8))
    assert score(data.draw(st.permutations(pairs))) == score(pairs)


def test_rows_are_scored_one_by_one_and_averaged() -> None:
    pairs = [("on", "on"), ("", "on"), ("off", "on")]
    rows = score_rows(pairs)
    assert [(r.row, r.accuracy, r.empty_prediction) for r in rows] == [
        (1, 100.0, False),
        (2, 0.0, True),
        (3, 0.0, False),
    ]
    assert score(pairs).accuracy == pytest.approx(100 / 3)


def test_accuracy_ignores_surrounding_whitespace_only() -> None:
    assert metrics(" on\n", "on")["accuracy"] == 100.0
    assert metrics("On", "on")["accuracy"] == 0.0
    assert metrics("o n", "on")["accuracy"] == 0.0


def test_stop_words_are_left_out_of_both_sides_and_off_by_default() -> None:
    pair = ("打开客厅灯", "打开客厅的灯")
    assert score([pair]).accuracy == 0.0
    with_list = score([pair], ["的"])
    assert (with_list.accuracy, with_list.f1, with_list.rouge_1, with_list.stop_words) == (100, 100, 100, 1)


def test_a_stop_word_takes_its_blank_along() -> None:
    found = score([("turn on light in kitchen", "turn on the light in the kitchen")], ["the"])
    assert (found.accuracy, found.f1, found.bleu_4) == (100, 100, pytest.approx(100))
    assert score([("The light", "light")], ["The"]).accuracy == 100


def test_means_have_intervals_that_hold_them_and_grow_with_the_confidence() -> None:
    rows = score_rows([("on", "on" if index % 3 else "off") for index in range(40)])
    narrow, wide = summarise(rows, confidence=0.5), summarise(rows, confidence=0.99)
    assert narrow.accuracy == pytest.approx(100 * 26 / 40)
    for low, high in (narrow.intervals["accuracy"], wide.intervals["accuracy"]):
        assert low < narrow.accuracy < high
    assert wide.intervals["accuracy"].low < narrow.intervals["accuracy"].low
    assert summarise(rows[:1]).intervals == {}


def test_every_metric_is_told_by_slice_as_if_its_rows_were_scored_alone() -> None:
    pairs = [("on", "on"), ("", "off"), ("灯", "灯"), ("on", "off")]
    found = summarise(score_rows(pairs), by={"lang": ["en", "en", "zh", "en"]})
    assert list(found.slices["lang"]) == ["en", "zh"]
    alone = summarise(score_rows([pairs[index] for index in (0, 1, 3)]))
    assert found.slices["lang"]["en"] == alone
    assert (found.slices["lang"]["zh"].rows, found.slices["lang"]["zh"].accuracy) == (1, 100)


def test_a_column_of_ever_new_values_is_refused() -> None:
    rows = score_rows([("on", "on")] * (MOST_SLICES + 1))
    with pytest.raises(UserError, match="different values"):
        summarise(rows, by={"id": [str(index) for index in range(MOST_SLICES + 1)]})


def test_json_figures_are_of_the_rows_whose_reference_is_json() -> None:
    found = score([("on", "on"), ('{"a": 1}', '{"a":1}'), ("no", '{"a":1}')])
    assert (found.json_rows, found.json_valid, found.json_exact, found.json_fields) == (2, 50, 50, 50)
    assert score([("on", "on")]).json_valid is None


def test_reference_of_stop_words_alone_is_an_error() -> None:
    with pytest.raises(UserError, match="row 2 is empty once stop words are left out"):
        score([("a", "b"), ("a", "的")], ["的"])


def test_bleu_agrees_with_sacrebleu_on_the_same_tokens(sentence_bleu: Callable[[list[str], list[str]], float]) -> None:
    @quick
    @given(st.lists(st.sampled_from(WORDS), min_size=4), st.lists(st.sampled_from(WORDS), min_size=4))
    def english(first: list[str], second: list[str]) -> None:
        # Our tokens of English text are its words and the blanks between them.
        ours = metrics(" ".join(first), " ".join(second))["bleu_4"]
        given_tokens, wanted_tokens = ("_ ".join(f"{word} " for word in words).split() for words in (first, second))
        assert ours == pytest.approx(sentence_bleu(given_tokens, wanted_tokens))

    english()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("今天天气很好，我们去公园散步。", "今天天气不错，我们一起去公园散步吧。"),
        ("打开客厅的灯，再把空调调到二十六度", "把客厅的灯打开，空调调到二十六度"),
        ("他喜欢在周末看电影", "周末他常常读书"),
    ],
)
def test_chinese_bleu_agrees_with_sacrebleu_on_the_same_tokens(
    first: str, second: str, sentence_bleu: Callable[[list[str], list[str]], float]
) -> None:
    from tasks.scoring import _cut

    tokens = [_cut(text, frozenset()) for text in (first, second)]
    assert metrics(first, second)["bleu_4"] == pytest.approx(sentence_bleu(tokens[0], tokens[1]))


@pytest.fixture(scope="module")
def sentence_bleu() -> Callable[[list[str], list[str]], float]:
    """BLEU-4 of one sentence by sacrebleu, on given tokens. Its smoothing `exp` is the smoothing 3 of nltk."""
    from sacrebleu.metrics import BLEU

    scorer = BLEU(tokenize="none", smooth_method="exp", effective_order=False)
    return lambda given_, wanted: float(scorer.sentence_score(" ".join(given_), [" ".join(wanted)]).score)


def test_scores_name_tokeniser_and_libraries() -> None:
    found = score([("on", "on")])
    assert found.tokeniser.startswith(f"jieba {found.libraries['jieba']}")
    assert set(found.libraries) == {"jieba", "nltk", "rouge-chinese"}


def test_nothing_is_printed_and_nothing_is_written_elsewhere(tmp_path: Path) -> None:
    for name in ("home", "tmp"):
        (tmp_path / name).mkdir()
    environment = {**os.environ, "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp")}
    ran = subprocess.run(
        [sys.executable, "-c", "from tasks.scoring import score; score([('灯', '灯')])"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (ran.stdout, ran.stderr) == ("", "")
    assert list(tmp_path.rglob("*/*")) == []
