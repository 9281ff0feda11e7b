"""LIBERO as published checkpoints know it, in numbers worked out by hand."""

import json
import math
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

from pi0 import PI0Policy, evaluate
from pi0.base.paths import REPO_ROOT
from pi0.data.chunks import Chunks
from pi0.libero.stepping import quat_to_axis_angle
from pi0.model.config import Pi0Config, SiglipDims
from pi0.model.network import Pi0Network
from pi0.norm_stats import main as compute_norm_stats
from pi0.norm_stats import norm_stats
from pi0.policy.acting import ActingPolicy
from pi0.policy.images import to_network_images
from pi0.policy.normalization import (
    NormStats,
    NormStatsError,
    Stats,
    add_state,
    learned_delta_actions,
    load_norm_stats,
    normalize,
    subtract_state,
    unnormalize,
)
from pi0.policy.tokenizer import TinyTokenizer, libero_prompts, state_bins, state_prompt
from pi0.ript.config import load_config
from pi0.training.flow_loss import Augmentation, flow_loss

# Means as LIBERO demonstrations have them: position (m), axis-angle (rad; the hand points down), gripper (m);
# actions.
STATE_MEAN = [-0.047, 0.034, 0.765, 2.972, -0.220, -0.126, 0.027, -0.027]
ACTION_MEAN = [0.063, 0.087, -0.090, 0.001, 0.006, -0.005, -0.050]
DELTA_MEAN = [*(a - s for a, s in zip(ACTION_MEAN[:6], STATE_MEAN[:6], strict=True)), ACTION_MEAN[6]]


def stats(mean: list, **quantiles: list) -> Stats:
    arrays = {name: np.array(values, np.float32) for name, values in quantiles.items()}
    return Stats(np.array(mean, np.float32), np.full(len(mean), 0.5, np.float32), **arrays)


def policy(state_mean=STATE_MEAN, action_mean=ACTION_MEAN, preset="pi0_tiny", **changes) -> PI0Policy:
    quantiles = {
        "state": {"q01": [m - 1 for m in state_mean], "q99": [m + 1 for m in state_mean]},
        "actions": {"q01": [-1.0] * 7, "q99": [1.0] * 7},
    }
    measured = NormStats(stats(state_mean, **quantiles["state"]), stats(action_mean, **quantiles["actions"]))
    torch.manual_seed(0)
    return PI0Policy(Pi0Config.preset(preset, **changes), measured).eval()


def observations(batch: int = 1) -> dict:
    rng = np.random.default_rng(0)
    return {
        "images": {
            name: rng.integers(0, 256, (batch, 64, 64, 3), dtype=np.uint8)
            for name in ("base_0_rgb", "left_wrist_0_rgb")
        },
        "state": np.tile(np.array(STATE_MEAN, np.float32), (batch, 1)),
        "prompt": ["put the bowl on the plate"] * batch,
    }


# Pictures


def test_turned_by_180_degrees_is_upright_and_mirrored():
    raw = np.array([[1, 2], [3, 4]], np.uint8)[..., None].repeat(3, -1)  # as LIBERO gives it, on its head
    upright, turned = raw[::-1].copy(), raw[::-1, ::-1].copy()
    assert turned[..., 0].tolist() == [[4, 3], [2, 1]]
    ours = to_network_images(torch.from_numpy(upright)[None], 2, mirror=True)
    assert ((ours[0, 0] + 1) / 2 * 255).round().tolist() == [[4, 3], [2, 1]]
    assert torch.equal(ours, to_network_images(torch.from_numpy(turned)[None], 2))


@pytest.mark.parametrize(("preset", "mirrored"), [("pi0", True), ("pi05", True), ("pi0_tiny", False)])
def test_published_policies_see_what_openpi_shows_them(preset, mirrored):
    assert Pi0Config.preset(preset).mirror_images is mirrored


def test_file_that_is_silent_about_mirroring_is_taken_for_what_it_most_likely_is():
    for preset, mirrored in (("pi0", True), ("pi0_tiny", False)):
        content = Pi0Config.preset(preset).to_dict()
        del content["mirror_images"]
        assert Pi0Config.from_dict(content).mirror_images is mirrored
        assert Pi0Config.from_dict(content | {"mirror_images": not mirrored}).mirror_images is not mirrored


