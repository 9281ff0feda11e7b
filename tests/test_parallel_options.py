"""Options of `pi0.parallel`: what they are called, what is refused, and what the advanced ones do."""

import math
import os
import re
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from pi0.base import typed_yaml
from pi0.base.errors import InputError
from pi0.base.paths import REPO_ROOT
from pi0.base.typed_yaml import ConfigError
from pi0.parallel import machine_load
from pi0.parallel import trainer as trainer_module
from pi0.parallel.actor import new_stream, stream_seed
from pi0.parallel.collected import Progress
from pi0.parallel.collector import Collector, SerialCollector, require_distinct
from pi0.parallel.config import Config, load_config, make_config
from pi0.parallel.games import GameSpec
from pi0.parallel.machine_load import require_memory, workers_for
from pi0.parallel.metrics import METRICS
from pi0.parallel.policy import log_probabilities, shapes
from pi0.parallel.shares import priorities
from pi0.parallel.slices import Layout
from pi0.parallel.train_parallel import parse_arguments
from pi0.parallel.worker import PlayerSpec

DOT = "tests.support.games:Dot-v0"


# The command line -----------------------------------------------------------------------------------------


def changed(*arguments: str) -> dict:
    """What a command line changes of the defaults."""
    config, _ = parse_arguments(list(arguments))
    return {name: value for name, value in vars(config).items() if value != getattr(Config(), name)}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--save_interval", "5", "--max-checkpoints=200"], {"save_interval": 5, "max_checkpoints": 200}),
        (["--n-workers", "4"], {"n_workers": 4}),
        (["--exploration", "0.3,0.1"], {"exploration": [0.3, 0.1]}),
        (["--exploration", "0.3"], {"exploration": [0.3]}),
        (["--exploration", "[0.3, 0.1]"], {"exploration": [0.3, 0.1]}),
        (["--workers-schedule", "8,4"], {"workers_schedule": [8, 4]}),
        (
            ["--game_options", "names=[1,2]", "--game_options", 'more={"task": 3}'],
            {"game_options": ["names=[1,2]", 'more={"task": 3}']},
        ),
        (["--state", "1"], {"state": "1"}),
        (["--workers", "0"], {"workers": "0"}),
        (["--workers", "auto"], {"workers": "auto"}),
        (["--render"], {"render": True}),
        (["--render", "--priority", "true"], {"render": True, "priority": True}),
        (["--render", "false"], {}),
        (["--nice", "10", "--mode", "sync"], {"nice": 10, "mode": "sync"}),
        (["--nice", "null"], {}),
        (["--state", "Level1"], {"state": "Level1"}),
        (["--game", "ALE/Pong-v5"], {"game": "ALE/Pong-v5"}),
        (["--game", DOT], {"game": DOT}),
        (["--lr", "1e-4"], {"lr": 1e-4}),
        (["--exp_name", "1"], {"exp_name": "1"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_key_is_an_option(arguments, expected):
    assert changed(*arguments) == expected


def test_keys_of_a_section_are_options_too():
    for option in ("--logging.use_wandb", "--logging.use-wandb"):
        config, _ = parse_arguments([option, "false"])
        assert not config.logging.use_wandb


def test_no_option_is_the_default_configuration_and_no_run_is_resumed():
    assert parse_arguments([]) == (Config(), "")
    assert parse_arguments(["--resume"])[1] == "newest"
    assert parse_arguments(["--resume", "outputs/run"])[1] == "outputs/run"


def test_options_win_over_the_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("n_workers: 3\nexploration: [0.2]\nclip: 0.3\n")
    assert changed("--config_path", str(file), "--n_workers", "5") == {
        "n_workers": 5,
        "exploration": [0.2],
        "clip": 0.3,
    }


def test_help_names_every_key(capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert [each.name for each in typed_yaml.describe_keys(Config) if f"  {each.name}: " not in text] == []


@pytest.mark.parametrize("option", ["--savinterval", "--save", "--n_worker"])
def test_an_option_that_is_none_is_refused(option, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments([option, "3"])
    assert ended.value.code == 2
    assert f"there is no option {option}; the nearest one is --" in capsys.readouterr().err


# What is refused ------------------------------------------------------------------------------------------


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("seed", "-1", "must be 0 or more"),
        ("seed", "1.5", "expected int"),
        ("nice", "20", "must be 19 or less"),
        ("exploration", "0.3,1.3", "must be 1 or less"),
        ("exploration", "some", "expected list of float"),
        ("exploration", "0.3,0.2,0.1", "expected one share, or one for the upper and one for the lower half"),
        ("render", "maybe", "expected bool"),
        ("mode", "asynch", "expected sync or overlap or async"),
        ("clip", "0", "must be above 0"),
        ("skip", "0", "must be 1 or more"),
        ("workers", "few", "expected each, auto or a number"),
        ("workers", "-1", "expected each, auto or a number"),
        ("update_interval", "15", "8 workers need 16 transitions or more, 2 each"),
        ("workers_schedule", "16,4", "n_workers must be its greatest number, 16"),
        ("exp_name", "a/b", "one name without /"),
    ],
)
def test_a_wrong_value_is_one_line_with_the_options_name(option, value, why):
    error = refusal(lambda: parse_arguments([f"--{option}", value]))
    assert option in error
    assert why in error


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"workers": "0", "mode": "async"}, "workers = 0 collects and learns in turns"),
        ({"priority": True, "mode": "async"}, "mode = async: workers_schedule and priority need"),
        ({"workers_schedule": [8, 4], "mode": "async"}, "mode = async: workers_schedule and priority need"),
    ],
)
def test_values_that_contradict_each_other_are_one_line(values, why):
    assert why in refusal(lambda: make_config(**values))


