"""Every command in the READMEs, docs, configs and docstrings runs, and both READMEs say the same.

A command's program is run until its own parser has read the arguments as they stand; what they name, such as
configuration files, keys, checkpoints, suites and tasks, is then looked up. Of `make` the recipe is printed, and its
commands are treated alike. So no flag, key, file, script or target can be documented that is not there.

Then it is run to its end, made short by further arguments (`WAYS`): training with torchrun on several ranks or
hosts, too. What a user would have made or come by before (`STAND_INS`) is made by earlier commands. Left out are
those that another test runs as they stand, and those of which even the least takes long or needs what is not here.

A command of a program that has no entry in `WAYS` fails until it has one.
"""

import ast
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tokenize
from collections import ChainMap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from pi0.base.paths import REPO_ROOT
from pi0.data import open_demonstrations
from pi0.libero.suites import find_tasks
from tests.support.ranks import free_port
from tests.support.recordings import write_hdf5

ENGLISH, CHINESE = REPO_ROOT / "README.md", REPO_ROOT / "README.zh-CN.md"
MARKDOWN = [ENGLISH, CHINESE, *sorted(REPO_ROOT.glob("docs/**/*.md"))]
SCRIPTS = [
    *sorted(REPO_ROOT.glob("[01][0-9]_*.py")),
    *sorted(REPO_ROOT.glob("benchmarks/*.py")),
    *sorted(REPO_ROOT.glob("pi0/*.py")),
    *sorted(REPO_ROOT.glob("pi0/*/__main__.py")),
    *sorted(REPO_ROOT.glob("pi0/parallel/t*_parallel.py")),
    REPO_ROOT / "pi0/acrlpd/record.py",
    REPO_ROOT / "pi0/acrlpd/train.py",
    *sorted(REPO_ROOT.glob("tools/*.py")),
]
CONFIGS = sorted(REPO_ROOT.glob("configs/*.yaml"))

SHELL = ("", "sh", "bash", "shell", "console")  # languages of code blocks that hold commands
START = r"(?:\.venv/bin/)?(?:python(?:3\.11)?|torchrun)\s"
COMMAND = re.compile(rf"{START}.*|make(?: .*)?")
MENTION = re.compile(rf"`({START}[^`]*|make(?:\s[^`]*)?)`")

# Commands that stand for several, and one of those.
SPELT_OUT = {
    "python -m pi0.doctor [--config_path FILE] [--override KEY=VALUE ...]": (
        "python -m pi0.doctor --config_path configs/minimal_test.yaml --override algo.lr=2e-5 training.seed=1"
    ),
    "python3.11 tools/setup.py [--torch auto|cpu|cuda] [--browser] [--game] [--upstream] [--peers] [--qc] [--openpi] [--libero-pro]": (
        "python3.11 tools/setup.py --torch cpu --browser --game --upstream --peers --qc --openpi --libero-pro"
    ),
    "torchrun --nproc_per_node=1": (
        "torchrun --nproc_per_node=1 10_train_with_distributed.py --config_path configs/minimal_test.yaml"
    ),
}


class Way(NamedTuple):
    """What becomes of a command whose arguments were read."""

    run: bool  # here
    more: str = ""  # options for it, which take the place of its own of that name; {out} is a new folder
    overrides: str = ""  # further ones, for a command with or without overrides of its own
    copied: bool = False  # run a copy of the script, which writes beside itself
    soak: bool = False  # in `make soak` alone: it takes minutes, or needs the network
    why_not: str = ""  # not run here: the test that runs the program, or what keeps it from being run


def here(more: str = "", overrides: str = "", copied: bool = False, soak: bool = False) -> Way:
    return Way(True, more, overrides, copied, soak)


def elsewhere(test: str) -> Way:
    return Way(False, why_not=f"tests/{test}")


def not_run(reason: str) -> Way:
    return Way(False, why_not=reason)


