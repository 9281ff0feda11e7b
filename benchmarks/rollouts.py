"""How much faster are rollouts than LIBERO's own? Measured side by side, in turns, on the same episodes.

    python benchmarks/rollouts.py                        # everything on the stand-ins, about 20 minutes
    python benchmarks/rollouts.py --assets ../libero_assets --figures step exact fast
    python benchmarks/rollouts.py --table outputs/rollouts/standins.json

| figure | theirs | ours |
|---|---|---|
| step | LIBERO's `ControlEnv.step` without cameras | `TaskSim.step`; ends in the same state to the bit |
| exact | LIBERO's two camera images at 256 pixels | `render: exact`, the same pixels |
| fast | the same | `render: fast` at 256 pixels |
| small | the same | `render: fast` at 64 pixels, as the tiny policy sees |
| loop | `SubprocVectorEnv`, 2 processes, used as in RIPT-VLA: reset, set the state, 10 settle steps, both cameras at 256 pixels in every step, chunks of 8, in lock-step until all are done | `Environments` with 2 workers, quickstart settings, chunks of 8 |
| start | imports, building the environment, a reset, one step | the same with a warm cache |
| worker | `SubprocVectorEnv` with 1 process, a fork that needs no imports: made, reset, one step | a vector environment with 1 worker, a new process: the same |
| workers | | rollouts with 2 workers against 1 |
| memory | PSS of one more environment of the same task: a process | PSS of one more worker, divided by its 4 rollouts |

In `loop` both sides ask the policy for every chunk. Theirs then executes the actions that ours took, so that both run
the same episodes to the same end. Each figure is measured in turns, every measurement in a process of its own. The
ratio is the median over turns, with the lowest and the highest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np

from pi0.base.arguments import Collect, ranged
from pi0.base.errors import run_command
from pi0.base.files import read_json
from pi0.base.progress import progress
from pi0.libero import gl

CHECKPOINT = ROOT / "checkpoints" / "pi0_tiny_libero_spatial"
TASK = ("libero_spatial", 3)
CHUNK = 8
CAMERA_SIZE = 256
STEPS = 150  # control steps timed by `step`
FRAMES = 30  # pairs of images timed by `exact`, `fast` and `small`
# Least ratio of each figure, and the aim: ours against theirs.
GOALS = {
    "step": (2.2, 3.0),
    "exact": (1.3, 2.0),
    "fast": (3.0, 8.0),
    "small": (3.0, 8.0),
    "loop": (20.0, 40.0),
    "start": (3.0, 4.0),
    "worker": (1.0, 2.0),
    "workers": (1.8, 1.95),
    "memory": (2.0, 4.0),
}
UNITS = {
    "step": "control steps/s",
    "exact": "ms a frame",
    "fast": "ms a frame",
    "small": "ms a frame",
    "loop": "rollouts/min",
    "start": "s",
    "worker": "s",
    "workers": "rollouts/min",
    "memory": "MB",
}
MORE_IS_BETTER = ("step", "loop", "workers")


def main() -> None:
    """Measure in turns, print and save the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--figures", action=Collect, nargs="+", choices=list(GOALS), default=list(GOALS))
    parser.add_argument("--turns", type=ranged(int, low=1), default=3, help="measurements of each side")
    parser.add_argument(
        "--episodes",
        type=ranged(int, low=1),
        default=24,
        help="episodes in `loop`, an even number, since theirs run in pairs; `workers` runs 4 times as many",
    )
    parser.add_argument("--assets", default="standins", help="folder of LIBERO's assets, or standins")
    parser.add_argument("--output", default=str(ROOT / "outputs" / "rollouts"))
    parser.add_argument("--table", help="only print the table of this file")
    parser.add_argument("--measure", nargs=2, metavar=("FIGURE", "SIDE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.episodes < 2 or options.episodes % 2:
        parser.error(f"--episodes {options.episodes}: theirs run in pairs; ask for 2, 4, 6, ...")
    if options.measure:
        figure, side = options.measure
        gl.select_backend()
        print(json.dumps(MEASUREMENTS[figure](side, options)))
        return
    if options.table:
        print(table(read_json(Path(options.table))))
        return
    gl.select_backend()  # once for all, so that no measurement includes the search for a back end
    output = Path(options.output) / f"{Path(options.assets).name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "assets": options.assets,
        "episodes": options.episodes,
        "figures": {},
    }
    with progress(total=2 * options.turns * len(options.figures), label="measuring", unit="run") as bar:
        for figure in options.figures:
            sides: dict[str, list[float]] = {"theirs": [], "ours": []}
            for _ in range(options.turns):
                for side, values in sides.items():
                    values.append(measure(figure, side, options))
                    bar.update(1, f"{figure} {side} {values[-1]:.3g}")
            results["figures"][figure] = sides
            output.write_text(json.dumps(results, indent=1))
    print(table(results))
    print(f"written to {output}")


def measure(figure: str, side: str, options: argparse.Namespace) -> float:
    """Make one measurement in a process of its own."""
    command = [
        sys.executable, __file__, "--measure", figure, side,
        "--assets", options.assets, "--episodes", str(options.episodes), "--output", options.output,
    ]  # fmt: skip
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return seconds if figure == "start" else json.loads(done.stdout.splitlines()[-1])


def table(results: dict) -> str:
    """Markdown table of ratios."""
    lines = [
        f"{results['date']}, {results['machine']}, assets: {Path(results['assets']).name}",
        "",
        "| figure | theirs | ours | ratio (lowest to highest) | at least | aim |",
        "|---|---|---|---|---|---|",
    ]
    for figure, sides in results["figures"].items():
        theirs, ours = sides["theirs"], sides["ours"]
        pairs = list(zip(theirs, ours, strict=True))
        ratios = [b / a if figure in MORE_IS_BETTER else a / b for a, b in pairs]
        at_least, aim = GOALS[figure]
        lines.append(
            f"| {figure}, {UNITS[figure]} | {statistics.median(theirs):.3g} | {statistics.median(ours):.3g} "
            f"| {statistics.median(ratios):.3g} ({min(ratios):.3g} to {max(ratios):.3g}) | {at_least} | {aim} |"
        )
    return "\n".join(lines)


# One environment ----------------------------------------------------------------------------------


def task_and_assets(options: argparse.Namespace):
    """The benchmark's task and assets; LIBERO then uses these assets."""
    from pi0.libero.assets import resolve_assets, use_assets
    from pi0.libero.suites import suite_tasks

    task = suite_tasks(TASK[0])[TASK[1]]
    assets = resolve_assets(options.assets)
    use_assets(assets)
    return task, assets


def their_env(task, **cameras):
    """LIBERO's own environment."""
    from libero.libero.envs import OffScreenRenderEnv
    from libero.libero.envs.env_wrapper import ControlEnv

    if not cameras:
        return ControlEnv(bddl_file_name=task.bddl_file, use_camera_obs=False, has_offscreen_renderer=False)
    return OffScreenRenderEnv(bddl_file_name=task.bddl_file, **cameras)


def begin(env, task):
    """Set LIBERO's environment to the first recorded state; returns that state with its fixtures."""
    from pi0.libero.stepping import InitState

    env.seed(0)
    env.reset()
    recorded = task.recorded_init_states()[0]
    env.set_init_state(recorded)
    fixtures = [env.env.obj_body_id[name] for name in env.env.fixtures_dict]
    model = env.sim.model
    return InitState(recorded, np.concatenate([model.body_pos[fixtures], model.body_quat[fixtures]], 1))


def random_actions() -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.5, 0.5, (STEPS, 7))