def test_several_mistakes_are_a_line_each():
    with pytest.raises(ConfigError) as error:
        make_config(workers="some", exploration=[0.1] * 3, update_interval=4)
    lines = str(error.value).splitlines()
    assert [line.partition(" ")[0].rstrip(":") for line in lines] == [
        "workers",
        "exploration",
        "update_interval",
    ]


@pytest.mark.tried(
    "A key of the YAML file of `pi0.parallel` is misspelt",
    "An error with the file, the line, the key and the nearest one",
)
def test_a_misspelt_key_is_an_error_with_the_nearest_one(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("n_workers: 3\nsave_intervall: 5\n")
    error = refusal(lambda: load_config(file, []))
    assert f"{file}:2" in error
    assert "save_intervall" in error
    assert re.search(r"\bsave_interval\b", error)


def test_workers_whom_the_schedule_never_asks_are_refused():
    assert "n_workers must be its greatest number, 4" in refusal(
        lambda: make_config(n_workers=8, workers_schedule=[4, 2])
    )


# How many workers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "free_mb", "workers"),
    [
        (0, 64_000, 8),
        (49.9, 64_000, 8),
        (50, 64_000, 4),
        (79.9, 64_000, 4),
        (80, 64_000, 2),
        (100, 64_000, 2),
        (0, 900 + 8 * 150, 8),
        (0, 900 + 8 * 150 - 1, 4),
        (60, 900 + 4 * 150 - 1, 2),
        (0, 900 + 4 * 150 - 1, 2),
        (0, 100, 2),  # `require_memory` refuses it
    ],
)
def test_workers_auto_are_8_or_4_or_2_by_load_and_fewer_with_little_memory(load, free_mb, workers):
    assert workers_for(load, free_mb) == workers


def test_auto_measures_this_machine_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(machine_load.CpuMeter, "percent", lambda self: 63.2)
    monkeypatch.setattr(machine_load, "memory_mb", lambda: (32_000.0, 64_000.0))
    monkeypatch.setattr(machine_load.time, "sleep", lambda seconds: None)
    config = trainer_module._resolve_workers(make_config(workers="auto"))
    assert (config.n_workers, config.workers) == (4, "each")
    assert capsys.readouterr().out == "workers = auto: 4 workers, since other programs use 63% of the CPU\n"


def test_a_number_of_workers_is_n_workers_and_0_keeps_all_of_them_in_this_process():
    for workers, expected in (("3", (3, "each")), ("each", (8, "each")), ("0", (8, "0"))):
        config = trainer_module._resolve_workers(make_config(workers=workers))
        assert (config.n_workers, config.workers) == expected


