"""Do the tests catch faults? Makes one small fault at a time in a copy of the project and runs the tests of its subject.

    python tools/mutations.py                        # all of them, a few minutes
    python tools/mutations.py --only ript libero     # those of two packages
    python tools/mutations.py --tree OTHER_CHECKOUT  # the same faults in another version of the project

A fault is named by the text that it replaces, which must stand in exactly one file of `pi0/`; so the same list serves
versions that keep their files elsewhere. The tests are run without faults first: a test that fails anyway would catch
everything. The exit status is 1 if a fault is not caught.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pi0.base.arguments import Collect
from pi0.base.errors import InputError, run_command
from pi0.base.progress import progress


@dataclass(frozen=True)
class Mutation:
    """A fault: `text` becomes `fault`; `tests` are files, `only` an expression of pytest's `-k`."""

    package: str
    what: str
    text: str
    fault: str
    tests: str
    only: str = ""


MUTATIONS = [
    Mutation(
        "base", "Wilson's centre is wrong", "center = successes + z * z / 2", "center = successes + z * z / 3",
        "test_stats.py",
    ),
    Mutation(
        "model", "positions begin at 1", "rotary_angles(valid.cumsum(1) - 1,", "rotary_angles(valid.cumsum(1),",
        "test_model.py",
    ),
    Mutation(
        "model", "LoRA changes the policy at its start", "nn.init.zeros_(self.lora_b)", "nn.init.ones_(self.lora_b)",
        "test_finetuning.py",
        "low_rank",
    ),
    Mutation(
        "workers", "the signal that ended a worker is not named", "signal.Signals(-code).name if code < 0 else",
        "'nothing' if code < 0 else", "test_workers.py test_pool.py", "killed or lost or die",
    ),
    Mutation(
        "policy", "images are not centred", "top, left = (size - new_h) // 2, (size - new_w) // 2", "top, left = 0, 0",
        "test_policy.py",
    ),
    Mutation(
        "policy", "quantiles become 0 to 1", "/ (high - low + EPSILON) * 2 - 1", "/ (high - low + EPSILON)",
        "test_policy.py",
    ),
    Mutation(
        "data", "an action after the end counts", "valid = following < length", "valid = following <= length",
        "test_recorded_chunks.py", "not warm_start",
    ),
    Mutation(
        "data", "batches come in the order of the files", "unused = torch.randperm(len(pool), generator=generator)",
        "unused = torch.arange(len(pool))", "test_recorded_chunks.py", "not warm_start",
    ),
    Mutation(
        "ranks", "gradients are summed, not averaged", "gradient /= world_size", "gradient /= 1",
        "test_distributed.py", "gradient_of_one_process",
    ),
    Mutation(
        "report", "the time left counts what is done", "a_step * (record.steps_planned - record.steps_done)",
        "a_step * record.steps_done", "test_html_report.py", "progress",
    ),
    Mutation(
        "training", "the average forgets instead of keeping",
        "zip(*pairs, strict=True)), 1.0 - self.decay)", "zip(*pairs, strict=True)), self.decay)", "test_finetuning.py", "average",
    ),
    Mutation(
        "training", "the last learning rate is never reached", "max(1, iterations - 1)", "max(1, iterations)",
        "test_optimizer.py",
    ),
    Mutation(
        "training", "the oldest checkpoints stay", "*sound[-self.keep :]", "*sound[: self.keep]",
        "test_checkpoint_store.py",
    ),
    Mutation(
        "libero", "an observation is measured too late", "self._period >= self.elapsed", "self._period > self.elapsed + 1",
        "test_stepping.py",
    ),
    Mutation(
        "libero", "evaluation states are practised", "states.states[held_out : held_out + count]",
        "states.states[:count]", "test_init_states.py",
    ),
    Mutation(
        "libero", "all rollouts of a task draw the same noise",
        "policy.noise((*recording.rollout.noise_key, len(recording.actions)))",
        "policy.noise((0, len(recording.actions)))", "test_pool.py", "alike or alone or twice or same",
    ),
    Mutation(
        "ript", "the own reward is in the baseline", "reward - sum(others) / len(others)",
        "reward - sum(rewards) / len(rewards)", "test_advantages.py",
    ),
    Mutation(
        "ript", "failures push away without a bound",
        "torch.where(weights < 0, losses.clamp(max=NEGATIVE_CLIP), losses)", "losses", "test_cfg_adapter.py",
        "push or clip or bound or formula",
    ),
    Mutation(
        "ript", "a resumed run counts visits twice", "if number >= added:", "if True:", "test_rollout_stats.py",
    ),
    Mutation(
        "stages", "removed and added lines are mixed up", 'removed = [f"-{line}" for line', 'removed = [f"+{line}" for line',
        "test_stage_pages.py", "diff",
    ),
]  # fmt: skip


