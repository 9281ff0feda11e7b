"""The folder of a run, whatever its trainer: which settings it may be resumed with."""

from dataclasses import asdict, dataclass

import pytest

from pi0.base.errors import OutputError
from pi0.base.typed_yaml import fixed_keys, key, section
from pi0.training.run_folder import new_run_dir, newest_run


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
    return newest_run(str(folder), "run", asdict(config), fixed_keys(Settings)).name


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
