"""What `benchmarks/generalise.py` makes of scores: gains are paired, kinds of variants apart, what broke is left out."""

import pytest

from benchmarks.generalise import table
from pi0.base.errors import InputError
from pi0.base.files import write_json


def put(folder, policy: str, change: str, outcomes: list) -> None:
    where = folder / policy / change
    where.mkdir(parents=True)
    write_json(where / "results.json", {"outcomes": outcomes})


def of_task(*successes: bool | None) -> list[dict]:
    return [{"task": 3, "state": state, "success": success} for state, success in enumerate(successes)]


def variants(camera: bool, noise: bool) -> list[dict]:
    return [
        {"task": 0, "state": 0, "success": camera, "kind": "camera", "name": "a"},
        {"task": 1, "state": 0, "success": noise, "kind": "noise", "name": "b"},
    ]


def test_a_gain_is_of_the_episodes_that_both_have(tmp_path):
    put(tmp_path, "start", "none", of_task(False, False, True, False, None))
    put(tmp_path, "practised-0", "none", of_task(True, True, True, None, True))
    put(tmp_path, "start", "pro-swap", of_task(False, False))
    put(tmp_path, "practised-0", "pro-swap", of_task(True, False))
    put(tmp_path, "start", "plus", variants(False, True))
    put(tmp_path, "practised-0", "plus", variants(True, False))
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in table(tmp_path).split("\n")[2:]}
    assert list(rows) == ["none", "pro swap", "plus camera", "plus noise", "plus, all kinds"]
    assert rows["none"][1].startswith("1/4 ") and rows["none"][2].startswith("4/4 ")
    assert rows["none"][3].startswith("+66.7 ")  # of the three that broke in neither
    assert rows["pro swap"][3].startswith("+50.0 ") and rows["pro swap"][4].startswith("75%")
    assert rows["plus camera"][4].startswith("150%") and rows["plus noise"][3].startswith("-100.0 ")
    assert rows["plus, all kinds"][1].startswith("1/2 ") and rows["plus, all kinds"][3].startswith("+0.0 ")


def test_several_seeds_have_a_mean_gain_with_its_interval(tmp_path):
    put(tmp_path, "start", "none", of_task(False, False, False, True))
    put(tmp_path, "practised-0", "none", of_task(True, False, False, True))
    put(tmp_path, "practised-1", "none", of_task(True, True, True, True))
    *_, row = table(tmp_path).split("\n")
    assert "| 50.0%, 100.0% |" in row and "+50.0 (-267.7 to +367.7)" in row  # 12.706 * 0.25 around 0.5


def test_a_folder_without_a_start_is_named(tmp_path):
    with pytest.raises(InputError, match="holds no score of a start"):
        table(tmp_path)