def test_the_load_is_the_share_of_the_cores_that_was_busy_since_it_was_last_asked(monkeypatch):
    times = iter([(100.0, 1000.0), (130.0, 1040.0), (130.0, 1050.0)])
    monkeypatch.setattr(machine_load, "cpu_times", lambda: next(times))
    meter = machine_load.CpuMeter()
    assert (meter.percent(), meter.percent()) == (75.0, 0.0)


def test_this_machines_numbers_are_sane():
    busy, there = machine_load.cpu_times()
    assert 0 < busy < there
    free, total = machine_load.memory_mb()
    assert 0 < free <= total
    assert 0 <= machine_load.memory_percent() < 100


@pytest.mark.tried(
    "The memory is too little for so many workers",
    "An error before anything is started: what is needed, what is free, how many workers fit",
)
@pytest.mark.parametrize(
    ("free", "text"),
    [
        (
            1100.0,
            "about 2100 MB are needed, 1100 MB are free, which is enough for 1; start with --n_workers 1",
        ),
        (500.0, "about 2100 MB are needed, 500 MB are free, which is enough for 0; end other programs"),
    ],
)
def test_too_little_memory_is_said_before_workers_are_started(monkeypatch, free, text):
    monkeypatch.setattr(machine_load, "memory_mb", lambda: (free, 8000.0))
    with pytest.raises(InputError) as error:
        require_memory(8)
    assert str(error.value) == f"too little memory for 8 workers: {text}"
    with pytest.raises(InputError, match="too little memory for 8 workers"):
        trainer_module._resolve_workers(make_config())
    require_memory(1 if free > 1000 else -3)


# Who collects how much ------------------------------------------------------------------------------------


def test_shares_are_from_a_half_to_two_with_mean_1_and_better_workers_have_more():
    random = np.random.default_rng(0)
    for workers in (2, 3, 5, 8, 16):
        for scale in (0.1, 1.0, 300.0):
            means = random.normal(0, scale, workers) ** 3
            scores = [(n, float(mean + noise)) for n, mean in enumerate(means) for noise in (-1, 1)]
            shares = priorities(scores, workers)
            assert shares.min() >= 0.5
            assert shares.max() <= 2.0
            assert shares.mean() == pytest.approx(1, abs=1e-6)
            assert (np.diff(shares[np.argsort(means)]) >= 0).all()
            assert shares[means.argmax()] > shares[means.argmin()]


def test_without_scores_or_differences_all_have_the_same_share():
    assert priorities([], 3).tolist() == [1, 1, 1]
    assert priorities([(0, 5.0), (1, 5.0), (2, 5.0)], 3).tolist() == [1, 1, 1]
    assert priorities([(2, 5.0)], 3).tolist() == [1, 1, 1], "one score is no difference"


def test_a_worker_without_an_episode_counts_as_the_mean_of_the_others():
    shares = priorities([(0, 0.0), (1, 10.0), (3, 5.0), (9, 1e9)], 4)  # the tenth does not collect any more
    assert shares[2] == shares[3]
    assert shares[0] < shares[2] < shares[1]


def run_of(config: Config, scores=(), step: int = 0, episodes: int = 0) -> trainer_module._Run:
    """A run that has come so far, without processes."""
    run = object.__new__(trainer_module._Run)
    run.config, run.state, run.progress = config, SimpleNamespace(step=step), Progress(config.n_workers)
    run.progress.scores.extend(scores)
    run.progress.episodes = episodes
    return run


SCORES = [(0, 0.0), (1, 10.0), (2, 50.0), (3, 51.0), (4, 100.0)]