# What words of commands stand for, by what is put in their place: a run and its policy, a data set, a host.
STAND_INS = {
    "outputs/RUN": "{run}",
    "outputs/RUN/policy": "{run}/policy",
    "outputs/ript-20260102-030405": "{run}",
    "policy_path=outputs/start": "policy_path=checkpoints/pi0_tiny_libero_spatial",
    "outputs/start": "checkpoints/pi0_tiny_libero_spatial",
    "policy_path=/data/pi0_libero": "policy_path=checkpoints/pi0_tiny_libero_spatial",
    "/data/pi0_libero": "checkpoints/pi0_tiny_libero_spatial",
    "algo.cotraining_path=demonstrations": "algo.cotraining_path={demonstrations}",
    "demonstrations": "{demonstrations}",
    "LIBERO/datasets/libero_spatial": "{libero_files}",
    "CHECKPOINT": "checkpoints/pi0_tiny_libero_spatial",
    "FOLDER": "checkpoints/pi0_tiny_libero_spatial",
    "/data/for_openpi": "{out}/converted",
    "/data/for_lerobot": "{out}/converted",
    "OUTPUT": "{out}/converted",
    "outputs/stages.json": "{measured}/stages.json",
    "outputs/rollouts/standins.json": "{measured}/standins.json",
    "outputs/learning": "{measured}/learning_rehearsal",
    "/data/libero_assets": "standins",
    "../libero_assets": "standins",
    "OTHER_CHECKOUT": ".",
    "--rdzv_endpoint=first:29500": "--rdzv_endpoint=127.0.0.1:{port}",
}
# Those that stand for others (`SHOWN_BY`): `MadeBefore` runs the first.
RECORD = "python -m pi0.warmstart --tasks 3 8 --write-dataset demonstrations --output outputs/warmstart"
RESUME = "python 13_train_production_ready.py --config_path configs/quickstart.yaml --resume"
# The shortest episodes: nothing is solved, so there is nothing to learn.
SHORTEST = (
    "task.task_names_to_use=[3] task.max_episode_length=2 task.settle_steps=0 task.num_parallel_envs=1"
    " algo.rloo_batch_size=2 algo.data_batch_size=2 algo.train_init_states=4 algo.max_sampling_attempts=1"
    " evaluation.episodes=1 evaluation.periodic_episodes=0 features.save_video=false"
)
# A training run of one iteration of them. From stage 12 on its statistics need a place; WandB would take seconds.
LEAST = f"output_dir={{out}} training.num_train_steps=1 {SHORTEST}"
LEAST_OF_12 = f"{LEAST} algo.rollout_stats_path={{out}}/stats.json logging.use_wandb=false"
EVALUATED = "--tasks 3 --episodes 1 --max_episode_length 2 --settle_steps 0 --workers 1 --output {out}"
VARIED = "--sample 2 --max_episode_length 2 --settle_steps 0 --workers 1 --output {out}"
CLONED = (
    "--tasks 3 --output {out} --max-minutes 0 --score-every 1 --score-episodes 1 --batch-size 4 --workers 1"
)
LEARNED = "--rehearse --seeds 0 --output {out}/learning --override logging.use_wandb=false"
ROLLOUTS = "--episodes 2 --turns 1 --output {out}"
TINY = "--preset pi0_tiny --shrink 1 --device cpu --repeats 1 --output {out}/pi0.json"
# As little as has something to learn from: cut off in the middle, not all episodes are solved.
LEARNS = (
    "algo.data_batch_size=4 algo.rloo_batch_size=4 task.task_names_to_use=[3] task.max_episode_length=105"
    " evaluation.episodes=1 algo.train_init_states=8 task.num_parallel_envs=1"
)
TRAINS = (
    f"output_dir={{out}} training.num_train_steps=1 evaluation.periodic_episodes=0 features.save_video=false"
    f" algo.enable_dynamic_sampling=true algo.max_sampling_attempts=8 {LEARNS}"
)
# Into a folder of its own, which ends with what a user is promised.
QUICKSTART = TRAINS.replace("features.save_video=false", "features.save_video=true")
PLAYS = (
    "--game Airstriker-Genesis-v0 --n_workers 2 --update_interval 32 --max_updates 1 --evaluation_episodes 1"
    " --max_steps 20 --logging.use_wandb false --output_dir {out}"
)
STAGES = f"--stages 08 13 two --iterations 1 --output {{out}}/stages.json --override {LEARNS}"

