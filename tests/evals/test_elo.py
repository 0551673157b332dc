import json

import pytest

from qlora_jax.evals import Match, elo_ratings, read_matches

# Table 7 of the paper, judged by GPT-4, and how the files call the systems.
OPEN_ASSISTANT = {
    "gpt4": 1294,
    "gpt35": 1015,
    "65b": 1008,
    "30b": 1002,
    "vicuna": 937,
    "13b": 885,
    "7b": 860,
}
VICUNA = {
    "65b": 1022,
    "30b": 992,
    "vicuna": 974,
    "gpt35": 966,
    "13b": 913,
    "bard": 902,
    "7b": 879,
}


def key_of(name):
    name = name.lower()
    keys = ("vicuna-13b", "65b", "30b", "13b", "7b", "bard", "gpt4", "gpt35")
    found = next(k for k in keys if k in name.replace("-4", "4").replace("-3.5", "35"))
    return found.split("-")[0]


@pytest.mark.parametrize(
    "file, expected, orders",
    [
        ("gpt4_ratings_oa.jsonl.gz", OPEN_ASSISTANT, 400),
        ("gpt4_ratings_vicuna.jsonl.gz", VICUNA, 4000),
    ],
)
def test_the_papers_table(file, expected, orders, data_dir):
    """Within the spread of the mean and what rounding and ties leave: 7 points."""
    ratings = elo_ratings(read_matches(data_dir(f"elo/{file}")), orders=orders)
    found = {key_of(name): rating for name, rating in ratings.items()}
    for name, value in expected.items():
        assert found[name].mean == pytest.approx(value, abs=7), name
    ranked = sorted(expected, key=lambda name: -expected[name])
    assert [name for name in found if name in expected] == ranked
    assert sum(r.mean for r in ratings.values()) / len(ratings) == pytest.approx(1000)


def test_one_match_by_hand():
    ratings = elo_ratings([Match("x", "y", 1.0)], orders=3)
    assert ratings["x"].mean == 1016 and ratings["y"].mean == 984
    assert ratings["x"].interval == 0 and list(ratings) == ["x", "y"]
    tie = elo_ratings([Match("x", "y", 0.5)], orders=1)
    assert tie["x"].mean == tie["y"].mean == 1000
    second = elo_ratings([Match("x", "y", 1.0), Match("x", "y", 1.0)], orders=1)
    assert second["x"].mean == pytest.approx(1016 + 32 / (1 + 10 ** (32 / 400)))


def test_judgements_of_both_forms(tmp_path):
    path = tmp_path / "j.jsonl"
    rows = [1, 2, 3, -1, [7, 5], [5, 7], [6, 6]]
    lines = [json.dumps({"a": "x", "b": "y", "score": score}) for score in rows]
    path.write_text("\n".join(lines))
    assert [m.score for m in read_matches(path)] == [1, 0, 0.5, 1, 0, 0.5]
    path.write_text(lines[0] + '\n{"a": "x", "b": "y", "score": 4}\n')
    with pytest.raises(ValueError, match=r"j\.jsonl, line 2 is no judgement"):
        read_matches(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_matches(tmp_path / "absent")
    with pytest.raises(ValueError, match="0 matches"):
        elo_ratings([])