def measure_step(side: str, options: argparse.Namespace) -> float:
    """Control steps a second, after proving that both sides end in the same state."""
    from pi0.libero.stepping import TaskSim

    task, assets = task_and_assets(options)
    theirs, ours = their_env(task), TaskSim(task, assets)
    ours.reset(begin(theirs, task))
    seconds = {}
    for name, step in (("theirs", theirs.step), ("ours", ours.step)):
        started = time.perf_counter()
        for action in random_actions():
            step(action)
        seconds[name] = time.perf_counter() - started
    state = np.concatenate([[ours.data.time], ours.data.qpos, ours.data.qvel])
    if not np.array_equal(theirs.get_sim_state(), state):
        raise RuntimeError("the two simulations ended in different states")
    return STEPS / seconds[side]


def measure_frames(side: str, options: argparse.Namespace, mode: str, size: int) -> float:
    """Milliseconds a frame. Both sides draw the same scene with both cameras; the arm moves between frames."""
    from pi0.libero.rendering import CAMERAS, Renderer
    from pi0.libero.stepping import TaskSim

    task, assets = task_and_assets(options)
    if side == "theirs":
        env = their_env(task, camera_heights=CAMERA_SIZE, camera_widths=CAMERA_SIZE)
        begin(env, task)
        sim, draw = env.sim, lambda camera: env.sim.render(CAMERA_SIZE, CAMERA_SIZE, camera_name=camera)[::-1]
        nudge = sim.forward
        data = sim.data
    else:
        ours = TaskSim(task, assets)
        ours.reset(begin(their_env(task), task))
        renderer = Renderer(ours.model, mode, size)
        frame = np.empty((size, size, 3), np.uint8)
        data = ours.data

        def draw(camera: str) -> None:
            renderer.render(ours.data, camera, frame)

        def nudge() -> None:
            import mujoco

            mujoco.mj_forward(ours.model, ours.data)

    total = 0.0
    for number in range(FRAMES + 3):
        data.qpos[0] += 0.002
        nudge()
        started = time.perf_counter()
        for camera in CAMERAS.values():
            draw(camera)
        if number >= 3:
            total += time.perf_counter() - started
    return 1e3 * total / (FRAMES * len(CAMERAS))


