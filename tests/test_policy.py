"""From a robot's observations to actions: preparation, normalisation, tokenizers, sampling, guidance."""

import numpy as np
import pytest
import torch
from PIL import Image

from pi0 import PI0Policy
from pi0.base.errors import CheckpointError, InputError
from pi0.model.config import Pi0Config
from pi0.model.network import NEGATIVE, NULL, POSITIVE
from pi0.policy.acting import ActingPolicy
from pi0.policy.images import to_network_images
from pi0.policy.normalization import NormStats, Stats, normalize, unnormalize
from pi0.policy.tokenizer import (
    VOCABULARY_FILE,
    PaligemmaTokenizer,
    TinyTokenizer,
    build_vocabulary,
    clean_prompt,
    libero_prompts,
)

PROMPT = "pick up the black bowl next to the plate and place it on the plate"


def tiny_policy(**changes) -> PI0Policy:
    rng = np.random.default_rng(0)
    stats = NormStats.of(rng.normal(0.5, 2.0, (500, 8)), rng.uniform(-0.5, 0.5, (500, 10, 7)))
    torch.manual_seed(0)
    return PI0Policy(Pi0Config.preset("pi0_tiny", **changes), stats).eval()


def raw_observations(batch: int, size: int = 64, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "images": {
            name: rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
            for name in ("base_0_rgb", "left_wrist_0_rgb")
        },
        "state": rng.normal(0.5, 2.0, (batch, 8)),
        "prompt": [PROMPT] * batch,
    }


def test_actions_are_what_the_robot_takes():
    policy = tiny_policy()
    actions = policy.select_action(raw_observations(3), noise=5 * torch.randn(3, 10, 8))
    assert actions.shape == (3, 10, 7)
    assert actions.dtype == torch.float32
    assert actions.abs().max() <= 1


def test_noise_is_the_only_randomness():
    policy, noise = tiny_policy(), torch.randn(2, 10, 8)
    first = policy.select_action(raw_observations(2), noise)
    assert torch.equal(policy.select_action(raw_observations(2), noise), first)
    assert not torch.equal(policy.select_action(raw_observations(2), noise + 1), first)


def test_state_is_normalised_and_padded():
    policy = tiny_policy(action_dim=12)
    observations = raw_observations(2)
    state = policy.prepare(observations)["state"]
    stats = policy.norm_stats.state
    expected = (observations["state"] - stats.mean) / (stats.std + 1e-6)
    np.testing.assert_allclose(state[:, :8], expected, rtol=1e-5, atol=1e-6)
    assert state.shape == (2, 12)
    assert (state[:, 8:] == 0).all()


def test_normalised_actions_come_back():
    policy = tiny_policy()
    actions = np.random.default_rng(1).uniform(-1, 1, (4, 10, 7)).astype(np.float32)
    normalised = policy.normalize_actions(actions)
    assert normalised.shape == (4, 10, 8)
    np.testing.assert_allclose(policy.unnormalize_actions(normalised), actions, atol=1e-6)


def test_pixels_are_scaled_and_channels_first():
    image = np.zeros((1, 64, 64, 3), np.uint8)
    image[0, 2, 5] = [0, 51, 255]
    pixels = to_network_images(torch.from_numpy(image), 64)
    assert pixels.shape == (1, 3, 64, 64)
    np.testing.assert_allclose(pixels[0, :, 2, 5], [-1, -0.6, 1], atol=1e-6)


def test_images_of_another_size_are_resized_as_openpi_does():
    rng = np.random.default_rng(0)
    image = np.kron(rng.integers(0, 256, (12, 16, 3)), np.ones((8, 8, 1))).astype(np.uint8)  # [96, 128, 3]
    ours = (to_network_images(torch.from_numpy(image)[None], 64)[0].permute(1, 2, 0) + 1) / 2 * 255
    expected = np.zeros((64, 64, 3))
    expected[8:56] = np.asarray(Image.fromarray(image).resize((64, 48), Image.Resampling.BILINEAR))
    assert np.abs(ours.numpy() - expected).max() <= 1.01  # both round to whole levels