@pytest.mark.parametrize("interval", [16, 17, 100, 2047, 2048])
@pytest.mark.parametrize("priority", [False, True])
@pytest.mark.parametrize("schedule", [[], [5, 4, 3, 1]])
def test_the_steps_of_all_workers_are_the_update_interval(interval, priority, schedule):
    settings = {"n_workers": 5, "priority": priority, "workers_schedule": schedule, "max_updates": 8}
    run = run_of(make_config(update_interval=interval, **settings), SCORES)
    for update in range(8):
        lengths = run._lengths(update)
        assert sum(lengths.values()) == interval
        assert list(lengths) == list(range(schedule[update // 2] if schedule else 5))
        assert min(lengths.values()) >= 1
        assert max(lengths.values()) <= trainer_module._longest_slice(run.config)
        if priority and len(lengths) == 5 and interval >= 100:
            assert list(lengths.values()) == sorted(lengths.values())
            assert lengths[4] > 2 * lengths[0]
        elif not priority:
            assert max(lengths.values()) - min(lengths.values()) <= 1


def test_the_smallest_update_has_steps_for_every_worker_whatever_the_scores():
    random = np.random.default_rng(0)
    for workers in (2, 3, 7, 16):
        config = make_config(n_workers=workers, update_interval=2 * workers, priority=True)
        for _ in range(50):
            scores = [(number, float(score)) for number, score in enumerate(random.exponential(1, workers))]
            lengths = run_of(config, scores)._lengths(0)
            assert min(lengths.values()) >= 1
            assert sum(lengths.values()) == 2 * workers


def test_the_parts_of_a_schedule_are_equally_long():
    run = run_of(make_config(n_workers=5, workers_schedule=[5, 3, 1], max_updates=9))
    assert [len(run._lengths(update)) for update in range(9)] == [5, 5, 5, 3, 3, 3, 1, 1, 1]


def test_the_schedule_goes_by_episodes_where_updates_are_not_limited():
    config = make_config(n_workers=8, workers_schedule=[8, 4], max_episodes=100)
    assert [len(run_of(config, episodes=done)._lengths(3)) for done in (0, 49, 50, 99)] == [8, 8, 4, 4]


# Exploration ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 1.0])
def test_log_probabilities_are_those_of_the_mixture_with_uniform_choice(share):
    for scale in (1.0, 10.0, 1000.0):
        logits = np.random.default_rng(0).normal(0, scale, 6).astype(np.float32)
        weights = np.exp(logits.astype(np.longdouble) - logits.max())
        mixture = (1 - share) * weights / weights.sum() + share / 6
        found = log_probabilities(logits, share)
        assert found.dtype == np.float64
        assert np.allclose(np.exp(found), mixture.astype(float), rtol=1e-9, atol=1e-300)
        assert np.exp(found).sum() == pytest.approx(1)
        assert np.isfinite(found).all()


def test_the_upper_half_of_the_workers_has_the_first_share_and_the_lower_the_second():
    run = run_of(make_config(n_workers=5, exploration=[0.3, 0.1]))
    assert [run._exploration(number) for number in range(5)] == [0.3, 0.3, 0.3, 0.1, 0.1]
    run = run_of(make_config(n_workers=2, exploration=[0.2]))
    assert [run._exploration(number) for number in range(2)] == [0.2, 0.2]
    assert run_of(make_config())._exploration(0) == 0.0


def make_player(workers: int = 2, **settings) -> PlayerSpec:
    return PlayerSpec(GameSpec(DOT), Layout(workers, 1, 300, 3), max_steps=50, noop_max=4, **settings)


def test_actions_are_drawn_from_the_mixture_and_its_log_probability_is_kept():
    collector = SerialCollector(make_player(), deadline_s=60)
    sure = np.zeros(sum(map(math.prod, shapes(3).values())), np.float32)
    sure[-513 - 3 :][:3] = [0.0, 8.0, 0.0]  # biases of the actor: action 1, whatever is seen
    collector.publish(sure, 0)
    collector.begin(0, [0, 0])
    for worker, share in enumerate((0.6, 0.0)):
        collector.ask(worker, 0, 300, 0, share)
        collector.next_filled()
    collector.close()
    actions, logs = collector.arrays["actions"][0], collector.arrays["log_probs"][0]
    others = [float(np.mean(actions[worker] != 1)) for worker in range(2)]
    assert others[0] == pytest.approx(0.4, abs=0.1), "two of three uniform choices"
    assert others[1] < 0.02
    assert np.allclose(
        logs[0][actions[0] != 1], np.log(0.4 * np.exp(-8) / (1 + 2 * np.exp(-8)) + 0.2), atol=1e-5
    )
    assert np.allclose(logs[1][actions[1] == 1], -np.log(1 + 2 * np.exp(-8)), atol=1e-5)


# Priority of the processes --------------------------------------------------------------------------------


@pytest.mark.engine
@pytest.mark.parametrize("nice", [0, 10])
def test_nice_reaches_the_processes(nice):
    own = os.getpriority(os.PRIO_PROCESS, 0)
    collector = Collector(make_player(nice=nice), deadline_s=60)
    try:
        collector.begin(0, [0, 0])
        found = [os.getpriority(os.PRIO_PROCESS, process) for process in collector.processes]
    finally:
        collector.close()
    assert found == [min(19, own + nice)] * 2


@pytest.mark.parametrize(
    ("settings", "cores", "nice"),
    [
        ({"mode": "overlap", "n_workers": 8}, 2, 15),
        ({"mode": "async", "n_workers": 8}, 8, 15),
        ({"mode": "overlap", "n_workers": 8}, 9, 0),
        ({"mode": "sync", "n_workers": 8}, 2, 0),
        ({"mode": "overlap", "workers": "0"}, 2, 0),
        ({"mode": "overlap", "nice": 3}, 2, 3),
        ({"mode": "overlap", "nice": 0}, 2, 0),
    ],
)
def test_workers_give_way_to_the_trainer_where_cores_are_few(monkeypatch, settings, cores, nice):
    monkeypatch.setattr(trainer_module, "usable_cores", lambda: cores)
    assert trainer_module._niceness(make_config(**settings)) == nice


def test_the_trainer_takes_the_cores_that_workers_leave(monkeypatch):
    monkeypatch.setattr(trainer_module, "usable_cores", lambda: 16)
    for settings, threads in (
        ({"mode": "overlap"}, 8),
        ({"mode": "sync"}, 16),
        ({"mode": "overlap", "n_workers": 20}, 1),
        ({"mode": "overlap", "workers": "0"}, 8),
    ):
        assert trainer_module._threads(make_config(**settings)) == threads


# Random streams -------------------------------------------------------------------------------------------


def test_no_two_streams_of_1000_runs_with_16_workers_are_alike():
    first = [
        new_stream(seed, worker, generation).integers(2**63, size=2).tolist()
        for seed in range(1000)
        for worker in range(16)
        for generation in ((0, 1) if seed < 50 else (0,))
    ]
    assert len(first) == 1000 * 16 + 50 * 16
    assert len(np.unique(first)) == 2 * len(first)


def test_a_stream_is_that_of_its_seed_worker_and_generation():
    numbers = new_stream(3, 5, 1).random(4)
    assert np.array_equal(numbers, new_stream(3, 5, 1).random(4))
    assert np.array_equal(numbers, np.random.default_rng(np.random.SeedSequence((3, 5, 1))).random(4))
    assert stream_seed(3, 5, 1).entropy == (3, 5, 1)


@pytest.mark.tried(
    "Two workers of `pi0.parallel` have the same random stream",
    "An error with their numbers, before they play",
)
def test_workers_with_the_same_stream_are_refused():
    require_distinct(["a", "b", "c"])
    with pytest.raises(
        InputError, match="workers 1 and 3 have identical random sequences; python -m pi0.par"
    ):
        require_distinct(["a", "b", "c", "b"])
    collector = SerialCollector(make_player(3, one_stream=True), deadline_s=60)
    with pytest.raises(InputError, match="workers 0 and 1 have identical random sequences"):
        collector.begin(0, [0, 0, 0])
    collector.close()


@pytest.mark.parametrize(
    "path", sorted((REPO_ROOT / "configs").glob("parallel*.yaml")), ids=lambda path: path.name
)
def test_every_shipped_configuration_is_valid(path):
    load_config(path, [])


# The pages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["parallel.md", "parallel.zh-CN.md"])
def test_the_pages_describe_every_metric(page):
    text = (REPO_ROOT / "docs" / page).read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\S+)` \| (.+?) \| (.+?) \|$", text.rpartition("\n## ")[2], re.MULTILINE)
    assert [row[0] for row in rows] == [metric.name for metric in METRICS.metrics]
    if page == "parallel.md":
        assert [row[1:] for row in rows] == [
            (metric.unit or "–", metric.meaning) for metric in METRICS.metrics
        ]
