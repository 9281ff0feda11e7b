"""Configurations: what is read, what wins, and how each mistake is named."""

import ast
import re
from dataclasses import MISSING, dataclass
from pathlib import Path

import pytest
import yaml

from pi0.base import typed_yaml
from pi0.base.typed_yaml import fixed_keys, key, section
from pi0.ript.config import (
    PROFILES,
    AlgoConfig,
    Config,
    ConfigError,
    TaskConfig,
    describe_keys,
    help_text,
    load_config,
    to_dict,
    validate,
)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def write(tmp_path):
    def write_text(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write_text


def errors_of(path: Path, *overrides: str, stage: int | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, stage)
    return [line.removeprefix(f"{path.parent}/") for line in str(caught.value).splitlines()]


def test_values_of_the_file_replace_the_defaults(write):
    config = load_config(write("policy_path: a\nalgo: {lr: 0.5}\ntraining:\n  optimizer: {type: sgd}\n"))
    assert (config.policy_path, config.algo.lr, config.training.optimizer.type) == ("a", 0.5, "sgd")
    assert config.algo.num_epochs == AlgoConfig().num_epochs


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", ".1e-3", "+1e-4", "0.0001"])
def test_a_learning_rate_may_be_written_without_a_point(write, text):
    assert load_config(write(f"policy_path: a\nalgo:\n  lr: {text}\n")).algo.lr == 1e-4


@pytest.mark.parametrize("text", ["0100", "1:30", "0o17", "0b1", "08"])
@pytest.mark.tried("`0100` and `1:30` in YAML", "They are no numbers, and refused where one is expected")
def test_what_only_looks_like_a_number_is_none(write, text):
    (error,) = errors_of(write(f"policy_path: a\ntraining:\n  seed: {text}\n"))
    assert error == f'run.yaml:3: training.seed = "{text}": expected int, got str'


@pytest.mark.parametrize(
    "name", ["0100", "1:30", "0o17", "08", "1_0", "0x1F", "-1", "1.5", "yes", "null", "~", "2026-01-01"]
)
def test_a_name_that_looks_like_something_else_is_written_and_read_as_it_is(write, name):
    written = yaml.safe_dump(to_dict(load_config(write(f"policy_path: a\nexp_name: '{name}'\n"))))
    assert load_config(write(written)).exp_name == name


@pytest.mark.parametrize(("text", "seed"), [("7", 7), ("+7", 7), ("1_000", 1000), ("0", 0)])
def test_whole_numbers(write, text, seed):
    assert load_config(write(f"policy_path: a\ntraining: {{seed: {text}}}\n")).training.seed == seed


@pytest.mark.tried("`output_dir: ~/runs`", "The folder is in the home")
def test_a_home_is_found_in_every_key_that_names_a_file_or_folder(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    text = "policy_path: ~/policy\noutput_dir: ~/runs\nexp_name: '~'\ntask: {assets: ~/assets, demonstrations: ~/sets}\n"
    config = load_config(
        write(text),
        ["norm_stats_path=~/stats.json", "algo.cotraining_path=~", "algo.rollout_stats_path=a~/b"],
    )
    assert (config.policy_path, config.output_dir) == ("/home/someone/policy", "/home/someone/runs")
    assert (config.task.assets, config.task.demonstrations) == ("/home/someone/assets", "/home/someone/sets")
    assert config.norm_stats_path == "/home/someone/stats.json"
    assert config.algo.cotraining_path is None, "alone it is YAML's null"
    assert (config.algo.rollout_stats_path, config.exp_name) == ("a~/b", "~")


def test_keys_that_name_files_are_declared_so():
    names = {description.name for description in describe_keys() if description.path}
    assert {name for name in names if not re.search("path|dir|assets|demonstrations", name)} == set()
    texts = [description for description in describe_keys() if "str" in str(description.type)]
    assert {d.name for d in texts if re.search("_path|_dir", d.name)} <= names


def test_a_whole_number_is_a_float_where_one_is_expected(write):
    lr = load_config(write("policy_path: a\nalgo: {lr: 1}\n")).algo.lr
    assert lr == 1.0 and type(lr) is float


def test_an_empty_section_keeps_its_defaults(write):
    assert load_config(write("policy_path: a\ntask:\n")).task == TaskConfig()


def test_overrides_win_over_the_file_and_are_yaml(write):
    config = load_config(
        write("policy_path: a\ntask: {task_name: 3}\n"),
        ["task.task_name=null", "task.task_names_to_use=[3, 8]", "algo.lr=2e-5", "features.save_video=false"],
    )
    assert config.task.task_name is None
    assert config.task.task_names_to_use == [3, 8]
    assert config.algo.lr == 2e-5
    assert config.features.save_video is False


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_a_profile_goes_under_the_file(write, name):
    path = write("policy_path: a\ntraining: {num_train_steps: 77}\n")
    config = load_config(path, [f"profile={name}"])
    assert config.training.num_train_steps == 77
    assert config.evaluation.episodes == PROFILES[name]["evaluation.episodes"]
    assert config.algo.train_init_states == PROFILES[name]["algo.train_init_states"]


def test_profiles_give_every_value_a_key_that_exists():
    names = {description.name for description in describe_keys()}
    assert all(set(values) <= names for values in PROFILES.values())


def test_a_configuration_survives_being_written_and_read(write):
    config = load_config(write("policy_path: a\nprofile: dev\ntask: {task_names_to_use: [3, some_task]}\n"))
    assert load_config(write(yaml.safe_dump(to_dict(config)))) == config


def test_lists_are_not_shared_between_configurations():
    TaskConfig().task_names_to_use.append(3)
    assert TaskConfig().task_names_to_use == []


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("algo.learning_rate", "algo.lr"),
        ("algo.num_epoch", "algo.num_epochs"),
        ("lr", "algo.lr"),
        ("seed", "training.seed"),
        ("task.episodes", "evaluation.episodes"),
        ("training.optimiser.type", "training.optimizer.type"),
        ("output", "output_dir"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_right_one(write, given, nearest):
    (error,) = errors_of(write("policy_path: a\n"), f"{given}=1")
    assert error == f"--override {given}=1: {given} = 1: unknown key; the nearest one is {nearest}"


def test_an_unknown_key_in_the_file_is_named_with_its_line(write):
    (error,) = errors_of(write("policy_path: a\nalgo:\n  lr: 1e-3\n  rloo_batchsize: 4\n"))
    assert (
        error == "run.yaml:4: algo.rloo_batchsize = 4: unknown key; the nearest one is algo.rloo_batch_size"
    )


def test_a_value_in_place_of_a_section_is_named(write):
    (error,) = errors_of(write("policy_path: a\nalgo: fast\n"))
    assert error == 'run.yaml:2: algo = "fast": algo is a section; set its keys, such as algo.mode'


@pytest.mark.parametrize("name", ["critic_path", "cotraining_path"])
def test_what_has_no_probability_does_not_go_with_ratios(write, name):
    (error,) = errors_of(write("policy_path: a\n"), "algo.mode=ratio", f"algo.{name}=somewhere")
    assert f'algo.{name} = "somewhere" and algo.mode = ratio exclude each other' in error
    assert "use mode: weighted" in error


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("algo.num_epochs=two", '"two": expected int, got str'),
        ("algo.num_epochs=2.0", "2.0: expected int, got float"),
        ("algo.num_epochs=true", "true: expected int, got bool"),
        ("algo.lr=fast", '"fast": expected float, got str'),
        ("algo.lr=", "null: expected float, got null"),
        ("features.save_video=1", "1: expected bool, got int"),
        ("task.task_names_to_use=3", "3: expected list of str or int, got int"),
        ("task.task_names_to_use=[1.5]", "[1.5]: expected list of str or int, got list"),
        ("exp_name=3", "3: expected str, got int"),
        ("algo.mode=ppo", '"ppo": expected weighted or guidance or ratio, got str'),
        ("task.max_episode_length=long", '"long": expected int or null, got str'),
    ],
)
def test_a_wrong_type_says_what_is_expected_and_what_it_got(write, override, complaint):
    (error,) = errors_of(write("policy_path: a\n"), override)
    assert error == f"--override {override}: {override.partition('=')[0]} = {complaint}"


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("algo.lr=0", "0: must be above 0"),
        ("algo.lr=.nan", "NaN: expected a finite number"),
        ("algo.lr=.inf", "Infinity: expected a finite number"),
        ("algo.rloo_batch_size=1", "1: must be 2 or more"),
        ("algo.condition_dropout=1.5", "1.5: must be 1 or less"),
        ("task.task_name=-1", "-1: must be 0 or more"),
        ("task.task_names_to_use=[3, -2]", "[3, -2]: must be 0 or more"),
    ],
)
def test_a_value_out_of_range_says_the_range(write, override, complaint):
    (error,) = errors_of(write("policy_path: a\n"), override)
    assert error == f"--override {override}: {override.partition('=')[0]} = {complaint}"