def test_missing_camera_is_black_and_hidden():
    policy = tiny_policy()
    observations = raw_observations(2)
    del observations["images"]["left_wrist_0_rgb"]
    prepared = policy.prepare(observations)
    assert (prepared["images"]["left_wrist_0_rgb"] == -1).all()
    assert prepared["image_masks"]["left_wrist_0_rgb"].tolist() == [False, False]
    assert prepared["image_masks"]["base_0_rgb"].tolist() == [True, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": np.zeros((2, 7))}, r"state has shape \[2, 7\], expected \[B, 8\]"),
        ({"images": {"agentview": np.zeros((2, 64, 64, 3), np.uint8)}}, "agentview"),
        ({"images": {"base_0_rgb": np.zeros((2, 64, 64, 3), np.float32)}}, "uint8"),
        ({"images": {"base_0_rgb": np.zeros((2, 3, 64, 64), np.uint8)}}, r"\[B, h, w, 3\]"),
        ({"prompt": [PROMPT]}, "disagree on the batch size"),
    ],
)
def test_unusable_observations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_policy().prepare(raw_observations(2) | change)


def test_acting_without_norm_stats_is_refused():
    policy = PI0Policy(Pi0Config.preset("pi0_tiny"))
    with pytest.raises(CheckpointError, match=r"norm_stats\.json.*name one as norm_stats_path"):
        policy.select_action(raw_observations(1), torch.randn(1, 10, 8))


def test_guidance_of_a_policy_that_knows_no_optimality_is_refused():
    with pytest.raises(InputError, match="guidance weight 2.0: this policy has no optimality condition"):
        ActingPolicy(tiny_policy(), 2.0)


def test_what_the_network_is_given_can_be_looked_at():
    policy = tiny_policy()
    raw = raw_observations(2)
    given = ActingPolicy(policy).prepared(raw["images"], raw["state"], raw["prompt"])
    expected = policy.prepare(raw)
    assert np.array_equal(given["state"], expected["state"].numpy())
    assert np.array_equal(given["tokenized_prompt"], expected["tokenized_prompt"].numpy())
    for camera in policy.config.cameras:
        assert np.array_equal(given[f"images/{camera}"], expected["images"][camera].numpy())
        assert given[f"image_masks/{camera}"].all()


def test_flow_times_follow_the_published_distribution():
    g = torch.Generator().manual_seed(0)
    _, time = PI0Policy.draw_noise_and_time(torch.zeros(1000, 1, 1), samples=200, generator=g)
    assert time.min() > 0.001
    assert time.max() <= 1.0
    u = (time.flatten().double() - 0.001) / 0.999
    for quantile in (0.1, 0.5, 0.9):  # Beta(1.5, 1) has the distribution function x^1.5
        assert torch.quantile(u[:100_000], quantile).item() == pytest.approx(quantile ** (1 / 1.5), abs=0.005)


def test_loss_draws_from_the_generator_only():
    policy = tiny_policy()
    inputs = policy.prepare(raw_observations(2)) | {"actions": policy.normalize_actions(np.zeros((2, 10, 7)))}
    first = policy(**inputs, generator=torch.Generator().manual_seed(4))
    torch.manual_seed(99)
    assert torch.equal(policy(**inputs, generator=torch.Generator().manual_seed(4)), first)
    assert not torch.equal(policy(**inputs, generator=torch.Generator().manual_seed(5)), first)


