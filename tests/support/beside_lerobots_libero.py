"""The same actions in LeRobot's own LIBERO environment and in the plug-in's, for test_lerobot_plugin.py; runs in .venv-lerobot.

Usage: beside_lerobots_libero.py SUITE TASK FILE

FILE gets, for both, what a policy is given at every step, after LeRobot's own processors: `theirs/KEY`, `ours/KEY`, float
[steps, ...], and what the environments say of the task, `theirs`, `ours`.
"""

import sys

import numpy as np

from pi0.libero.assets import resolve_assets, use_assets
from pi0.libero.libero_import import prepare_libero

STEPS = 25

if __name__ == "__main__":
    suite, task, file = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    prepare_libero()
    use_assets(resolve_assets("standins"))
    from lerobot.envs import preprocess_observation
    from lerobot.envs.configs import LiberoEnv
    from lerobot_env_pi0_libero import Pi0LiberoEnv

    same = {"task": suite, "task_ids": [task], "observation_height": 128, "observation_width": 128}
    seen: dict[str, np.ndarray] = {}
    for name, config in (
        ("ours", Pi0LiberoEnv(**same, assets="standins", workers=1)),
        ("theirs", LiberoEnv(**same)),
    ):
        envs = config.create_envs(n_envs=1, use_async_envs=False)[suite][task]
        before, _ = config.get_env_processors()
        random, observations = np.random.default_rng(0), []
        observation, _ = envs.reset(seed=[0], options={"lerobot_new_rollout": True})
        for _ in range(STEPS):
            observations.append(before(preprocess_observation(observation)))
            observation = envs.step(random.uniform(-1, 1, (1, 7)).astype(np.float32))[0]
        for key in (key for key, value in observations[0].items() if hasattr(value, "numpy")):
            seen[f"{name}/{key}"] = np.concatenate([each[key].numpy() for each in observations])
        about = [envs.call(word)[0] for word in ("task", "task_description", "_max_episode_steps")]
        seen[name] = np.array(list(map(str, about)))
        envs.close()
        if name == "ours":  # LeRobot closes environments after each score, and scores again while it trains
            again = before(preprocess_observation(envs.reset()[0]))
            assert all(np.array_equal(again[key], observations[0][key]) for key in again)
            envs.close()
    np.savez(file, **seen)
