"""Numbers of a finished run: the file, the table, and how they are told."""

import math

import pytest

from crossmae_jax import tables
from crossmae_jax.report import html
from crossmae_jax.runs import results

METRICS = {
    "train/loss": 0.19, "pixels/knn/top1": 0.98125, "pixels/linear/top1": 1.0,
    "pixels/linear/l2": 0.1, "eval/knn/top1": 0.5,
}


def test_the_table_is_aligned_and_shows_what_was_not_evaluated():
    assert tables.markdown(results.compared(METRICS)).splitlines() == [
        "| features    | k-NN top-1 | linear top-1 |",
        "|-------------|-----------:|-------------:|",
        "| pre-trained |     50.0 % |            - |",
        "| raw pixels  |     98.1 % |      100.0 % |",
    ]
    assert results.compared({"train/loss": 0.19, "eval/linear/l2": 0.1}) is None


def test_both_writers_write_the_same_cells():
    table = tables.Table(("name", "a | b"), (("x<y", "-"), ("eval/knn", "1 000")))
    page = html.table(table)
    for cell in ("<th>name</th>", '<th class="number">a | b</th>', "<td>x&lt;y</td>",
                 '<td class="number">-</td>', "<td>eval/<wbr>knn</td>",
                 '<td class="number">1 000</td>'):
        assert cell in page
    assert page.count("<tr>") == 3


def test_what_is_not_finite_is_not_read_back(tmp_path):
    assert results.read(tmp_path) == {}
    results.write(tmp_path, METRICS | {"eval/rank/effective": math.nan, "n": 3})
    assert '"eval/rank/effective": null' in (tmp_path / results.FILE).read_text()
    assert results.read(tmp_path) == METRICS | {"n": 3}


@pytest.mark.parametrize("text, expected", [
    (tables.percent(0.98125), "98.1 %"), (tables.percent(1), "100.0 %"),
    (tables.short("eval/knn/top1", 0.5), "50.0 %"),
    (tables.short("cls/k20/top5", 0.5), "50.0 %"),
    (tables.short("eval/rank/effective", 12.34567), "12.35"),
    (tables.exact(1 / 3), "0.333333"), (tables.grouped(1281167), "1 281 167"),
    (tables.grouped(1234.56, decimals=1), "1 234.6"),
    (tables.counted(50000, 50000), "50 000/50 000"),
])
def test_numbers_are_told_in_one_way(text, expected):
    assert text == expected
