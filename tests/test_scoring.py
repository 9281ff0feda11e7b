"""`pi0.evaluate.score`: a function as a policy gets the successes that the environments give it."""

import re

import gymnasium
import numpy as np
import pytest
import torch

import pi0.libero.gym_env  # noqa: F401  registers the environment
from pi0 import PI0Policy
from pi0.base.errors import InputError
from pi0.base.paths import REPO_ROOT
from pi0.evaluate import score

LENGTH = 96  # control steps; some of its episodes are solved by then (in 91 to 103), and others are not


def numbers_of(policy: PI0Policy):
    """The tiny policy with noise 0 as a function; each observation by itself, so that a batch changes no bit."""

    def act(images, states, prompts):
        chunks = []
        for row, prompt in enumerate(prompts):
            one = {
                "images": {name: torch.from_numpy(frames[row : row + 1]) for name, frames in images.items()},
                "state": torch.from_numpy(states[row : row + 1]),
                "prompt": [prompt],
            }
            chunks.append(policy.select_action(one, torch.zeros(1, 10, 8))[0].numpy())
        return np.stack(chunks)

    return act


@pytest.mark.engine
def test_a_function_gets_the_successes_of_gymnasiums_vector_environment():
    policy = PI0Policy.from_pretrained(REPO_ROOT / "checkpoints" / "pi0_tiny_libero_spatial")
    act, count = numbers_of(policy), 4
    settings = {"image_size": 64, "assets": "standins"}
    result = score(act, tasks=[3], episodes=count, max_episode_length=LENGTH, **settings)

    envs = gymnasium.make_vec(
        "pi0/LIBERO-v0",
        num_envs=count,
        vectorization_mode="vector_entry_point",
        task=3,
        horizon=LENGTH,
        **settings,
    )
    try:
        seen, _ = envs.reset(options={"init_state": list(range(count))})
        steps, success = np.zeros(count, int), np.zeros(count, bool)
        running = np.ones(count, bool)
        while running.any():
            prompts = [envs.unwrapped.instruction] * count
            chunks = act(seen["images"], seen["state"], prompts)
            for number in range(10):
                seen, rewards, terminated, truncated, _ = envs.step(chunks[:, number])
                steps += running
                success |= running & (rewards > 0)
                running &= ~(terminated | truncated)
    finally:
        envs.close()
    assert result.outcomes == success.tolist()
    assert [episode.steps for episode in result.episodes] == steps.tolist()
    assert set(result.outcomes) == {True, False}


@pytest.mark.engine
def test_the_function_of_the_readme_is_scored(capsys):
    text = (REPO_ROOT / "README.md").read_text()
    (block,) = re.findall(r"```python\n(import numpy as np\nfrom pi0.evaluate.*?)```", text, re.DOTALL)
    exec(block.replace("episodes=4", "episodes=2, max_episode_length=20"), {})  # noqa: S102  it is this project's
    assert "0/2 (0.0%, 95% interval 0.0 to 65.8)" in capsys.readouterr().out


@pytest.mark.engine
@pytest.mark.parametrize(
    ("returned", "complaint"),
    [
        (np.zeros((1, 7)), r"act returned \[1, 7\]; chunks \[1, 10 or more, 7\] are needed"),
        (np.zeros((1, 5, 7)), r"act returned \[1, 5, 7\]"),
        (np.zeros((2, 10, 7)), r"act returned \[2, 10, 7\]"),
        (np.full((1, 10, 7), np.nan), "act returned actions that are not finite"),
    ],
)
@pytest.mark.tried(
    "A function that is scored returns another shape, or NaN", "The evaluation ends and says so; no score"
)
def test_what_is_no_chunk_ends_the_evaluation(returned, complaint):
    with pytest.raises(InputError, match=complaint):
        score(
            lambda *_: returned, tasks=[3], episodes=1, image_size=32, assets="standins", num_parallel_envs=1
        )


def test_a_key_that_is_none_is_named():
    with pytest.raises(
        InputError, match=r"'workers' is no key of the section task; its keys are benchmark_name, "
    ):
        score(lambda *_: 0, workers=3)
    with pytest.raises(InputError, match="replan_steps = 0: must be 1 or more"):
        score(lambda *_: 0, replan_steps=0)