# By the beginning of a command, without what starts Python; the longest that fits counts.
WAYS = {
    "make setup": here(),
    "make quickstart": here(overrides=QUICKSTART),
    "make suites": not_run("makes committed policies in half an hour; the recipe's commands are looked at"),
    "make suite": here(overrides=LEAST_OF_12, soak=True),  # the same as quickstart, with other tasks
    "make resume": here(overrides=QUICKSTART.replace("num_train_steps=1", "num_train_steps=2")),
    "make upstream": here(soak=True),  # from the package registry, if .venv-upstream is not there
    "make game": here(),
    "make game peers": here(soak=True),
    "make peers": here(soak=True),  # from the package registry, if .venv-peers is not there
    "make libero-pro": here(),
    "make libero-plus": here(),
    "make lerobot": not_run("needs a Python 3.12 and 5 GB; test_lerobot_plugin.py runs in what it makes"),
    "make qc": here(soak=True),  # from the package registry, if .venv-qc is not there
    "make quickstart-game": elsewhere("test_parallel_runs.py"),
    "make quickstart-critic": elsewhere("test_acrlpd_runs.py"),
    "make resume-critic": elsewhere("test_acrlpd_runs.py"),
    "make resume-game": elsewhere("test_parallel_runs.py"),
    "make check": not_run("runs these tests; the recipe's commands are looked at"),
    "make test": not_run("runs these tests; the recipe's commands are looked at"),
    "make soak": not_run("runs these tests; the recipe's commands are looked at"),
    "tools/check_upstream.py": not_run("make upstream runs it; needs LeRobot or openpi, of other versions"),
    "tools/setup.py": not_run("installs packages"),
    "08_train_with_epochs.py": elsewhere("test_stages.py"),
    "09_train_with_config.py": here(overrides=TRAINS),
    "10_train_with_distributed.py": here(overrides=TRAINS),
    "10_train_with_distributed.py --config_path configs/minimal_test.yaml": here(overrides=LEAST),
    "11_train_with_logging.py": here(overrides=TRAINS),
    "12_train_with_dataset.py": here(overrides=TRAINS),
    "12_train_with_dataset.py --config_path configs/stage12_libero10.yaml": here(overrides=LEAST_OF_12),
    "13_train_production_ready.py": here(overrides=f"{TRAINS} compile=false"),
    "13_train_production_ready.py --config_path configs/quickstart.yaml --override policy_path=outputs/start": here(
        overrides=LEAST_OF_12.replace("=[3]", "=[0]")
    ),
    "13_train_production_ready.py --config_path configs/quickstart.yaml --resume": here(
        overrides=LEAST_OF_12.replace("num_train_steps=1", "num_train_steps=2")
    ),
    "13_train_production_ready.py --config_path configs/stage12_libero10.yaml": here(overrides=LEAST_OF_12),
    # Their starts do not solve task 3 in the episodes of LEARNS.
    "13_train_production_ready.py --config_path configs/suite_10.yaml": here(overrides=LEAST_OF_12),
    "13_train_production_ready.py --config_path configs/suite_goal.yaml": here(overrides=LEAST_OF_12),
    "13_train_production_ready.py --config_path configs/suite_object.yaml": here(overrides=LEAST_OF_12),
    "13_train_production_ready.py --config_path configs/suite_spatial.yaml": here(overrides=LEAST_OF_12),
    "13_train_production_ready.py --help": here(),
    "pi0.report": here(),
    "pi0.stages": here(),
    "pi0.stages pages": elsewhere("test_stage_pages.py"),
    "pi0.tokenizer": here("--output {out}/vocabulary.json"),
    "pi0.doctor": elsewhere("test_doctor.py"),
    "pi0.doctor --config_path configs/quickstart.yaml": here(),
    "pi0.checkpoint": here(),
    "pi0.checkpoint inspect FOLDER": elsewhere("test_published_checkpoints.py"),
    "pi0.checkpoint convert outputs/RUN/policy /data/for_lerobot": elsewhere("test_published_checkpoints.py"),
    "pi0.checkpoint convert FOLDER OUTPUT --cameras": elsewhere("test_published_checkpoints.py"),
    "pi0.checkpoint convert FOLDER OUTPUT --layout": elsewhere("test_published_checkpoints.py"),
    "pi0.norm_stats": here("--tasks 3 --demonstrations 1 --output {out}/stats.json"),
    "pi0.evaluate": here(EVALUATED),
    "pi0.evaluate --policy_path checkpoints/pi0_tiny_libero_spatial --suite libero_plus/spatial": here(
        VARIED
    ),
    "pi0.evaluate --policy_path outputs/start --suite examples/breakfast/": here(
        EVALUATED.replace("--tasks 3", "--tasks 0")
    ),
    "pi0.evaluate --server": elsewhere("test_serving.py"),
    "pi0.serve": elsewhere("test_serving.py"),
    "pi0": elsewhere("test_installing.py"),
    "pi0.warmstart --suite examples/breakfast/": here(
        f"{CLONED} --demonstrations 1 --frame-every 9".replace("--tasks 3", "--tasks 0")
    ),
    "pi0.warmstart": here(f"{CLONED} --demonstrations 1 --frame-every 9"),
    "pi0.warmstart --tasks 3 8 --output outputs/warmstart --dataset demonstrations": here(CLONED),
    "pi0.warmstart --tasks 3 8 --dataset demonstrations": here(CLONED),
    "pi0.warmstart --tasks 3 8 --write-dataset demonstrations": not_run("runs for what the others read"),
    "pi0.warmstart --tasks 3 8 --dataset LIBERO/datasets/libero_spatial": here(CLONED),
    "pi0.parallel.train_parallel": here(PLAYS),
    "pi0.parallel.train_parallel --resume": here(f"{PLAYS} --max_updates 2 --save_interval 1"),
    "pi0.parallel.train_parallel --help": here(),
    "pi0.parallel.test_parallel": here("--n_workers 2 --steps 20"),
    "pi0.parallel.test_parallel --seed-bug": elsewhere("test_parallel_runs.py"),
    "pi0.acrlpd.record": here(
        "--tasks 3 --rollouts 1 --init_states 1 --max_episode_length 2 --settle_steps 0 --workers 1"
        " --output {out}/recorded"
    ),
    "pi0.acrlpd.train --list": here(),
    "pi0.acrlpd.train --config acrlpd_debug": here("--override output_dir={out}"),
    "pi0.acrlpd.train --config acrlpd_debug --override training.fsdp_size=2": elsewhere(
        "test_acrlpd_ranks.py"
    ),
    "pi0.acrlpd.train --config acrlpd_pi0_libero": not_run("needs a policy of full size and GPUs"),
    "pi0.acrlpd.train --config acrlpd_quickstart": elsewhere("test_acrlpd_runs.py"),
    "pi0.acrlpd.train --config_path configs/acrlpd_quickstart.yaml": elsewhere("test_acrlpd_runs.py"),
    "pi0.evaluate --policy_path checkpoints/pi0_tiny_libero_spatial --tasks 3 8 --critic_path": elsewhere(
        "test_acrlpd_runs.py"
    ),
    "pi0.evaluate --policy_path checkpoints/suite_spatial --tasks 9 --episodes 50 --assets standins --critic_path": elsewhere(
        "test_acrlpd_runs.py"
    ),
    "13_train_production_ready.py --config_path configs/quickstart.yaml --override algo.critic_path=outputs/RUN/critic": elsewhere(
        "test_ript_critic.py"
    ),
    "tools/mutations.py": here("--only base"),
    "tools/reliability.py": here(),
    "benchmarks/acrlpd.py": here("--parts memory --output {out}/acrlpd.json"),
    "benchmarks/acrlpd.py --parts update": here(
        "--parts update --turns 1 --episodes 2 --output {out}/acrlpd.json", soak=True
    ),
    "benchmarks/acrlpd.py --table": here(),
    "benchmarks/acrlpd_learning.py": here(
        "--runs critics --seeds 0 --rehearse --output {out}/learning", soak=True
    ),
    "benchmarks/acrlpd_learning.py --table": here("--picture {out}/curves.png"),
    "benchmarks/checkpoint.py": here("--shrink 8 --steps 1 --folder {out}"),
    "benchmarks/deciding_chunks.py": here("--episodes 12"),
    "benchmarks/few_demonstrations.py": here(
        "--demonstrations 1 --seeds 0 --rehearse --output {out}/few", soak=True
    ),
    "benchmarks/few_demonstrations.py --table": not_run("prints what finished runs have written"),
    "benchmarks/generalise.py": here(
        "--start checkpoints/suite_goal --practised checkpoints/suite_goal --rehearse --changes none"
        " --output {out}/generalise",
        soak=True,
    ),
    "benchmarks/generalise.py --table": not_run("prints what finished scores have written"),
    "benchmarks/held_out_loss.py": here("--episodes 4 --draws 1"),
    "benchmarks/identity.py": here("--suites libero_spatial --tasks 3 --steps 20"),
    "benchmarks/learning.py": here(LEARNED),
    "benchmarks/learning.py --runs weighted --seeds 0 1 2": here(f"{LEARNED} {SHORTEST}"),
    "benchmarks/learning.py --runs weighted --seeds 0 --config_path": here(f"{LEARNED} {SHORTEST}"),
    # Without the critic, which takes long to learn: test_ript_critic.py has a run with one.
    "benchmarks/learning.py --runs critic --seeds 0 --config_path": here(
        f"--runs short {LEARNED} {SHORTEST}"
    ),
    # All four kinds, of which the others are run by themselves.
    "benchmarks/learning.py --runs weighted guidance shuffled cloning": here(f"--runs weighted {LEARNED}"),
    "benchmarks/learning.py --runs critic_short critic critic_always short weighted": here(
        f"--runs short {LEARNED}"
    ),
    "benchmarks/learning.py --runs ratio --seeds 0 1 2": here(f"{LEARNED} {SHORTEST}"),
    "benchmarks/learning.py --table": here(),
    "benchmarks/pictures.py": here(copied=True),
    "benchmarks/states.py": here(),
    "benchmarks/rollout_cost.py": here("--tables profile --episodes 1"),
    "benchmarks/pi0.py": here(TINY),
    "benchmarks/pi0.py --preset pi0_tiny": here(
        f"{TINY} --dtypes float32 --batches 1 --steps 1 --trainable all"
    ),
    "benchmarks/pi0.py --shrink 4": here(f"{TINY} --dtypes float32 --batches 1 --steps 1 --trainable lora"),
    "benchmarks/pi0.py --shrink 4 --dtypes": here(TINY),
    "benchmarks/pi0.py --shrink 8 --tables model": here(
        "--dtypes float32 --batches 1 --repeats 1 --output {out}/pi0.json"
    ),
    "benchmarks/pi0.py --device cuda": here(f"{TINY} --steps 1 --trainable all"),
    "benchmarks/pi0.py --tables sampling sharing --compile": here(
        f"{TINY} --dtypes float32 --batches 1 --steps 1"
    ),
    "benchmarks/neighbour.py": here(
        "--turns 1 --seconds 0.1 --tries 1 --settings libraries project --output {out}/neighbour.json",
        soak=True,
    ),
    # The other trainers are in .venv-peers, which only `make peers` makes.
    "benchmarks/parallel.py": here(
        "--part scaling --turns 1 --updates 1 --workers 1 --output {out}/parallel.json", soak=True
    ),
    "benchmarks/parallel.py --table": not_run("prints what a whole measurement has written"),
    "benchmarks/parallel_learning.py": here(
        "--runs overlap --seeds 0 --minutes 0.1 --episodes 2 --output {out}/learning", soak=True
    ),
    "benchmarks/parallel_learning.py --table": here("--picture {out}/curves.png"),
    "benchmarks/qc.py": not_run("needs qc's repository, which is no part of this project"),
    "benchmarks/qc.py --table": here(),
    "benchmarks/run_memory.py": here(),
    "benchmarks/stage13_parts.py": here(
        f"--iterations 3 --turns 2 --override {LEARNS} algo.num_epochs=1 algo.noise_samples=1 logging.use_wandb=false"
    ),
    "benchmarks/serve.py": here("--clients 1 2 --seconds 0.2 --turns 1"),
    "benchmarks/stages.py": here(STAGES),
    "benchmarks/stages.py --iterations": here(
        f"--stages 13 --iterations 1 --output {{out}}/stages.json --override {SHORTEST} logging.use_wandb=false"
    ),
    "benchmarks/stages.py --table": here(),
    "benchmarks/rollouts.py": here(ROLLOUTS),
    "benchmarks/rollouts.py --episodes": here(f"--figures small {ROLLOUTS}"),
    "benchmarks/rollouts.py --episodes 12": here(f"--figures start {ROLLOUTS}"),
    "benchmarks/rollouts.py --table": here(),
}