def test_a_missing_key_says_what_it_is(write):
    (error,) = errors_of(write("exp_name: a\n"))
    assert error == "run.yaml: policy_path is missing: policy folder to start from"


def test_a_key_given_twice_names_both_lines(write):
    (error,) = errors_of(write("policy_path: a\nalgo:\n  lr: 1\n  num_epochs: 2\n  lr: 2\n"))
    assert error == "run.yaml:5: algo.lr is given twice, first in line 3; remove one"


@pytest.mark.tried("A dotted key beside the nested one", "An error that names both lines")
def test_a_key_given_dotted_and_nested_names_both_lines(write):
    (error,) = errors_of(write("policy_path: a\nalgo.lr: 1e-3\nalgo:\n  lr: 1e-4\n"))
    assert re.fullmatch(r"run.yaml:4: algo.lr is given twice, first in \S+run.yaml:2; remove one", error)
    assert load_config(write("policy_path: a\nalgo.lr: 1e-3\n"), ["algo.lr=1e-4"]).algo.lr == 1e-4


@pytest.mark.parametrize(
    "text, what",
    [
        ("<<: {algo: 1}\n", "<<"),
        ("algo: &a {lr: 1e-3}\ntraining: {<<: *a}\n", "<<"),
        ("? [a, b]\n: 1\n", "a key that is a list or a mapping"),
    ],
)
@pytest.mark.tried("`<<:` or a list as a key", "An error with its line")
def test_a_key_that_is_no_word_is_refused_in_its_line(write, text, what):
    (error,) = errors_of(write("policy_path: a\n" + text))
    assert re.fullmatch(rf"run.yaml:[23]: {what} cannot be used here; write the keys out", error)