def test_a_step_down_the_gradient_lowers_the_loss():
    policy = tiny_policy()
    inputs = policy.prepare(raw_observations(8)) | {
        "actions": policy.normalize_actions(np.zeros((8, 10, 7)) + 0.3)
    }
    noise, time = policy.draw_noise_and_time(inputs["actions"], 2, torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(10):
        loss = policy(**inputs, noise=noise, time=time).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# Guidance


def guided_policy() -> PI0Policy:
    """A policy whose conditions differ, as after training."""
    policy = tiny_policy(guidance=True)
    torch.manual_seed(1)
    torch.nn.init.normal_(policy.network.condition_embedding.weight)
    return policy


def guidance_inputs(policy: PI0Policy) -> tuple[dict, torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    return policy.prepare(raw_observations(3)), torch.randn(3, 10, 8), torch.rand(3)


def velocity(policy, inputs, x_t, t, condition):
    prefix = policy.network.encode_prefix(
        inputs["images"], inputs["image_masks"], inputs["tokenized_prompt"], inputs["tokenized_prompt_mask"]
    )
    return policy.network.velocity(prefix, inputs["state"], x_t, t, torch.full((len(x_t),), condition))


def test_conditions_start_without_effect():
    with_guidance, without = tiny_policy(guidance=True), tiny_policy()
    incompatible = with_guidance.network.load_state_dict(without.network.state_dict(), strict=False)
    assert incompatible.missing_keys == ["condition_embedding.weight"]
    noise = torch.randn(2, 10, 8)
    expected = without.select_action(raw_observations(2), noise)
    for weight in (None, 0, 1):
        assert torch.equal(
            with_guidance.select_action(raw_observations(2), noise, guidance_weight=weight), expected
        )
    blended = with_guidance.select_action(raw_observations(2), noise, guidance_weight=3.0)
    torch.testing.assert_close(blended, expected, rtol=0, atol=1e-5)


def test_guidance_weights_0_and_1_are_the_two_fields():
    policy = guided_policy()
    inputs, x_t, t = guidance_inputs(policy)
    with torch.no_grad():
        null, positive = (velocity(policy, inputs, x_t, t, c) for c in (NULL, POSITIVE))
        assert not torch.allclose(null, positive)
        for weight, field in ((None, null), (0, null), (1, positive)):
            noise_step = policy.sample_actions(
                **inputs, noise=x_t, num_steps=1, guidance_weight=weight
            )  # one step from t = 1
            at_one = velocity(policy, inputs, x_t, torch.ones(3), NULL if field is null else POSITIVE)
            assert torch.equal(noise_step, x_t - at_one)


def test_guidance_is_linear_in_its_weight():
    policy = guided_policy()
    inputs, x_t, _ = guidance_inputs(policy)
    with torch.no_grad():
        null, positive = (velocity(policy, inputs, x_t, torch.ones(3), c) for c in (NULL, POSITIVE))
        for weight in (-1.0, 0.5, 2.5):
            step = policy.sample_actions(**inputs, noise=x_t, num_steps=1, guidance_weight=weight)
            torch.testing.assert_close(x_t - step, null + weight * (positive - null), rtol=0, atol=2e-5)


def test_condition_reaches_its_own_rows_in_the_loss():
    policy = guided_policy()
    inputs = policy.prepare(raw_observations(3)) | {"actions": policy.normalize_actions(np.zeros((3, 10, 7)))}
    noise, time = policy.draw_noise_and_time(inputs["actions"], 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        mixed = policy(**inputs, noise=noise, time=time, condition=torch.tensor([POSITIVE, NULL, NEGATIVE]))
        for row, condition in enumerate((POSITIVE, NULL, NEGATIVE)):
            same = policy(**inputs, noise=noise, time=time, condition=torch.full((3,), condition))
            assert torch.equal(mixed[:, row], same[:, row])


def test_condition_on_an_unconditional_model_is_refused():
    with pytest.raises(ValueError, match="guidance=True"):
        tiny_policy().select_action(raw_observations(1), torch.randn(1, 10, 8), guidance_weight=2.0)


# Tokenizers


def test_every_libero_prompt_comes_back_and_fits_the_tiny_preset():
    config = Pi0Config.preset("pi0_tiny")
    tokenizer = TinyTokenizer(config.prompt_length)
    prompts = libero_prompts()
    assert len(prompts) == 130
    for prompt in prompts:
        ids, mask = tokenizer.encode(prompt)
        assert tokenizer.decode(ids[mask].tolist()) == prompt
        assert max(ids) < tokenizer.vocab_size <= config.vocab_size
        assert tokenizer.FIRST_BYTE not in ids  # no word was spelt in bytes
        assert all(i < tokenizer.FIRST_BYTE or i >= tokenizer.FIRST_PIECE for i in ids)


def test_libero_prompts_are_those_of_its_benchmark():
    from pi0.libero.suites import HORIZONS, suite_tasks

    ours = set(libero_prompts())
    for name in HORIZONS:
        assert {task.prompt for task in suite_tasks(name)} <= ours


def test_shipped_vocabulary_is_the_regenerated_one():
    pieces = build_vocabulary(libero_prompts())
    assert TinyTokenizer(8).pieces == pieces
    assert len(set(pieces)) == len(pieces)
    assert VOCABULARY_FILE.is_file()


def test_prompts_are_cleaned_as_openpi_does():
    assert clean_prompt(" put_the\nbowl ") == "put the bowl"
    tokenizer = TinyTokenizer(14)
    same = [tokenizer.encode(p)[0].tolist() for p in ("put the bowl", "put_the_bowl", " Put the bowl\n")]
    assert same[0] == same[1] == same[2]
    assert same[0][0] == tokenizer.BOS
    assert tokenizer.NEWLINE in same[0]


@pytest.mark.parametrize("prompt", ["unbekannte tasse", "put the Käse in the bowl", "a  b"])
def test_unknown_words_fall_back_to_bytes(prompt):
    tokenizer = TinyTokenizer(64)
    ids, mask = tokenizer.encode(prompt)
    assert tokenizer.decode(ids[mask].tolist()) == prompt.lower()


def test_too_long_a_prompt_is_refused():
    with pytest.raises(ValueError, match="the model is built for 14"):
        TinyTokenizer(14).encode("zwischen Teller und Schale")


def test_missing_paligemma_file_says_what_to_do(monkeypatch):
    monkeypatch.delenv("PALIGEMMA_TOKENIZER", raising=False)
    with pytest.raises(FileNotFoundError, match="PALIGEMMA_TOKENIZER"):
        PaligemmaTokenizer(None, 48)


def test_paligemma_prompt_is_bos_text_newline(tmp_path, monkeypatch):
    # A sentencepiece model trained here stands in for the published one, which is not in this repository.
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(libero_prompts()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "model"),
        vocab_size=360,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    monkeypatch.setenv("PALIGEMMA_TOKENIZER", str(tmp_path / "model.model"))
    tokenizer = PaligemmaTokenizer(None, 48)
    ids, mask = tokenizer.encode(PROMPT)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "model.model"))
    assert ids[mask].tolist() == [2, *model.encode(PROMPT), *model.encode("\n")]
    assert (ids[~mask] == 0).all()
    # pi0.5's text is encoded whole, and ends without a newline of its own.
    ids, mask = PaligemmaTokenizer(None, 200).encode(PROMPT, np.array([-1.0, 0.0]))
    assert ids[mask].tolist() == [2, *model.encode(f"Task: {PROMPT}, State: 0 128;\nAction: ")]


def test_guidance_can_be_added_and_changes_no_action_until_it_is_trained():
    torch.manual_seed(0)
    policy = PI0Policy(Pi0Config.preset("pi0_tiny"))
    g = torch.Generator().manual_seed(0)
    inputs = {
        "images": {name: torch.rand(2, 3, 64, 64, generator=g) for name in policy.config.cameras},
        "image_masks": {name: torch.ones(2, dtype=torch.bool) for name in policy.config.cameras},
        "state": torch.randn(2, 8, generator=g),
        "tokenized_prompt": torch.zeros(2, policy.config.prompt_length, dtype=torch.long),
        "tokenized_prompt_mask": torch.ones(2, policy.config.prompt_length, dtype=torch.bool),
        "noise": torch.randn(2, 10, 8, generator=g),
    }
    before = policy.sample_actions(**inputs)
    policy.enable_guidance()
    assert torch.equal(policy.sample_actions(**inputs, guidance_weight=0.0), before)
    assert torch.equal(policy.sample_actions(**inputs, guidance_weight=1.0), before)


def test_the_1st_percentile_becomes_minus_1_and_the_99th_1():
    stats = Stats(mean=np.zeros(2), std=np.ones(2), q01=np.array([-2.0, 1.0]), q99=np.array([2.0, 5.0]))
    values = torch.tensor([[-2.0, 1.0], [0.0, 3.0], [2.0, 5.0]], dtype=torch.float64)
    normal = normalize(values, stats, quantiles=True)
    assert torch.allclose(normal, torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64), atol=1e-5)
    assert torch.allclose(unnormalize(normal, stats, quantiles=True), values)
