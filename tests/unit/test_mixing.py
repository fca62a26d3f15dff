"""A mix takes what its portions say, in an order that the seed alone decides, and checks what it is given."""

import json
from collections import Counter
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.data.mixing import Part, find_parts, index_part, parse_portions, read_portions, shuffled, write_mix
from utils.io.errors import UserError


def part(name, rows, portion):
    return Part(name, None, Decimal(portion), np.arange(rows + 1, dtype=np.uint64), "")


def row(name, number):
    return {"dataset": name, "id": f"{name}_{number}", "messages": [{"role": "user", "content": f"ü {number}"}]}


@pytest.fixture
def reformatted(tmp_path):
    for name, count in {"one": 10, "two": 3}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.jsonl").write_text("".join(json.dumps(row(name, n)) + "\n" for n in range(count)))
    return tmp_path


@given(rows=st.integers(0, 40), portion=st.decimals("0.01", "5", places=2), seed=st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_every_row_is_taken_the_whole_part_of_its_portion_and_at_most_once_more(rows, portion, seed):
    _, lines = shuffled([part("a", rows, portion), part("b", 3, 1)], seed)
    assert len(lines) == int(rows * portion) + 3
    owners, lines = shuffled([part("a", rows, portion)], seed)
    counts = Counter(lines.tolist())
    assert all(counts[line] in (int(portion), int(portion) + 1) for line in range(rows))
    assert set(owners.tolist()) <= {0}


def test_portions_are_exact_decimals():
    assert part("a", 10, "2.9").taken == 29  # 2.9 * 10 in binary would lose a row: int(0.9 * 10) after 2.9 - 2 is 8
    assert part("a", 1000, "0.001").taken == 1


def test_the_order_is_that_of_every_machine():
    owners, lines = shuffled([part("one", 5, "1.5"), part("two", 3, "1")], 233)
    assert list(zip(owners.tolist(), lines.tolist(), strict=True)) == [
        (1, 0),
        (1, 2),
        (1, 1),
        (0, 0),
        (0, 4),
        (0, 3),
        (0, 3),
        (0, 2),
        (0, 1),
        (0, 2),
    ]


def test_seeds_give_different_orders_and_draws():
    orders = [shuffled([part("a", 50, "0.5")], seed)[1].tolist() for seed in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    assert len({tuple(sorted(order)) for order in orders}) == 3


def test_a_draw_does_not_depend_on_what_it_is_mixed_with():
    alone = shuffled([part("a", 50, "0.5")], 1)[1]
    owners, lines = shuffled([part("b", 20, "2"), part("a", 50, "0.5")], 1)
    assert lines[owners == 1].tolist() == alone.tolist()


def test_the_order_is_mixed():
    _, lines = shuffled([part("a", 2000, "1")], 233)
    assert abs(np.corrcoef(lines.astype(float), np.arange(2000))[0, 1]) < 0.1
    assert abs(np.corrcoef(lines[1:].astype(float), lines[:-1].astype(float))[0, 1]) < 0.1


def test_lines_are_copied_byte_for_byte_and_hashed(reformatted):
    portions = parse_portions(["one=2.5", "two=1"])
    paths = find_parts(reformatted, portions)
    parts = [index_part(name, path, portions[name]) for name, path in paths.items()]
    manifest = write_mix(parts, 233, reformatted / "mixed")
    written = (reformatted / "mixed" / "data.jsonl").read_bytes()
    inputs = {line for path in paths.values() for line in path.read_bytes().splitlines(keepends=True)}
    assert set(written.splitlines(keepends=True)) == inputs
    assert manifest["bytes"] == len(written)
    assert manifest["rows"] == written.count(b"\n") == 28
    assert json.loads((reformatted / "mixed" / "manifest.json").read_text()) == manifest


def test_an_input_that_changes_while_it_is_mixed_is_an_error(reformatted):
    path = reformatted / "one" / "data.jsonl"
    found = index_part("one", path, Decimal(1))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="has changed"):
        write_mix([found], 233, reformatted / "mixed")
    assert list((reformatted / "mixed").iterdir()) == []


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda data: data[:-1], "row 2, byte 178: the last line is cut off"),
        (lambda data: data.replace(b'"user"', b'"bot"', 1), "row 0, byte 0: not a row"),
        (lambda data: data.replace(b'"messages"', b'"message"', 1), "row 0, byte 0: not a row"),
        (lambda data: data + b"{}\n", "row 3, byte 267: not a row"),
        (lambda data: data + b"[]\n", "row 3, byte 267: not a row"),
        (lambda data: data + b"\n", "row 3, byte 268: not JSON"),
        (lambda data: data.replace(b"two_1", b"two\xff1"), r"row 1, byte 118: byte 0xff is not UTF-8"),
    ],
)
def test_a_line_that_is_no_row_is_an_error_with_its_place(reformatted, broken, words):
    path = reformatted / "two" / "data.jsonl"
    path.write_bytes(broken(path.read_bytes()))
    with pytest.raises(UserError, match=words) as error:
        index_part("two", path, Decimal(1))
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["one"], "must be NAME=NUMBER"),
        (["=1"], "must be NAME=NUMBER"),
        (["one=1", "one=2"], "there twice"),
        (["one=nan"], "must be a number"),
        (["one=-1"], "must be a number"),
        (["one=1e9"], "must be a number"),
        (["one=0"], "nothing to mix"),
        (["on=1"], "did you mean 'one'"),
    ],
)
def test_portions_that_make_no_sense_are_errors(reformatted, texts, words):
    with pytest.raises(UserError, match=words):
        find_parts(reformatted, parse_portions(texts))


@pytest.mark.parametrize(
    "text", ["portion: {one: 1}", "portions: [one]", "portions: {one: many}", "{", "a: 1: 2", "", "portions: {}"]
)
def test_a_yaml_file_of_another_form_is_an_error_that_names_it(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=r"mine\.yaml"):
        read_portions(tmp_path / "mine.yaml")


def test_the_default_mix_is_that_of_the_method(repository):
    assert read_portions(repository / "configs" / "data" / "default_mix.yaml") == {
        "vicuna_sharegpt": Decimal("2.9"),
        "evol_instruct": 1,
        "slim_orca": 1,
        "meta_math_qa": 1,
        "evol_code_alpaca": 1,
    }