@pytest.mark.parametrize("character", ["\x01", "\x1b"])
@pytest.mark.tried("A control character in a YAML file or override", "An error that names it")
def test_a_control_character_is_named(write, character):
    (error,) = errors_of(write(f"policy_path: a{character}\n"))
    assert "run.yaml: not valid YAML: unacceptable character" in error
    (error,) = errors_of(write("policy_path: a\n"), f"exp_name=a{character}")
    assert "not a YAML value: unacceptable character" in error


def test_one_run_names_everything_that_is_wrong(write):
    path = write("algo:\n  lr: -1\n  epochs: 2\ntraining: {seed: x}\n")
    assert {error.split(" ")[1] for error in errors_of(path)} == {
        "algo.lr",
        "algo.epochs",
        "training.seed",
        "policy_path",
    }


def test_two_ways_to_name_the_tasks_are_a_conflict(write):
    (error,) = errors_of(write("policy_path: a\ntask: {task_name: 3, task_names_to_use: [1]}\n"))
    assert error == (
        "run.yaml: task.task_name = 3 and task.task_names_to_use = [1] are both given; give one of them"
    )


def test_data_that_is_no_whole_number_of_groups_is_answered_with_one_that_is(write):
    (error,) = errors_of(write("policy_path: a\nalgo: {rloo_batch_size: 8, data_batch_size: 20}\n"))
    assert "algo.data_batch_size = 20 is not a whole number of groups" in error and error.endswith("; use 24")


def test_too_few_attempts_to_collect_the_data_is_an_error(write):
    path = write(
        "policy_path: a\nalgo: {rloo_batch_size: 4, data_batch_size: 20, max_sampling_attempts: 4}\n"
    )
    (error,) = errors_of(path)
    assert error.endswith("use at least 5 attempts")


def test_a_missing_file_names_those_that_are_there(tmp_path):
    (tmp_path / "quickstart.yaml").touch()
    (error,) = errors_of(tmp_path / "quickstat.yaml")
    assert error == f"quickstat.yaml: no such file; there are: {tmp_path / 'quickstart.yaml'}"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: [1\n", "not valid YAML"),
        ("- 1\n", "expected lines of 'key: value' at the top level"),
        ("a: 1\n---\nb: 1\n", "not valid YAML"),
        ("policy_path: a\nexp_name: 2024-99-99\n", "exp_name: not a YAML value"),
        ("policy_path: !!python/object:os.system a\n", "policy_path: not a YAML value"),
    ],
)
def test_what_is_no_yaml_is_one_clear_error(write, text, complaint):
    assert complaint in errors_of(write(text))[0]