def measure_start(side: str, options: argparse.Namespace) -> float:
    """Start one side; the parent measures the time of the whole process."""
    if side == "theirs":
        task, _ = task_and_assets(options)
        env = their_env(task, camera_heights=CAMERA_SIZE, camera_widths=CAMERA_SIZE)
        env.reset()
        env.set_init_state(task.recorded_init_states()[0])
        env.step(np.zeros(7))
        return 0.0
    from pi0.libero.libero_import import leave_out_wrappers
    from pi0.libero.rendering import CAMERAS, Renderer
    from pi0.libero.stepping import InitState, TaskSim

    leave_out_wrappers()  # as a worker does
    task, assets = task_and_assets(options)
    sim = TaskSim(task, assets)
    renderer = Renderer(sim.model, "fast", CAMERA_SIZE)
    sim.reset(InitState(task.recorded_init_states()[0], sim.fixtures()))
    frame = np.empty((CAMERA_SIZE, CAMERA_SIZE, 3), np.uint8)

    def look() -> None:
        for camera in CAMERAS:
            renderer.render(sim.data, camera, frame)

    look()
    sim.step(np.zeros(7), look)
    return 0.0


def measure_worker(side: str, options: argparse.Namespace) -> float:
    """Seconds until a vector environment of one process has taken its first step; imports of this process are before."""
    task, _ = task_and_assets(options)
    from libero.libero.envs import SubprocVectorEnv

    from pi0.libero.gym_env import LIBEROVectorEnv

    still = np.zeros((1, 7), np.float32)
    started = time.perf_counter()
    if side == "theirs":
        size = {"camera_heights": CAMERA_SIZE, "camera_widths": CAMERA_SIZE}
        envs = SubprocVectorEnv([lambda: their_env(task, **size)])
        envs.reset()
        envs.set_init_state(task.recorded_init_states()[:1])
        envs.step(still)
    else:
        envs = LIBEROVectorEnv(
            1, *TASK, workers=1, image_size=CAMERA_SIZE, assets=options.assets, settle_steps=0
        )
        envs.reset(options={"init_state": 0})
        envs.step(still)
    seconds = time.perf_counter() - started
    envs.close()
    return seconds


# The whole loop -----------------------------------------------------------------------------------


def runner(options: argparse.Namespace, workers: int):
    """The quickstart's environments, with RIPT-VLA's chunks of 8."""
    from pi0 import PI0Policy
    from pi0.libero.environments import Environments
    from pi0.libero.settings import TaskConfig
    from pi0.policy.acting import ActingPolicy

    policy = PI0Policy.from_pretrained(CHECKPOINT)
    task = TaskConfig(
        benchmark_name=TASK[0],
        task_names_to_use=[TASK[1]],
        image_size=64,
        replan_steps=CHUNK,
        num_parallel_envs=workers,
        assets=options.assets,
    )
    return Environments(task, policy.config), ActingPolicy(policy)


def our_rollouts(environments, acting, count: int):
    """Episodes from the evaluation states, and their time in seconds; scenes are built before."""
    states = environments.evaluation_states()[0]
    rollouts = [environments.rollout(states, index % 50, (1, 0, index)) for index in range(count)]
    list(environments.run_policy(acting, [replace(r, horizon=CHUNK) for r in rollouts[:8]]))
    started = time.perf_counter()
    episodes = dict(environments.run_policy(acting, rollouts))
    return [episodes[index] for index in range(count)], time.perf_counter() - started


def measure_loop(side: str, options: argparse.Namespace) -> float:
    """Rollouts a minute."""
    task_and_assets(options)
    environments, acting = runner(options, workers=2)
    with environments:
        episodes, seconds = our_rollouts(environments, acting, options.episodes)
    if side == "theirs":
        seconds = their_rollouts(episodes, acting, options)
    return 60 * len(episodes) / seconds