@dataclass(frozen=True)
class Command:
    """A documented command, without its comment."""

    text: str
    place: str  # the file that says it
    mention: bool = False  # in running text, where arguments may be left out

    @property
    def words(self) -> list[str]:
        launcher, *words = shlex.split(SPELT_OUT.get(self.text, self.text))
        return [Path(launcher).name, *words]

    @property
    def program(self) -> str:
        """A script, a module, or "make"."""
        launcher, *words = self.words
        if launcher == "make":
            return launcher
        if launcher == "torchrun" and "-m" in words:
            return words[words.index("-m") + 1]
        if launcher == "torchrun":
            return next((word for word in words if word.endswith(".py")), words[-1])
        return words[1] if words[0] == "-m" else words[0]

    @property
    def arguments(self) -> list[str]:
        """The program's own."""
        return self.words[self.words.index(self.program) + 1 :]

    @property
    def file(self) -> Path:
        if self.program.endswith(".py"):
            return REPO_ROOT / self.program
        module = REPO_ROOT / self.program.replace(".", "/")
        return module / "__main__.py" if module.is_dir() else module.with_suffix(".py")

    @property
    def way(self) -> Way | None:
        """How it is tried, if that is known."""
        said = shlex.join([self.program, *self.arguments])
        return WAYS.get(max((name for name in WAYS if fits(name, said)), key=len, default=""))


def fits(beginning: str, said: str) -> bool:
    return f"{said} ".startswith(f"{beginning} ")


