"""Is the engine the same as LIBERO to the last bit? Whole episodes of every task beside LIBERO's own environment.

    python benchmarks/identity.py                                   # 40 tasks on the stand-ins, about 10 minutes
    python benchmarks/identity.py --assets ../libero_assets --suites libero_10 --steps 100

Both sides execute the same actions from the first recorded state: those of the scripted expert, if there is one,
until it has solved the task, otherwise random ones. State, success and the measured end-effector pose and gripper are
compared after every control step. One difference in the last bit fails the task.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np

from pi0.base.arguments import Collect, ranged
from pi0.base.errors import run_command
from pi0.base.progress import progress
from pi0.libero.assets import resolve_assets, use_assets
from pi0.libero.experts import Expert, NoExpertError
from pi0.libero.stepping import InitState, TaskSim, quat_to_axis_angle
from pi0.libero.suites import Task, find_tasks

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")


def main() -> None:
    """Compare, print a table, fail if anything differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suites", action=Collect, nargs="+", default=list(SUITES))
    parser.add_argument("--assets", default="standins", help="folder of LIBERO's assets, or standins")
    parser.add_argument(
        "--tasks",
        action=Collect,
        nargs="+",
        default=[],
        help="tasks by index or name; default: all of each suite",
    )
    parser.add_argument(
        "--steps", type=ranged(int, low=1), help="control steps; the suite's horizon by default"
    )
    options = parser.parse_args()
    tasks = [task for suite in options.suites for task in find_tasks(suite, options.tasks)]
    lines, differing = ["| task | control steps | solved | first difference |", "|---|---|---|---|"], 0
    with progress(total=len(tasks), label="comparing", unit="task") as bar:
        for task in tasks:
            steps, solved, difference = compare(task, options.assets, options.steps or task.horizon)
            differing += difference is not None
            lines.append(f"| {task.suite} {task.index} | {steps} | {solved} | {difference or 'none'} |")
            bar.update(1, f"{differing} differ")
    print("\n".join(lines))
    print(f"{len(tasks) - differing} of {len(tasks)} tasks identical, assets: {Path(options.assets).name}")
    sys.exit(differing > 0)


def compare(task: Task, assets_name: str, steps: int) -> tuple[int, bool, str | None]:
    """Returns the control steps compared, whether the goal was ever reached, and the first difference."""
    assets = resolve_assets(assets_name)
    ours = TaskSim(task, assets)
    use_assets(assets)
    from libero.libero.envs.env_wrapper import ControlEnv

    theirs = ControlEnv(task.bddl_file, use_camera_obs=False, has_offscreen_renderer=False)
    theirs.seed(0)
    theirs.reset()
    model, bodies = theirs.sim.model, [theirs.env.obj_body_id[name] for name in theirs.env.fixtures_dict]
    recorded = task.recorded_init_states()[0]
    theirs.set_init_state(recorded)
    fixtures = np.concatenate([model.body_pos[bodies], model.body_quat[bodies]], 1).reshape(-1, 7)
    ours.reset(InitState(recorded, fixtures))
    try:
        expert = Expert(ours)
    except NoExpertError:
        expert = None
    random, solved = np.random.default_rng(0), False
    seen: list[np.ndarray] = []
    for step in range(steps):
        if expert is not None and not solved:
            action = expert.action()
        else:
            action = random.uniform(-1.2, 1.2, 7)
        observation, _, done, _ = theirs.step(action)
        success = ours.step(action, lambda: seen.append(ours.proprioception()))
        solved |= success
        state = np.concatenate([[ours.data.time], ours.data.qpos, ours.data.qvel])
        their_view = np.concatenate(
            [
                observation["robot0_eef_pos"],
                quat_to_axis_angle(observation["robot0_eef_quat"]),
                observation["robot0_gripper_qpos"],
            ]
        ).astype(np.float32)
        for name, equal in (
            ("state", np.array_equal(theirs.get_sim_state(), state)),
            ("success", done == success),
            ("observation", np.array_equal(their_view, seen[-1])),
        ):
            if not equal:
                theirs.close()
                return step + 1, solved, f"{name} in step {step}"
    theirs.close()
    return steps, solved, None


if __name__ == "__main__":
    run_command(main)