def test_policy_mirrors_what_it_sees_when_it_learned_so():
    plain, mirrored = (policy(mirror_images=flag).prepare(observations()) for flag in (False, True))
    for name, picture in plain["images"].items():
        assert torch.equal(mirrored["images"][name], picture.flip(-1))
        assert not torch.equal(mirrored["images"][name], picture)


def published_looking() -> PI0Policy:
    """A policy with the input of published ones, and next to nothing behind it."""
    tower = SiglipDims(width=16, depth=1, mlp_dim=16, num_heads=2, patch_size=56)
    return policy(vision=tower, mirror_images=True, num_steps=1)


def frames_of_256() -> tuple[np.ndarray, np.ndarray]:
    """Two frames as openpi's script gets them from LIBERO, and what its `resize_with_pad` (PIL) makes of them."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    upright = np.stack([np.asarray(Image.fromarray(frame).resize((256, 256))) for frame in coarse])
    turned = upright[:, :, ::-1]  # LIBERO's, upside down, turned by 180 degrees
    resized = [
        np.asarray(Image.fromarray(frame).resize((224, 224), Image.Resampling.BILINEAR)) for frame in turned
    ]
    return upright, np.stack(resized)


def assert_resized(seen: torch.Tensor, expected: np.ndarray) -> None:
    """Within one grey level: PIL rounds after each of the two directions."""
    levels = ((seen + 1) / 2 * 255).permute(0, 2, 3, 1).numpy()
    assert levels.shape == expected.shape
    assert np.abs(levels - expected).max() <= 1.01


def test_frames_of_256_are_resized_as_openpi_does_before_a_policy_acts(monkeypatch):
    looking, (frames, expected), seen = published_looking(), frames_of_256(), []
    encode = Pi0Network.encode_prefix
    monkeypatch.setattr(
        Pi0Network,
        "encode_prefix",
        lambda self, images, *rest: seen.append(images) or encode(self, images, *rest),
    )
    images = dict.fromkeys(looking.config.cameras, frames)
    states = np.tile(np.array(STATE_MEAN, np.float32), (2, 1))
    acting = ActingPolicy(looking)
    acting.act(
        images, states, ["put the bowl on the plate"] * 2, np.stack([acting.noise((n,)) for n in (0, 1)])
    )
    for name in looking.config.cameras:
        assert_resized(seen[0][name], expected)


def test_frames_of_256_are_resized_as_openpi_does_before_a_policy_learns():
    looking, (frames, expected), seen = published_looking(), frames_of_256(), []
    chunks = Chunks(
        {name: torch.from_numpy(frames) for name in looking.config.cameras},
        torch.tensor(STATE_MEAN).expand(2, 8),
        ["put the bowl on the plate"] * 2,
        torch.zeros(2, 10, 7),
        torch.ones(2, 10, dtype=torch.bool),
    )

    def model(images, **inputs):
        seen.append(images)
        return looking(images=images, **inputs)

    flow_loss(looking, chunks, samples=1, generator=torch.Generator(), model=model)
    for name in looking.config.cameras:
        assert_resized(seen[0][name], expected)


# openpi, examples/libero/main.py: LIBERO_ENV_RESOLUTION, replan_steps, num_steps_wait.
OPENPI = {"image_size": 256, "replan_steps": 5, "settle_steps": 10}


def test_configuration_for_published_policies_simulates_as_openpi_does():
    task = load_config(REPO_ROOT / "configs/pi0_libero.yaml").task
    assert {name: getattr(task, name) for name in OPENPI} == OPENPI
    assert (task.render, task.fixtures, task.max_episode_length) == ("exact", "libero_eval", None)


def test_documented_evaluation_of_published_policies_is_openpis():
    lines = (REPO_ROOT / "docs/checkpoints.md").read_text(encoding="utf-8").splitlines()
    (command,) = [line for line in lines if line.startswith("python -m pi0.evaluate --policy_path /data/")]
    options = evaluate.parse_arguments(shlex.split(command)[3:])
    assert {name: getattr(options, name) for name in OPENPI} == OPENPI
    assert (options.render, options.fixtures, options.max_episode_length) == ("exact", "libero_eval", None)


def test_frames_are_padded_to_224_in_the_middle():
    def white(rows: int) -> torch.Tensor:
        frame = torch.full((1, rows, 128, 3), 255, dtype=torch.uint8)
        return to_network_images(frame, 224)[0]

    pixels = white(96)
    # 128 -> 224 makes 96 -> 168, which leaves 28 rows above and below.
    assert pixels.shape == (3, 224, 224)
    assert [pixels[0, row, 0].item() for row in (27, 28, 195, 196)] == [-1, 1, 1, -1]
    odd = white(95)  # int(95 * 224 / 128) = 166 rows: 29 above, 29 below
    assert [odd[0, row, 0].item() for row in (28, 29, 194, 195)] == [-1, 1, 1, -1]
    odd = white(97)  # int(169.75) = 169 rows: 27 above, 28 below
    assert [odd[0, row, 0].item() for row in (26, 27, 195, 196)] == [-1, 1, 1, -1]


def test_halved_frames_are_antialiased_and_rounded():
    # Bilinear to half the size weighs four pixels by 1, 3, 3, 1; at the edges by 3, 3, 1.
    row = np.array([0, 0, 0, 80, 160, 160], np.uint8)
    frame = np.repeat(np.repeat(row[None, :, None], 6, 0), 3, -1)
    pixels = to_network_images(torch.from_numpy(frame)[None], 3)[0]
    levels = ((pixels[0, 1] + 1) / 2 * 255).tolist()
    expected = [0, round((0 * 1 + 0 * 3 + 80 * 3 + 160 * 1) / 8), round((80 + 160 * 3 + 160 * 3) / 7)]
    np.testing.assert_allclose(levels, expected, atol=1e-4)


def test_pixels_are_minus_1_to_1():
    frame = torch.tensor([0, 51, 102, 255], dtype=torch.uint8).view(1, 2, 2, 1).expand(-1, -1, -1, 3)
    pixels = to_network_images(frame.contiguous(), 2)[0, 0].flatten()
    np.testing.assert_allclose(pixels, [-1, -0.6, -0.2, 1], atol=1e-6)


def test_third_camera_of_the_published_model_is_black_and_masked():
    cameras = Pi0Config.preset("pi0").cameras
    assert cameras == ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    prepared = policy(cameras=cameras).prepare(observations(2))
    assert {name: mask.tolist() for name, mask in prepared["image_masks"].items()} == {
        "base_0_rgb": [True, True],
        "left_wrist_0_rgb": [True, True],
        "right_wrist_0_rgb": [False, False],
    }
    assert (prepared["images"]["right_wrist_0_rgb"] == -1).all()


# State


@pytest.mark.parametrize(
    ("quaternion", "axis_angle"),
    [
        ([0, 0, 0, 1], [0, 0, 0]),
        ([0, 0, math.sqrt(0.5), math.sqrt(0.5)], [0, 0, math.pi / 2]),
        ([1, 0, 0, 0], [math.pi, 0, 0]),
        ([0, math.sqrt(0.75), 0, -0.5], [0, 4 * math.pi / 3, 0]),  # more than half a turn stays as it is
    ],
)
def test_rotation_of_the_state_is_an_axis_times_an_angle(quaternion, axis_angle):
    np.testing.assert_allclose(quat_to_axis_angle(np.array(quaternion, float)), axis_angle, atol=1e-12)


def test_state_and_actions_are_padded_with_zeros_to_32():
    padded = policy(action_dim=32)
    state = padded.prepare(observations())["state"]
    assert state.shape == (1, 32)
    assert state.abs().max() < 1e-6  # the mean state is 0, and so is the padding
    actions = padded.normalize_actions(np.full((1, 10, 7), 0.5, np.float32))
    expected = [(0.5 - mean) / 0.500001 for mean in ACTION_MEAN] + [0.0] * 25
    np.testing.assert_allclose(actions[0, 3], expected, rtol=1e-5)


# Numbers


def test_z_scores_by_hand():
    part = Stats(np.array([1.0, -2.0], np.float32), np.array([2.0, 0.0], np.float32))
    values = torch.tensor([[5.0, -2.0], [0.0, -1.999]])
    normal = normalize(values, part, quantiles=False)
    np.testing.assert_allclose(normal, [[2.0, 0.0], [-0.5, 1000.0]], rtol=1e-3)  # 0.001 / 1e-6
    np.testing.assert_allclose(unnormalize(normal, part, quantiles=False), values, rtol=1e-5)


def test_quantiles_by_hand():
    part = Stats(
        *(np.zeros(2, np.float32),) * 2,
        q01=np.array([-1.0, 3.0], np.float32),
        q99=np.array([3.0, 3.0], np.float32),
    )
    values = torch.tensor([[-1.0, 3.0], [1.0, 3.0], [3.0, 3.000001], [5.0, 3.0]])
    normal = normalize(values, part, quantiles=True)
    np.testing.assert_allclose(
        normal[:, 0], [-1, 0, 1, 2], atol=1e-5
    )  # beyond the quantiles it is not clipped
    np.testing.assert_allclose(normal[:2, 1], [-1, -1])  # a feature that never moves
    np.testing.assert_allclose(unnormalize(normal, part, quantiles=True)[:, 0], values[:, 0], atol=1e-5)


def test_policy_normalises_by_what_its_configuration_says():
    observed = observations() | {"state": np.array([STATE_MEAN], np.float32) + 0.25}
    z_scores = policy(use_quantile_norm=False).prepare(observed)["state"]
    by_quantiles = policy(use_quantile_norm=True).prepare(observed)["state"]
    np.testing.assert_allclose(z_scores[0], [0.5] * 8, atol=1e-5)  # deviation 0.5
    np.testing.assert_allclose(by_quantiles[0], [0.25] * 8, atol=1e-5)  # quantiles 1 away on either side
    actions = policy(use_quantile_norm=True).unnormalize_actions(torch.full((1, 10, 8), 0.5))
    np.testing.assert_allclose(actions, np.full((1, 10, 7), 0.5), atol=1e-5)


def test_quantiles_that_are_not_there_are_asked_for(tmp_path):
    path = tmp_path / "norm_stats.json"
    path.write_text(json.dumps({"norm_stats": {
        "state": {"mean": STATE_MEAN, "std": [1] * 8},
        "actions": {"mean": ACTION_MEAN, "std": [1] * 7},
    }}))  # fmt: skip
    read = load_norm_stats(path, 8, 7)
    PI0Policy(Pi0Config.preset("pi0_tiny"), read)
    with pytest.raises(NormStatsError, match=f"{path}: norm_stats.state has no q01 and q99"):
        PI0Policy(Pi0Config.preset("pi0_tiny", use_quantile_norm=True), read)


# Actions that were learned less the state


def test_state_is_subtracted_from_all_but_the_gripper():
    state = torch.tensor([[0.1, 0.2, 0.3, 3.0, 0.0, -0.5, 0.04, -0.04]])
    actions = torch.tensor([[[0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0]]])
    relative = subtract_state(actions, state)
    expected = [[0.4, 0.3, 0.2, -2.5, 0.5, 1.0, 1.0], [-0.1, -0.2, -0.3, -3.0, 0.0, 0.5, -1.0]]
    np.testing.assert_allclose(relative[0], expected, atol=1e-6)
    np.testing.assert_allclose(add_state(relative, state), actions, atol=1e-6)


@pytest.mark.parametrize(
    ("mean", "stated", "chosen"),
    [
        (ACTION_MEAN, None, False),
        (ACTION_MEAN, False, False),
        (DELTA_MEAN, None, True),  # as in the statistics of openpi's pi0_libero
        (DELTA_MEAN, True, True),
    ],
)
def test_statistics_say_whether_the_state_was_subtracted(mean, stated, chosen):
    assert learned_delta_actions(NormStats(stats(STATE_MEAN), stats(mean)), stated) is chosen


@pytest.mark.parametrize(("mean", "stated"), [(ACTION_MEAN, True), (DELTA_MEAN, False)])
def test_the_wrong_choice_is_an_error_and_not_a_policy_that_never_succeeds(mean, stated):
    with pytest.raises(NormStatsError, match=f"set delta_actions to {str(not stated).lower()}"):
        learned_delta_actions(NormStats(stats(STATE_MEAN), stats(mean)), stated)


def test_statistics_of_some_other_robot_are_refused():
    measured = NormStats(stats(STATE_MEAN), stats([5.0] * 7))
    with pytest.raises(NormStatsError, match="take the statistics of the data"):
        learned_delta_actions(measured, None)


def test_where_statistics_fit_both_the_configuration_decides():
    measured = NormStats(stats([0.1] * 8), stats([0.1] * 7))
    assert [learned_delta_actions(measured, stated) for stated in (None, False, True)] == [False, False, True]


def test_policy_adds_the_state_back_before_it_clips():
    relative = policy(action_mean=DELTA_MEAN, delta_actions=True)
    torch.nn.init.zeros_(relative.network.action_out_proj.weight)
    torch.nn.init.zeros_(relative.network.action_out_proj.bias)
    # A field of zero leaves noise 0 where it is, which is the mean action; with the mean state added,
    # LIBERO's mean.
    actions = relative.select_action(observations(), noise=torch.zeros(1, 10, 8))
    np.testing.assert_allclose(actions[0, 0], ACTION_MEAN, atol=1e-5)
    back = relative.normalize_actions(actions, observations()["state"])
    np.testing.assert_allclose(back, np.zeros((1, 10, 8)), atol=1e-4)
    with pytest.raises(ValueError, match="delta_actions"):
        relative.normalize_actions(actions)


def test_training_subtracts_the_state_of_each_chunk():
    seen = []
    relative = policy(action_mean=DELTA_MEAN, delta_actions=True)
    chunks = Chunks(
        {name: torch.zeros(2, 64, 64, 3, dtype=torch.uint8) for name in relative.config.cameras},
        torch.tensor([STATE_MEAN, [0.0] * 8]),
        ["put the bowl on the plate"] * 2,
        torch.tensor(ACTION_MEAN).expand(2, 10, 7),
        torch.ones(2, 10, dtype=torch.bool),
    )

    def model(actions, **inputs):
        seen.append(actions)
        return relative(actions=actions, **inputs)

    flow_loss(relative, chunks, samples=1, generator=torch.Generator(), model=model)
    expected = [[0.0] * 8, [*(m / 0.500001 for m in STATE_MEAN[:6]), 0.0, 0.0]]
    np.testing.assert_allclose(seen[0][:, 4], expected, atol=1e-4)


# Prompt


def test_bins_of_the_state_are_256_equal_parts_of_minus_1_to_1():
    width = 2 / 256
    state = np.array(
        [-1.001, -1.0, -1 + 0.99 * width, -1 + width, -1e-6, 0.0, 1 - 1e-6, 1.0, 7.0], np.float32
    )
    assert state_bins(state).tolist() == [-1, 0, 0, 1, 127, 128, 255, 255, 255]


def test_prompt_of_pi05_spells_the_state():
    assert state_prompt(" put_the\nbowl ", np.array([-1.0, 0.0, 1.0])) == (
        "Task: put the bowl, State: 0 128 255;\nAction: "
    )


def test_prompt_with_a_state_has_no_newline_at_its_end():
    tokenizer = TinyTokenizer(80)
    ids, mask = tokenizer.encode("put the bowl on the plate", np.array([0.0, 0.5]))
    assert (
        tokenizer.decode(ids[mask].tolist()) == "task: put the bowl on the plate, state: 128 192;\naction: "
    )
    assert ids[0] == tokenizer.BOS
    assert tokenizer.NEWLINE not in ids
    assert tokenizer._known == {}  # states never come again; remembering such prompts would fill the memory
    plain, _ = tokenizer.encode("put the bowl on the plate")
    assert tokenizer.NEWLINE in plain


def test_every_libero_prompt_fits_the_tiny_pi05():
    tokenizer = TinyTokenizer(Pi0Config.preset("pi05_tiny").prompt_length)
    for prompt in libero_prompts():
        tokenizer.encode(prompt, np.full(8, 9.0))


@pytest.mark.parametrize(("padded", "numbers"), [(False, 8), (True, 32)])
def test_policy_spells_the_normalised_state(padded, numbers):
    spelling = policy(preset="pi05_tiny", action_dim=32, pad_discrete_state=padded, prompt_length=200)
    observed = observations(2)
    observed["state"][1] += 0.5  # a quarter of the range between the quantiles: 0 becomes 0.5
    prepared = spelling.prepare(observed)
    texts = [
        spelling.tokenizer.decode(ids[mask].tolist())
        for ids, mask in zip(
            prepared["tokenized_prompt"], prepared["tokenized_prompt_mask"].numpy(), strict=True
        )
    ]
    found = [text.split("state: ")[1].split(";")[0].split(" ") for text in texts]
    assert [len(bins) for bins in found] == [numbers, numbers]
    # The centre lies between bins 127 and 128, half of the way to the 99th percentile between 191 and 192.
    assert set(found[0]) <= {"127", "128"}
    assert set(found[1][:8]) <= {"191", "192"}
    assert set(found[1][8:]) <= {"128"}


def test_pi05_libero_of_openpi_leaves_the_state_out():
    silent = policy(preset="pi05_tiny", discrete_state_input=False)
    prepared = silent.prepare(observations())
    assert silent.tokenizer.decode(prepared["tokenized_prompt"][0].tolist()) == "put the bowl on the plate"


def test_noise_on_the_state_reaches_the_prompt():
    spelling = policy(preset="pi05_tiny")
    noisy = spelling.prepare(observations(), torch.full((1, 8), 0.5))
    text = spelling.tokenizer.decode(noisy["tokenized_prompt"][0].tolist())
    assert "127" not in text
    assert "128" not in text
    assert "19" in text  # 191 or 192


def test_state_noise_is_drawn_for_the_whole_padded_state():
    noise = Augmentation(state_noise=2.0).noise_on_state((4000, 8), torch.Generator().manual_seed(0))
    assert noise.std().item() == pytest.approx(2.0, rel=0.03)


# Several chunks from one observation


def test_several_noises_share_an_observation():
    for preset in ("pi0_tiny", "pi05_tiny"):
        sharing = policy(preset=preset)
        noise = torch.randn(3, 2, 10, 8)
        together = sharing.select_action(observations(2), noise)
        assert together.shape == (3, 2, 10, 7)
        for one, own in zip(noise, together, strict=True):
            torch.testing.assert_close(sharing.select_action(observations(2), one), own, rtol=0, atol=1e-5)


def test_shared_observations_are_encoded_once(monkeypatch):
    sharing = policy()
    calls = []
    encode = Pi0Network.encode_prefix
    monkeypatch.setattr(
        Pi0Network, "encode_prefix", lambda self, *a: calls.append(len(a[2])) or encode(self, *a)
    )
    sharing.select_action(observations(2), torch.randn(8, 2, 10, 8))
    assert calls == [2]


# Statistics from demonstrations


def recorded_chunks() -> Chunks:
    """Two observations with chunks of two actions, the last of which never happened."""
    states = torch.zeros(2, 8)
    states[1, 0] = 0.5
    actions = torch.zeros(2, 2, 7)
    actions[0, 0, 0], actions[0, 1, 0], actions[1, 0, 0], actions[1, 1, 0] = 0.1, 0.2, 0.3, 9.0
    valid = torch.tensor([[True, True], [True, False]])
    return Chunks({}, states, [""] * 2, actions, valid)


def test_statistics_of_demonstrations_by_hand():
    measured = norm_stats(recorded_chunks())
    assert measured.state.mean[0] == pytest.approx(0.25)
    assert measured.state.std[0] == pytest.approx(0.25)
    assert measured.actions.mean[0] == pytest.approx(0.2)
    assert measured.actions.std[0] == pytest.approx(math.sqrt(0.02 / 3))
    # Between the smallest and the next: 0.1 + 0.02 * 0.1, as there are two intervals.
    assert measured.actions.q01[0] == pytest.approx(0.102)
    assert measured.actions.q99[0] == pytest.approx(0.298)


def test_statistics_of_delta_actions_are_those_of_what_is_learned():
    measured = norm_stats(recorded_chunks(), delta_actions=True)
    assert measured.actions.mean[0] == pytest.approx((0.1 + 0.2 + (0.3 - 0.5)) / 3)
    assert measured.state.mean[0] == pytest.approx(0.25)


def test_small_deviations_can_be_raised():
    assert norm_stats(recorded_chunks(), smallest_std=0.02).state.std.tolist() == pytest.approx(
        [0.25] + [0.02] * 7
    )


@pytest.mark.runs
def test_command_writes_statistics_that_a_policy_reads(tmp_path, capsys):
    path = tmp_path / "made" / "norm_stats.json"
    options = [
        "--tasks",
        "3",
        "--demonstrations",
        "2",
        "--horizon",
        "4",
        "--frame-every",
        "4",
        "--workers",
        "1",
    ]
    compute_norm_stats(["--output", str(path), *options])
    assert "observations in" in capsys.readouterr().out
    measured = load_norm_stats(path, 8, 7)
    PI0Policy(Pi0Config.preset("pi0_tiny", use_quantile_norm=True), measured)
    # The Panda of LIBERO works above its table, hand pointing down: a turn of about 3 rad around x.
    assert 2.5 < abs(measured.state.mean[3]) < math.pi + 0.3
    assert (np.abs(measured.actions.mean) <= 1).all()
    assert learned_delta_actions(measured, None) is False