# What is documented.


def code_blocks(text: str) -> Iterator[tuple[str, str]]:
    """Language and content of every fenced block."""
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield match[1], match[2]


def without_code_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def one_line_each(text: str) -> str:
    """Commands that go on behind a backslash in one line."""
    return re.sub(r" *\\\n\s*", " ", text)


def commands_of(lines: str, place: str) -> Iterator[Command]:
    """The lines that are commands."""
    for line in map(str.strip, one_line_each(lines).splitlines()):
        if COMMAND.fullmatch(line):
            if place == "pi0/stages/__main__.py":  # says what a command does behind a gap, as help texts do
                line = re.split(r" {2,}(?! |-)", line)[0]
            yield Command(re.split(r"\s+#", line)[0], place)


def mentions_of(text: str, place: str) -> Iterator[Command]:
    """Commands in running text."""
    for span in MENTION.findall(text):
        yield Command(" ".join(span.split()), place, mention=True)


def indented(text: str) -> str:
    return "\n".join(re.findall(r"^(?: {4}|\t).*$", text, re.MULTILINE))


def docstring(source: str) -> str:
    """The module's, as it is written: a backslash at a line's end would be gone from its value."""
    first = ast.parse(source).body[0]
    if not isinstance(first, ast.Expr):
        return ""
    return ast.get_source_segment(source, first) or ""


def help_texts(source: str) -> str:
    """Texts of several lines in the code, such as those of `--help`."""
    texts = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    return "\n".join(text for text in texts if isinstance(text, str) and "\n" in text)


def documented() -> Iterator[Command]:
    for path in MARKDOWN:
        place, text = str(path.relative_to(REPO_ROOT)), path.read_text(encoding="utf-8")
        for language, block in code_blocks(text):
            if language in SHELL:
                yield from commands_of(block, place)
        text = without_code_blocks(text)
        yield from commands_of(indented(text), place)
        yield from mentions_of(text, place)
    for path in SCRIPTS:
        source = path.read_text(encoding="utf-8")
        place, text = str(path.relative_to(REPO_ROOT)), docstring(source)
        yield from commands_of(indented(text), place)
        yield from mentions_of(text, place)
        yield from commands_of(indented(help_texts(source.replace(text, "", 1))), place)
    for path in CONFIGS:
        comments = re.findall(r"^#(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        yield from commands_of("\n".join(comments), str(path.relative_to(REPO_ROOT)))


def distinct(commands: Iterator[Command]) -> list[Command]:
    """Each once; what is a whole command anywhere is one everywhere."""
    found: dict[str, Command] = {}
    for command in commands:
        if command.text not in found or found[command.text].mention:
            found[command.text] = command
    return list(found.values())


COMMANDS = distinct(documented())
each_command = pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.text)


# Processes.


class Outcome(NamedTuple):
    code: int
    output: str


def python(words: list[str], seconds: int = 500) -> Outcome:
    """`python words`."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=REPO_ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", check=False, timeout=seconds,
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout)


def read_arguments(words: list[str]) -> Outcome:
    """`python words`, or from `torchrun` on, until the arguments are read and what they name was looked up."""
    return python(["tests/support/read_arguments.py", json.dumps(list(STAND_INS)), *words], 60)


def environment() -> dict[str, str]:
    """The environment of a process that finds the package; torchrun looks beside the script alone."""
    return {**os.environ, "PYTHONPATH": str(REPO_ROOT), "OMP_NUM_THREADS": "1"}


class MadeBefore(dict):
    """What `STAND_INS` names, made by documented commands when it is first needed.

    A run of several iterations, a data set, LIBERO's files, measurements.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def __missing__(self, name: str) -> Path:
        self[name] = getattr(self, name)()
        return self[name]

    def run(self) -> Path:
        train = documented_words("python 13_train_production_ready.py --config_path configs/quickstart.yaml")
        overrides = LEAST_OF_12.format(out=self.folder / "runs").replace(
            "num_train_steps=1", "num_train_steps=5"
        )
        self._do(with_overrides(train, shlex.split(overrides)))
        (results,) = (self.folder / "runs").glob("*/results.json")
        return results.parent

    def demonstrations(self) -> Path:
        record = documented_words(RECORD)
        folder = self.folder / "demonstrations"
        words = [str(folder) if word == "demonstrations" else word for word in record]
        more = CLONED.format(out=self.folder / "warmstart") + " --demonstrations 1 --frame-every 9"
        self._do(with_options(words, shlex.split(more)))
        return folder

    def libero_files(self) -> Path:
        folder = self.folder / "libero_spatial"
        folder.mkdir()
        (recorded,) = open_demonstrations(self["demonstrations"])
        (task,) = find_tasks("libero_spatial", [3])
        write_hdf5(folder / f"{task.name}_demo.hdf5", {"demo_0": recorded}, instruction=task.prompt)
        return folder

    def measured(self) -> Path:
        folder = self.folder / "measured"
        measurements = {"stages": STAGES, "rollouts": f"--figures small {ROLLOUTS}", "learning": LEARNED}
        for script, least in measurements.items():
            self._do([f"benchmarks/{script}.py", *shlex.split(least.format(out=folder))])
        return folder

    def _do(self, words: list[str]) -> None:
        outcome = python(words)
        assert outcome.code == 0, outcome.output[-3000:]


def documented_words(text: str) -> list[str]:
    """What comes after `python` in a command that is documented as it stands here."""
    assert text in [command.text for command in COMMANDS]
    return shlex.split(text)[1:]


@pytest.fixture(scope="module")
def made_before(tmp_path_factory):
    return MadeBefore(tmp_path_factory.mktemp("made"))