def their_rollouts(episodes, acting, options: argparse.Namespace) -> float:
    """Seconds that LIBERO's vector environment takes for the same episodes, two at a time in lock-step."""
    from libero.libero.envs import OffScreenRenderEnv, SubprocVectorEnv

    task, _ = task_and_assets(options)

    class PlacedEnv(OffScreenRenderEnv):
        """LIBERO's environment, with the fixtures placed as in our episode."""

        def set_init_state(self, init):
            bodies = [self.env.obj_body_id[name] for name in self.env.fixtures_dict]
            self.sim.model.body_pos[bodies] = init.fixtures[:, :3]
            self.sim.model.body_quat[bodies] = init.fixtures[:, 3:]
            return super().set_init_state(init.state)

    size = {"camera_heights": CAMERA_SIZE, "camera_widths": CAMERA_SIZE}
    envs = SubprocVectorEnv([lambda: PlacedEnv(bddl_file_name=task.bddl_file, **size) for _ in range(2)])
    settle, seconds = np.array([0, 0, 0, 0, 0, 0, -1.0]), 0.0
    for first in range(0, len(episodes), 2):
        pair = episodes[first : first + 2]
        started = time.perf_counter()
        envs.reset()
        observations = envs.set_init_state([episode.rollout.init for episode in pair])
        for _ in range(pair[0].rollout.settle_steps):
            observations, _, _, _ = envs.step(np.array([settle] * len(pair)))
        done = [False] * len(pair)
        actions = [np.concatenate([a[:n] for a, n in zip(e.actions, e.executed, strict=True)]) for e in pair]
        for step in range(pair[0].rollout.horizon):
            if all(done):
                break
            if step % CHUNK == 0:
                act_on(acting, observations, task)
            now = [settle if d else a[step] for a, d in zip(actions, done, strict=True)]
            observations, _, dones, _ = envs.step(np.array(now))
            done = [
                bool(d) or was or step + 1 == len(a) for d, was, a in zip(dones, done, actions, strict=True)
            ]
            for d, a, episode in zip(dones, actions, pair, strict=True):
                if d and step + 1 < len(a) or not d and step + 1 == len(a) and episode.success:
                    raise RuntimeError("LIBERO's episode ended elsewhere than ours")
        seconds += time.perf_counter() - started
    envs.close()
    return seconds


def act_on(acting, observations, task) -> None:
    """Run the policy for its time; the actions are not used (see the module's docstring)."""
    from pi0.libero.rendering import CAMERAS

    images = {
        name: np.ascontiguousarray(np.stack([o[f"{camera}_image"] for o in observations])[:, ::-4, ::4])
        for name, camera in CAMERAS.items()
    }
    states = np.zeros((len(observations), 8), np.float32)
    noise = np.stack([acting.noise((0, index)) for index in range(len(observations))])
    acting.act(images, states, [task.prompt] * len(observations), noise)


def measure_workers(side: str, options: argparse.Namespace) -> float:
    """Rollouts a minute with 1 worker (`theirs`) or 2."""
    task_and_assets(options)
    environments, acting = runner(options, workers=1 if side == "theirs" else 2)
    with environments:
        episodes, seconds = our_rollouts(environments, acting, 4 * options.episodes)
    return 60 * len(episodes) / seconds


def measure_memory(side: str, options: argparse.Namespace) -> float:
    """MB (PSS) of one more environment, after frames and steps; a worker of ours holds several."""
    task, _ = task_and_assets(options)
    environments_a_process = 1
    totals, size = [], {"camera_heights": CAMERA_SIZE, "camera_widths": CAMERA_SIZE}
    for count in (1, 2):
        if side == "theirs":
            from libero.libero.envs import SubprocVectorEnv

            envs = SubprocVectorEnv([lambda: their_env(task, **size) for _ in range(count)])
            envs.reset()
            envs.step(np.zeros((count, 7)))
            totals.append(sum(pss(worker.process.pid) for worker in envs.workers))
            envs.close()
        else:
            environments, acting = runner(options, workers=count)
            with environments:
                our_rollouts(environments, acting, 8)
                environments_a_process = environments.pool.spec.slots
                totals.append(sum(map(pss, environments.pool.processes)))
    return (totals[1] - totals[0]) / environments_a_process


def pss(pid: int) -> float:
    """Proportional set size, MB."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1e3
    raise RuntimeError(f"/proc/{pid}/smaps_rollup has no Pss")


MEASUREMENTS = {
    "step": measure_step,
    "exact": lambda side, options: measure_frames(side, options, "exact", CAMERA_SIZE),
    "fast": lambda side, options: measure_frames(side, options, "fast", CAMERA_SIZE),
    "small": lambda side, options: measure_frames(side, options, "fast", 64),
    "loop": measure_loop,
    "start": measure_start,
    "worker": measure_worker,
    "workers": measure_workers,
    "memory": measure_memory,
}


if __name__ == "__main__":
    run_command(main)