def test_a_file_that_is_no_text_is_one_clear_error(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    assert "cannot be read" in errors_of(path)[0]


@pytest.mark.parametrize("override", ["algo.lr", "=3", ""])
def test_an_override_without_key_or_value_is_an_error(write, override):
    (error,) = errors_of(write("policy_path: a\n"), override)
    assert error == f"--override {override}: expected key=value, for example algo.lr=2e-5"


def test_a_configuration_made_in_code_is_checked_alike():
    config = Config(policy_path="a", algo=AlgoConfig(lr=-1.0, num_epochs=1.5))  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        validate(config)
    assert str(caught.value).splitlines() == [
        "algo.num_epochs = 1.5: expected int, got float",
        "algo.lr = -1.0: must be above 0",
    ]


def test_the_defaults_are_valid():
    validate(Config(policy_path="a"))


def test_help_tells_type_unit_default_and_meaning_of_every_key():
    text = help_text()
    assert "  algo.rloo_batch_size: int (rollouts), default 8\n      rollouts whose scores" in text
    assert "  policy_path: str, required, fixed on resume\n" in text
    assert '  algo.group_by: state or batch, default "state", from stage 12 on (before: "batch")\n' in text
    assert "  training.use_fsdp: bool, default false, from stage 13 on\n" in text
    assert "  logging.log_freq: int (iterations), default 5, from stage 11 on\n" in text
    assert "  features.save_video: bool, default true\n" in text
    assert all(f"  {description.name}: " in text and description.doc for description in describe_keys())


OF_OTHER_TRAINERS = ("parallel", "acrlpd")
SHIPPED = [
    path for path in sorted((ROOT / "configs").glob("*.yaml")) if not path.name.startswith(OF_OTHER_TRAINERS)
]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_configuration_is_valid_in_the_stage_that_it_names(path):
    (stage,) = re.findall(r"(\d\d)_train\w+\.py", path.read_text())
    load_config(path, stage=int(stage))


# Keys of later stages.


def test_a_key_that_only_a_later_stage_reads_is_refused_with_the_stage_that_does(write):
    path = write("policy_path: a\nevaluation:\n  periodic_episodes: 20\n")
    for stage in (9, 10, 11):
        in_file, in_override = errors_of(path, "training={use_fsdp: true}", stage=stage)
        assert in_file == (
            "run.yaml:3: evaluation.periodic_episodes = 20: works from stage 12 on, and this is "
            f"stage {stage:02d}; remove it, or run stage 12"
        )
        assert in_override == (
            "--override training={use_fsdp: true}: training.use_fsdp = true: works from stage 13 on, and this is "
            f"stage {stage:02d}; remove it, or run stage 13"
        )
    (error,) = errors_of(path, "training.use_fsdp=true", stage=12)
    assert "training.use_fsdp = true: works from stage 13 on, and this is stage 12; " in error
    assert load_config(path, ["training.use_fsdp=true"], stage=13).training.use_fsdp
    assert load_config(path, ["training.use_fsdp=true"]).training.use_fsdp, "no stage, nothing to refuse"


def test_a_refused_key_hides_no_other_mistake(write):
    path = write("logging: {log_freq: often}\nalgo: {lr: -1, epochs: 2}\n")
    errors = errors_of(path, stage=10)
    assert [error.split(" ")[1] for error in errors] == [
        "algo.epochs",
        "policy_path",
        "logging.log_freq",
        "algo.lr",
    ]
    assert "works from stage 11 on" in errors[2], "its type matters only where the key is known"


@pytest.mark.parametrize("description", describe_keys(), ids=lambda each: each.name)
def test_what_a_stage_does_anyway_may_be_said_to_it(write, description):
    path = write("policy_path: a\n")
    for value in (description.default, description.before):
        if value is not MISSING:
            load_config(path, [f"{description.name}={typed_yaml.show(value)}"], stage=9)


def test_a_run_of_an_early_stage_is_started_again_from_the_settings_that_it_wrote(write):
    early = "algo: {group_by: batch, enable_dynamic_sampling: false}\nlogging: {use_wandb: false}\n"
    config = load_config(write(f"policy_path: a\n{early}"), stage=9)
    assert config.algo.group_by == "batch"
    assert load_config(write(yaml.safe_dump(to_dict(config))), stage=9) == config


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_every_stage_takes_every_profile(write, name):
    path = write("policy_path: a\n")
    for stage in range(9, 14):
        config = load_config(path, [f"profile={name}"], stage)
        assert config.training.num_train_steps == PROFILES[name]["training.num_train_steps"]


@dataclass(kw_only=True)
class Sinks:
    online: bool = key(False, "send metrics")
    every: int = key(5, "how often", since=3)


@dataclass(kw_only=True)
class Program:
    profile: str | None = key(None, "values to start from")
    speed: int = key(1, "how fast", since=2, before=0)
    name: str = key("a", "its name", fixed=True)
    sinks: Sinks = section(Sinks, since=2)


def test_what_a_profile_sets_is_not_requested_unless_the_file_says_so_too(write):
    def load(text: str) -> Program:
        return typed_yaml.load(Program, write(text), profiles={"fast": {"speed": 9}}, running=1)

    assert load("profile: fast\n").speed == 9
    with pytest.raises(
        ConfigError, match="yaml:2: speed = 9: works from version 2 on, and this is version 1; "
    ):
        load("profile: fast\nspeed: 9\n")


def test_a_section_can_be_of_a_later_version_and_a_key_in_it_of_a_still_later_one(write):
    since = {each.name: each.since for each in typed_yaml.describe_keys(Program)}
    assert since == {"profile": None, "speed": 2, "name": None, "sinks.online": 2, "sinks.every": 3}
    path = write("sinks: {online: true, every: 2}\n")
    with pytest.raises(ConfigError) as caught:
        typed_yaml.load(Program, path, running=2)
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == ["sinks.every = 2"]
    assert "  sinks.every: int, default 5, from version 3 on\n" in typed_yaml.help_text(Program)


# Keys that a resumed run must keep.


def test_fixed_are_optimizer_and_schedule_what_is_practised_and_what_scores_are_compared_with():
    # As names began when this was a list of its own: "training.optimizer" stood for its whole section.
    began = (
        "policy_path", "norm_stats_path", "task.benchmark_name", "task.task_name", "task.demonstrations", "task.assets",
        "task.held_out_states", "task.fixtures", "task.max_episode_length", "task.settle_steps", "task.replan_steps",
        "task.image_size", "task.render", "algo.mode", "algo.lr", "algo.train_init_states", "training.num_train_steps",
        "training.seed", "training.optimizer", "evaluation.episodes", "evaluation.seed", "training.trainable", "dtype",
        "algo.critic_path", "algo.noise_level",
    )  # fmt: skip
    assert fixed_keys(Config) == [each.name for each in describe_keys() if each.name.startswith(began)]
    assert len(fixed_keys(Config)) == 30
    assert fixed_keys(Program) == ["name"]


# Reads of keys.


def reads_of(source: str) -> set[tuple[str, str]]:
    """(owner, attribute) of every attribute that the source reads: `config.algo.lr` gives ("algo", "lr")."""
    reads = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
            reads.add((name, node.attr))
    return reads


def is_read(name: str, reads: set[tuple[str, str]]) -> bool:
    """Whether a key is among what is read; what any trainer may use reads a section by the name `settings`."""
    owner, _, leaf = f"config.{name}".rpartition(".")
    if leaf in ("task_name", "task_names_to_use"):  # `TaskConfig.chosen` reads these two
        return ("task", "chosen") in reads
    return bool({(owner.rpartition(".")[2], leaf), ("settings", leaf)} & reads)


def test_every_count_has_a_unit():
    counts = [each for each in describe_keys() if each.type in (int, int | None)]
    assert [each.name for each in counts if not each.unit] == ["training.seed", "evaluation.seed"]
    assert len(counts) > 15


def imported(path: Path) -> set[Path]:
    """A script with every module of the package that it imports, or that these import; not the schema itself."""
    found, left = {path}, [path]
    while left:
        for node in ast.walk(ast.parse(left.pop().read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pi0"):
                place = ROOT / node.module.replace(".", "/")
                modules = [place.with_suffix(".py"), place / "__init__.py"]
                new = {each for each in modules if each.exists()} - found - {ROOT / "pi0/ript/config.py"}
                found |= new
                left += new
    return found


def test_a_key_is_read_from_the_stage_on_that_it_names_and_in_no_earlier_one():
    scripts = {int(path.name[:2]): path for path in ROOT.glob("[01]?_train_*.py")}
    reads = {
        stage: set().union(*(reads_of(path.read_text()) for path in imported(script)))
        for stage, script in scripts.items()
    }
    assert sorted(reads) == list(range(8, 14))
    first, expected = {}, {}
    for description in describe_keys():
        stages = [stage for stage in sorted(reads) if is_read(description.name, reads[stage])]
        assert stages == list(range(stages[0], 14)), f"{description.name} is read in {stages} alone"
        first[description.name] = stages[0]
        expected[description.name] = description.since or 8
    assert first == expected | {"profile": 9}, "stage 08 reads no file"


def test_every_key_is_read_somewhere():
    # The schema itself and the doctor's checks are not what a key is for.
    others = {ROOT / "pi0" / "ript" / "config.py", ROOT / "pi0" / "doctor.py"}
    scripts = [path for path in ROOT.glob("*.py") if re.match(r"\d\d_", path.name)]
    sources = [path for path in [*scripts, *ROOT.glob("pi0/**/*.py")] if path not in others]
    reads = set().union(*(reads_of(path.read_text()) for path in sources))
    assert [each.name for each in describe_keys() if not is_read(each.name, reads)] == []