# Commands.


def test_there_are_commands_in_every_kind_of_place():
    places = {command.place for command in documented()}
    for place in (
        "README.md", "README.zh-CN.md", "docs/distributed.md", "docs/results.md", "docs/stages/10.md",
        "13_train_production_ready.py", "benchmarks/rollouts.py", "pi0/stages/__main__.py", "tools/setup.py",
        "configs/quickstart.yaml",
    ):  # fmt: skip
        assert place in places


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: path.relative_to(REPO_ROOT))
def test_blocks_of_commands_hold_nothing_that_is_not_tried(path):
    for language, block in code_blocks(path.read_text(encoding="utf-8")):
        if language in SHELL:
            lines = [line.strip() for line in one_line_each(block).splitlines() if line.strip()]
            assert [line for line in lines if not COMMAND.fullmatch(line)] == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.relative_to(REPO_ROOT))
def test_commands_in_a_docstring_are_indented_and_so_found(path):
    lines = docstring(path.read_text(encoding="utf-8")).splitlines()
    assert [line for line in lines if COMMAND.fullmatch(line)] == []


@each_command
def test_it_is_known_how_to_try_it(command):
    assert command.way, f"{command.place}: WAYS does not know {command.program}"


@pytest.mark.runs
@each_command
def test_its_program_takes_the_arguments_as_they_stand(command):
    if command.program == "make":
        for recipe in recipes(command):
            check_arguments(recipe)
    else:
        check_arguments(command)


def recipes(command: Command) -> list[Command]:
    """The commands of this project that `make` would run."""
    outcome = make("-n", *command.arguments)
    assert outcome.code == 0, f"{command.place}: {outcome.output}"
    # Said of a file or folder that happens to have the name.
    assert "Nothing to be done" not in outcome.output, f"{command.place}: {outcome.output}"
    found = re.findall(r"python[\d.]*\"? ((?:-m pi0\.|\S+\.py)[^;&|\n]*)", outcome.output)
    return [Command(f"python {words}", "Makefile") for words in found]


