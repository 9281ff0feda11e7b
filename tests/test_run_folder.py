"""The folder of a run, whatever its trainer: which settings it may be resumed with."""

from dataclasses import asdict, dataclass

import pytest

from pi0.base.errors import MissingFileError, OutputError
from pi0.base.typed_yaml import fixed_keys, key, section
from pi0.training.run_folder import name_problem, new_run_dir, run_to_resume


@dataclass(kw_only=True)
class Critic:
    heads: int = key(2, "networks that are averaged", fixed=True)
    every: int = key(5, "how often")


@dataclass(kw_only=True)
class Settings:
    """The configuration of a trainer that is not RIPT."""

    game: str = key("level-1", "what is played", fixed=True)
    critic: Critic = section(Critic)


def resumed(folder, **changes) -> str:
    config = Settings(critic=Critic(**changes))
    return run_to_resume("newest", str(folder), "run", asdict(config), fixed_keys(Settings)).name


@pytest.fixture
def stopped(tmp_path):
    """The folder of a run that has ended."""
    run_dir = new_run_dir(str(tmp_path), "run", asdict(Settings()))
    (run_dir / "checkpoints").mkdir()
    return run_dir


def test_fixed_keys_are_those_of_the_trainers_own_schema(stopped, tmp_path, capsys):
    assert resumed(tmp_path) == stopped.name
    assert capsys.readouterr().out == ""
    assert resumed(tmp_path, every=6) == stopped.name
    assert capsys.readouterr().out == "resuming with critic.every = 6, which was 5\n"
    with pytest.raises(OutputError) as caught:
        resumed(tmp_path, heads=4, every=6)
    assert str(caught.value) == (
        f"{stopped} cannot be resumed with other settings (critic.heads was 2 and is 4); restore them, or start a new run "
        f"with policy_path = {stopped / 'policy'}"
    )


def test_a_section_that_the_run_did_not_have_is_compared_key_by_key(stopped, tmp_path):
    (stopped / "config.yaml").write_text("game: level-1\ncritic:\n")
    with pytest.raises(OutputError, match=r"\(critic\.heads was None and is 2\)"):
        resumed(tmp_path)
    (stopped / "config.yaml").write_text("game: level-1\ncritic: {heads: 2}\n")
    assert resumed(tmp_path) == stopped.name


@pytest.mark.tried("An older run is to be resumed", "`--resume FOLDER` does it")
def test_any_run_is_resumed_by_its_folder(stopped, tmp_path, capsys):
    newer = new_run_dir(str(tmp_path), "run", asdict(Settings(game="level-2")))
    (newer / "checkpoints" / "step-000001").mkdir(parents=True)
    settings = asdict(Settings()), fixed_keys(Settings)
    for folder in (stopped, newer.parent / "." / stopped.name):
        assert run_to_resume(str(folder), "elsewhere", "another", *settings) == stopped
    with pytest.raises(OutputError, match="game was 'level-2' and is 'level-1'"):
        run_to_resume(str(newer), str(tmp_path), "run", *settings)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "folder, problem", [("", "has no checkpoints"), ("nowhere", "there is no such folder")]
)
def test_a_folder_that_is_no_run_is_refused_by_name(tmp_path, folder, problem):
    with pytest.raises(
        OutputError, match=f"nothing to resume: {tmp_path / folder}: {problem}; name the folder"
    ):
        run_to_resume(str(tmp_path / folder), str(tmp_path), "run", {}, [])


@pytest.mark.parametrize(
    "damage, problem",
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_text(""), "it holds no settings"),
        (lambda path: path.write_text("game: [1"), "while parsing a flow sequence"),
        (lambda path: path.write_bytes(b"game: \xff"), "utf-8"),
        (lambda path: path.write_bytes(b"game: \x01"), "special characters are not allowed"),
    ],
    ids=["missing", "empty", "not yaml", "not text", "control character"],
)
@pytest.mark.tried(
    "config.yaml of a run is missing, empty or broken", "An error that says where a copy of the settings is"
)
def test_a_run_whose_settings_cannot_be_read_is_not_resumed_with_others(stopped, tmp_path, damage, problem):
    damage(stopped / "config.yaml")
    with pytest.raises(MissingFileError, match=f"config.yaml: the settings .*{problem}.*restore the file"):
        resumed(tmp_path)


@pytest.mark.parametrize("name", ["run", "run-2", "a.b c", "läufe"])
def test_a_name_of_a_folder_is_fine(name):
    assert name_problem(name) is None


@pytest.mark.parametrize("name", ["", "team/exp", "../../x", "..", ".", "/x", "x/", "a\nb"])
@pytest.mark.tried("`exp_name: ../../x` or `team/exp`", "An error; a name is one name")
def test_a_name_that_leaves_the_folder_of_runs_is_refused(name):
    assert "one name without /" in name_problem(name)