def main() -> None:
    """Print a table of the faults and the tests that caught them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    packages = list(dict.fromkeys(mutation.package for mutation in MUTATIONS))
    parser.add_argument(
        "--only", action=Collect, nargs="+", choices=packages, default=packages, metavar="PACKAGE"
    )
    parser.add_argument("--tree", type=Path, default=ROOT, help="checkout to copy; default: this one")
    arguments = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if mutation.package in arguments.only]
    with tempfile.TemporaryDirectory() as folder:
        missed = try_all(copy_of(arguments.tree, Path(folder)), chosen)
    print(f"{len(chosen) - missed} of {len(chosen)} caught")
    sys.exit(missed > 0)


def copy_of(tree: Path, folder: Path) -> Path:
    """A checkout without its runs, caches and environment; the reference files beside it stay in reach."""
    left_out = shutil.ignore_patterns(".*", "outputs", "__pycache__")
    copy = Path(shutil.copytree(tree, folder / "copy", ignore=left_out))
    if (shared := tree.resolve().parent / "shared").is_dir():
        (folder / "shared").symlink_to(shared)
    return copy


def try_all(copy: Path, mutations: list[Mutation]) -> int:
    """Print a row for each fault; returns how many were not caught."""
    missed = 0
    with progress(2 * len(mutations), "tests", "run") as bar:
        passed = set()
        for mutation in mutations:
            if (mutation.tests, mutation.only) not in passed and (failed := first_failure(copy, mutation)):
                raise InputError(f"{failed} fails without a fault; mend it first")
            passed.add((mutation.tests, mutation.only))
            bar.update()
        for mutation in mutations:
            file = file_with(copy, mutation.text)
            sound = file.read_text()
            file.write_text(sound.replace(mutation.text, mutation.fault))
            started = time.monotonic()
            failed = first_failure(copy, mutation)
            file.write_text(sound)
            missed += failed is None
            row = (
                mutation.package,
                mutation.what,
                failed or "NOT CAUGHT",
                f"{time.monotonic() - started:.0f} s",
            )
            print("| " + " | ".join(row) + " |", flush=True)
            bar.update()
    return missed


def file_with(copy: Path, text: str) -> Path:
    """The one file of the package that has this text, once."""
    files = [file for file in sorted(copy.glob("pi0/**/*.py")) for _ in range(file.read_text().count(text))]
    if len(files) != 1:
        raise InputError(f"{text!r} stands {len(files)} times in {copy / 'pi0'}, not once; change MUTATIONS")
    return files[0]


def first_failure(copy: Path, mutation: Mutation) -> str | None:
    """The first test that fails, or None if all pass."""
    tests = [name for name in (f"tests/{name}" for name in mutation.tests.split()) if (copy / name).is_file()]
    chosen = ["-k", mutation.only] if mutation.only else []
    # -B: bytecode of a moment ago could stand for a file of the same size.
    done = subprocess.run(
        [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", *tests, *chosen],
        cwd=copy, env={**os.environ, "PYTHONPATH": str(copy)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if failed is None:
        raise InputError(
            f"{' '.join(tests)}: pytest ended with {done.returncode}: {done.stdout[-500:]}{done.stderr[-500:]}"
        )
    return failed[1].removeprefix("tests/")


if __name__ == "__main__":
    run_command(main)