def make(*words: str) -> Outcome:
    """`make words`, as if no other make were running."""
    done = subprocess.run(
        ["make", *words],
        cwd=REPO_ROOT, env=outside_make(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False, timeout=500,
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout)


def check_arguments(command: Command) -> None:
    assert command.file.is_file(), f"{command.place}: there is no {command.program}"
    if command.mention and not command.arguments:
        return
    if "ArgumentParser" not in command.file.read_text(encoding="utf-8"):
        assert command.arguments == [], f"{command.place}: {command.program} takes no arguments"
        return
    launcher, *words = command.words
    outcome = read_arguments(command.words if launcher == "torchrun" else words)
    assert outcome.code == 0, f"{command.place}: {command.text}\n{outcome.output[-3000:]}"


# Another course than without them.
MODES = ("--resume", "--dataset", "--help", "--nnodes=2")


def mode(command: Command) -> tuple[str, ...]:
    """What a run of the command shows: its program, started so, on one of its courses. Benchmarks and tools have one."""
    if command.program.startswith(("benchmarks/", "tools/")):
        return (command.program,)
    starter = command.words[0] if command.words[0] in ("torchrun", "make") else "python"
    course = [word for word in command.arguments[:1] if word.isalpha()]
    return (starter, command.program, *course, *(flag for flag in MODES if flag in command.words))


# Modes that another documented command shows in `make test`. Of make resume it leaves the Ctrl+C before it to `make
# soak`; tests/test_production_stage.py sends that without make.
SHOWN_BY = {
    ("python", "13_train_production_ready.py"): "make quickstart",
    ("make", "make", "resume"): RESUME,
    ("python", "pi0.warmstart"): RECORD,
}


def processes(command: Command) -> int:
    return max([1, *(int(word.partition("=")[2]) for word in command.words if "--nproc_per_node=" in word)])


def runs_of_commands() -> Iterator:
    """Every command that is run here: of each mode one in `make test`, the others in `make soak`."""
    commands = [
        command
        for command in COMMANDS
        if command.way and command.way.run and (command.arguments or not command.mention)
    ]
    for command in commands:
        alike = [other for other in commands if mode(other) == mode(command)]
        # tests/test_distributed.py has two hosts that train.
        shown = mode(command) in SHOWN_BY or "--nnodes=2" in command.words
        always = command is min(alike, key=processes) and not shown and not command.way.soak
        marks = pytest.mark.runs if always else pytest.mark.soak
        yield pytest.param(command, marks=marks, id=command.text)


RUN = list(runs_of_commands())


@pytest.mark.runs
@pytest.mark.parametrize("left, shown_by", SHOWN_BY.items(), ids=str)
def test_a_mode_that_is_left_to_soak_is_shown_by_another_command(left, shown_by):
    assert shown_by in [RECORD, *(run.values[0].text for run in RUN if run.marks == (pytest.mark.runs,))]
    modes = {left} if left[0] != "make" else modes_of(Command(" ".join(left[1:]), "Makefile"))
    assert modes & modes_of(Command(shown_by, "Makefile"))


def modes_of(command: Command) -> set[tuple[str, ...]]:
    """The modes of a command; for make, those of the commands that it would run."""
    return set(map(mode, recipes(command) if command.program == "make" else [command]))


@pytest.mark.parametrize("command", RUN)
def test_it_runs(made_before, command, tmp_path):
    way, words = command.way, command.words
    if words[0] == "make" and Path(sys.prefix).resolve() != (REPO_ROOT / ".venv").resolve():
        pytest.skip("would set up .venv, which is not what runs the tests")
    if words[0] not in ("torchrun", "make"):
        words = words[1:]
    places = ChainMap({"out": tmp_path, "port": free_port()}, made_before)
    words = [STAND_INS.get(word, word).format_map(places) for word in words]
    words = with_overrides(words, shlex.split(way.overrides.format_map(places)))
    words = with_options(words, shlex.split(way.more.format_map(places)))
    if way.copied:
        script = tmp_path / command.program
        script.parent.mkdir()
        script.write_text(command.file.read_text(encoding="utf-8"), encoding="utf-8")
        (tmp_path / "docs" / "pictures").mkdir(parents=True)
        words[words.index(command.program)] = str(script)
    if "--resume" in words:
        assert python([word for word in words if word != "--resume"]).code == 0
        (last,) = tmp_path.glob("*/checkpoints/step-000002")
        shutil.rmtree(last)  # as if the run had been killed before it
    if words[0] == "make":
        outcomes = run_targets(words, tmp_path)
    elif words[0] == "torchrun":
        outcomes = run_hosts(words, 2 if "--nnodes=2" in words else 1, tmp_path)
    else:
        outcomes = [python(words)]
        assert "--resume" not in words or "continuing from" in outcomes[0].output
    for outcome in outcomes:
        assert outcome.code == 0, f"{command.place}: {command.text}\n{outcome.output[-3000:]}"
        assert "Traceback" not in outcome.output
    if way.overrides:
        (results,) = tmp_path.glob("*/results.json")
        steps = int(re.findall(r"num_train_steps=(\d+)", " ".join(words))[-1])
        history = json.loads(results.read_text())["history"]
        assert len(history) == steps
        assert all("loss" in step for step in history) == (LEARNS in way.overrides)
        if "save_video=true" in way.overrides:
            for name in ("report.html", "learning_curve.png", "before_after.mp4", "plots", "policy"):
                assert (results.parent / name).exists(), name


def with_options(words: list[str], more: list[str]) -> list[str]:
    """The words of a command with `more` options, without its own values of those: they would count as well."""
    given = {word for word in more if word.startswith("--")}
    kept, dropping = [], False
    for word in words:
        if word.startswith("--"):
            dropping = word in given
        if not dropping:
            kept.append(word)
    return kept + more


def with_overrides(words: list[str], overrides: list[str]) -> list[str]:
    """The words of a command, with these behind its own overrides."""
    if not overrides:
        return words
    if "--override" not in words:
        return [*words, "--override", *overrides]
    start = words.index("--override") + 1
    end = next((i for i in range(start, len(words)) if words[i].startswith("--")), len(words))
    return words[:end] + overrides + words[end:]


def run_targets(words: list[str], folder: Path) -> list[Outcome]:
    """make, with the overrides of training, which writes to `folder`, in ARGS; what is to be resumed is there before."""
    _, *words = words
    end = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    targets, arguments = words[:end], f"ARGS={shlex.join(words[end:])}"  # variables such as SUITE= stay
    before = [interrupted_quickstart(arguments, folder)] if targets == ["resume"] else []
    after = make(*targets, arguments)
    assert not before or "continuing from" in after.output
    return [*before, after]


def interrupted_quickstart(arguments: str, folder: Path) -> Outcome:
    """make quickstart, as in a terminal where somebody presses Ctrl+C after the first iteration."""
    with (folder / "interrupted").open("w+") as output:
        process = subprocess.Popen(
            ["make", "quickstart", arguments],
            cwd=REPO_ROOT, env=outside_make(), stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
        limit = time.monotonic() + 200
        while not list(folder.glob("*/checkpoints/step-000001")) and process.poll() is None:
            assert time.monotonic() < limit
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=60)
        output.seek(0)
        said = output.read()
    assert "SIGINT: stopping after a checkpoint" in said, said[-3000:]
    return Outcome(0 if "stopped; --resume continues from" in said else 1, said)


def outside_make() -> dict[str, str]:
    """Of a process that knows nothing of the make that runs these tests."""
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "ARGS")}
    return {**environment, "LC_ALL": "C"}


def run_hosts(words: list[str], hosts: int, folder: Path) -> list[Outcome]:
    """torchrun, as many times as there are hosts at the same time."""
    launch = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    files = [folder / f"host{number}" for number in range(hosts)]
    processes = []
    for file in files:
        with file.open("wb") as output:
            processes.append(
                subprocess.Popen(launch, cwd=REPO_ROOT, stdout=output, stderr=output, env=environment())
            )
    codes = [process.wait(timeout=500) for process in processes]
    return [Outcome(code, file.read_text(errors="replace")) for code, file in zip(codes, files, strict=True)]


def test_torchrun_is_where_python_is():
    assert Path(sys.executable).with_name("torchrun").is_file()


@pytest.mark.parametrize("short, whole", SPELT_OUT.items(), ids=str)
def test_a_command_that_stands_for_several_is_documented_and_spelt_out_with_all_its_flags(short, whole):
    assert short in [command.text for command in COMMANDS]
    flags = re.compile(r"--\w+")
    assert set(flags.findall(short)) <= set(flags.findall(whole))


@pytest.mark.parametrize("beginning, way", WAYS.items(), ids=str)
def test_a_way_is_one_of_a_documented_command_and_names_a_test_that_runs_it(beginning, way):
    tried = [shlex.join([command.program, *command.arguments]) for command in COMMANDS]
    assert any(fits(beginning, said) for said in tried)
    if way.why_not.startswith("tests/"):
        test = (REPO_ROOT / way.why_not).read_text(encoding="utf-8")
        assert beginning.split()[0] in test


# The READMEs.


def python_blocks(path: Path) -> list[str]:
    return [
        block for language, block in code_blocks(path.read_text(encoding="utf-8")) if language == "python"
    ]


# Not those of docs/stages, which show parts of the scripts.
WITH_PYTHON = [
    path for path in MARKDOWN if path != CHINESE and path.parent.name != "stages" and python_blocks(path)
]


@pytest.mark.runs
@pytest.mark.parametrize("path", WITH_PYTHON, ids=lambda path: path.relative_to(REPO_ROOT))
def test_python_in_a_document_runs(made_before, path, tmp_path):
    parts = tmp_path / "CHECKPOINT"
    parts.mkdir()
    for number in (1, 2):
        save_file({f"weight{number}": torch.ones(2)}, parts / f"model-{number}.safetensors")
    code = "\n".join(python_blocks(path))
    for name, place in {
        '"path/to/set"': made_before["demonstrations"], '"libero_spatial")': made_before["libero_files"],
        '"new_set"': tmp_path / "new_set", '"CHECKPOINT"': parts,
    }.items():  # fmt: skip
        code = code.replace(name, repr(str(place)) + ")" * name.endswith(")"))
    script = tmp_path / "blocks.py"
    script.write_text(code, encoding="utf-8")
    outcome = python([str(script)])
    assert outcome.code == 0, outcome.output[-3000:]
    assert "Traceback" not in outcome.output
    if "LeRobotWriter" in code:
        assert len(open_demonstrations(tmp_path / "new_set")) == 1
    if "model-*.safetensors" in code:
        assert sorted(load_file(parts / "model.safetensors")) == ["weight1", "weight2"]


# What needs other projects' programs, or the network.
FOREIGN = ("gsutil ", "hf download")


@pytest.mark.runs
def test_shell_commands_of_the_documents_run(made_before, tmp_path):
    texts = [block for path in MARKDOWN for kind, block in code_blocks(path.read_text()) if kind == "text"]
    own = [text for text in texts if not any(program in text for program in FOREIGN)]
    policy = Path(shutil.copytree(made_before["run"] / "policy", tmp_path / "data" / "for_openpi"))
    (tmp_path / "checkpoints/pi0_libero/RUN/20000").mkdir(parents=True)
    for text in own:
        subprocess.run(["sh", "-ec", text.replace("/data/", f"{tmp_path}/data/")], cwd=tmp_path, check=True)
    assert (policy / "assets/physical-intelligence/libero/norm_stats.json").is_file()
    written = json.loads((tmp_path / "checkpoints/pi0_libero/RUN/20000/config.json").read_text())
    assert written == {"action_horizon": 50}
    assert len(own) == 2


def parts(path: Path) -> list[str]:
    """Paragraphs, headings, tables, lists and code blocks, the link to the other language left out."""
    text = path.read_text(encoding="utf-8")
    found = re.findall(r"^```.*?^```$|^\S.*?(?=\n\n|\n```|\Z)", text, re.MULTILINE | re.DOTALL)
    return [part for part in map(str.strip, found) if not re.fullmatch(r"\[.+\]\(README.*\.md\)", part)]


def kind(part: str) -> tuple[str, int]:
    """What it is, and how many of its lines begin with that: rows of a table, points of a list."""
    mark = re.match(r"#+ |```\w*|\||\* |!\[|\d+\.(?= )|", part)[0]
    mark = "1." if mark.endswith(".") else mark
    pattern = r"^\d+\. " if mark == "1." else rf"^{re.escape(mark)}"
    return mark, len(re.findall(pattern, part, re.MULTILINE)) if mark else 1


def links(part: str) -> list[str]:
    return re.findall(r"\]\(([^)]*)\)", part)


def code(part: str) -> list[str]:
    """What a block holds without its comments; what stands in backticks, sorted, as word order differs."""
    if part.startswith("```python"):
        tokens = tokenize.generate_tokens(io.StringIO(part.strip("`").removeprefix("python")).readline)
        return [token.string for token in tokens if token.type not in (tokenize.COMMENT, tokenize.NL)]
    if part.startswith("```"):
        return [re.split(r"\s+#", line)[0] for line in part.splitlines()]
    return sorted(re.findall(r"`([^`]+)`", part))


def numbers(part: str) -> list[str]:
    """Numbers in text and comments, not those of names such as pi0."""
    if part.startswith("```"):
        part = "\n".join(re.findall(r"\s# (.*)", part))
    text = re.sub(r"`[^`]*`|\]\([^)]*\)", " ", part)
    return re.findall(r"(?<![A-Za-z0-9_.])\d+(?:[.,]\d+)*", text)


def test_each_readme_leads_to_the_other():
    assert "(README.zh-CN.md)" in ENGLISH.read_text(encoding="utf-8").partition("\n## ")[0]
    assert "(README.md)" in CHINESE.read_text(encoding="utf-8").partition("\n## ")[0]


def test_the_chinese_readme_has_the_same_parts_in_the_same_order():
    assert list(map(kind, parts(CHINESE))) == list(map(kind, parts(ENGLISH)))


@pytest.mark.parametrize("what", [code, links, numbers], ids=lambda what: what.__name__)
def test_the_chinese_readme_has_the_same_in_every_part(what):
    pairs = [(what(ours), what(theirs)) for ours, theirs in zip(parts(CHINESE), parts(ENGLISH), strict=True)]
    assert [(ours, theirs) for ours, theirs in pairs if ours != theirs] == []
    assert any(ours for ours, _ in pairs)


def test_the_chinese_readme_is_in_chinese():
    assert [part for part in parts(CHINESE) if not re.search(r"[\u4e00-\u9fff]", part)] == []


def test_links_of_the_readmes_lead_to_files():
    for path in (ENGLISH, CHINESE):
        for link in links(path.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (REPO_ROOT / link.partition("#")[0]).exists(), link
