"""Does LeRobot itself load what we write for it, act the same from it, and do we load what it writes?

    python tools/check_lerobot.py       # with the Python of an environment of its own: pip install "lerobot[pi]"

Small policies with random weights, pi0 and pi0.5: ours is saved in the layout "lerobot"; LeRobot's own classes load
the weights (strictly), the configuration and both processors from that folder; both sides sample from the same
observation and noise. Then LeRobot saves, and we load. Prints the largest differences; the exit status is 1 if one is
above 1e-4 or a prompt differs.

LeRobot builds only the published sizes, so its tables of sizes are replaced; and PaliGemma's tokenizer, which has to be
downloaded, by one that gives tokens of its own. Everything else is LeRobot's. `lerobot[pi]` brings the changed
`transformers` that its pi0 asks for; see its documentation of pi0 if it complains.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from published_files import (
    ACTIONS,
    EXPERT,
    HEAD_DIM,
    HEADS,
    HORIZON,
    LAYERS,
    VISION,
    WIDTH,
    weights,
    write_openpi,
)

from pi0 import PI0Policy, lerobot_files
from pi0.normalization import add_state, normalize, unnormalize
from pi0.tokenizer import clean_prompt, state_prompt

VOCAB = 257_152  # LeRobot builds no other
TOLERANCE = 1e-4
TASK = "put the bowl on the plate"
PROMPTS: list[str] = []  # as LeRobot had them tokenized


def main() -> None:
    """Both policies, both ways."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    import lerobot

    print(f"LeRobot {lerobot.__version__}, torch {torch.__version__}")
    lerobot_files._variant = lambda dims, name: "gemma_2b" if name == "gemma" else "gemma_300m"
    kinds = [("pi0", False), ("pi05", False)]
    if importlib.util.find_spec("lerobot.processor.relative_action_processor"):  # since release 0.5
        kinds += [("pi0", True), ("pi05", True)]
    worst = max(check(kind, relative) for kind, relative in kinds)
    sys.exit(0 if worst <= TOLERANCE else f"a prompt differs, or numbers by more than {TOLERANCE}")


def check(kind: str, relative: bool) -> float:
    """A policy, or one that has learned its actions less the state, there and back; the largest difference."""
    what = f"{kind}{', relative actions' if relative else ''}"
    module = importlib.import_module(f"lerobot.policies.{kind}.modeling_{kind}")
    make_small(module)
    with tempfile.TemporaryDirectory() as folder:
        start, ours_written, theirs_written = (Path(folder, name) for name in ("start", "ours", "theirs"))
        write_openpi(start, weights(pi05=kind == "pi05", vocab=VOCAB))
        content = json.loads((start / "config.json").read_text())
        (start / "config.json").write_text(json.dumps(content | {"delta_actions": relative}))
        ours = PI0Policy.from_pretrained(start)
        ours.save_pretrained(ours_written, layout="lerobot")
        theirs = getattr(module, f"{kind.upper()}Policy").from_pretrained(ours_written, strict=True)
        before, after = processors(theirs.config, ours_written)
        worst = compare(f"{what}: LeRobot from our folder", ours, theirs, before, after)
        theirs.save_pretrained(theirs_written)
        before.save_pretrained(theirs_written)
        after.save_pretrained(theirs_written)
        again = PI0Policy.from_pretrained(theirs_written)
        return max(worst, compare(f"{what}: we from LeRobot's folder", again, theirs, before, after))


def make_small(module: Any) -> None:
    """Let LeRobot's module build the sizes of the test files."""
    dims = {"num_heads": HEADS, "num_kv_heads": 1, "head_dim": HEAD_DIM, "depth": LAYERS}
    sizes = {
        "gemma_2b": SimpleNamespace(width=WIDTH, mlp_dim=64, **dims),
        "gemma_300m": SimpleNamespace(width=EXPERT, mlp_dim=40, **dims),
    }
    module.get_gemma_config = sizes.__getitem__
    name = next(name for name in vars(module) if name.startswith("PaliGemmaForConditionalGeneration"))
    build = getattr(module, name)

    def build_small(config: Any) -> Any:
        vision = config.vision_config
        vision.hidden_size, vision.intermediate_size, vision.projection_dim = VISION, 96, WIDTH
        vision.num_hidden_layers, vision.num_attention_heads = LAYERS, 1
        return build(config=config)

    setattr(module, name, build_small)


def processors(config: Any, folder: Path) -> tuple[Any, Any]:
    """LeRobot's pre- and post-processor, as the files in `folder` describe them."""
    from lerobot.policies.factory import make_pre_post_processors

    return make_pre_post_processors(
        config, str(folder), preprocessor_overrides={"tokenizer_processor": {"tokenizer": tokenize}}
    )


def tokenize(prompts: list[str], max_length: int, **_: Any) -> dict[str, torch.Tensor]:
    """Characters as tokens, in the shape of a tokenizer of `transformers`."""
    PROMPTS.extend(prompts)
    ids = torch.zeros(len(prompts), max_length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        length = min(len(prompt), max_length)
        ids[row, :length] = torch.tensor([ord(character) for character in prompt[:length]])
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask}


def compare(label: str, ours: PI0Policy, theirs: Any, before: Any, after: Any) -> float:
    """The largest difference of normalised states, chunks and actions from one observation."""
    g = torch.Generator().manual_seed(1)
    config = ours.config
    pixels = {
        name: torch.rand(3, config.image_size, config.image_size, generator=g) for name in config.cameras
    }
    state = torch.randn(8, generator=g)
    noise = torch.randn(1, HORIZON, ACTIONS, generator=g)
    seen = config.cameras[:2]  # the third is not there in LIBERO
    batch = before(
        {"observation.state": state, "task": TASK}
        | {f"observation.images.{name}": pixels[name] for name in seen}
    )
    tokens = batch["observation.language.tokens"]
    mask = batch["observation.language.attention_mask"].bool()
    chunk = theirs.predict_action_chunk(batch, noise=noise)
    stats = ours.norm_stats
    assert stats is not None  # the test files have them
    own_state = normalize(state, stats.state, config.use_quantile_norm).float()
    padded = torch.nn.functional.pad(own_state, (0, config.action_dim - len(own_state)))
    own_prompts = {f"{clean_prompt(TASK)}\n": "as ours"}
    if config.pi05:
        own_prompts = {
            state_prompt(TASK, own_state.numpy()): "as ours",
            state_prompt(TASK, padded.numpy()): "as ours under pad_discrete_state",
        }
    own_chunk = ours.sample_actions(
        images={name: image[None] * 2 - 1 for name, image in pixels.items()},
        image_masks={name: torch.tensor([name in seen]) for name in pixels},
        state=padded[None],
        tokenized_prompt=tokens,
        tokenized_prompt_mask=mask,
        noise=noise,
    )[..., : config.robot_action_dim]
    own_actions = unnormalize(own_chunk, stats.actions, config.use_quantile_norm)
    if ours.delta_actions:
        own_actions = add_state(own_actions, state[None])
    differences = {
        "state": (batch["observation.state"][0] - own_state).abs().max().item(),
        "chunk": (chunk - own_chunk).abs().max().item(),
        "actions": (after(chunk) - own_actions).abs().max().item(),
    }
    found = ", ".join(f"{k} {v:.1e}" for k, v in differences.items())
    print(f"{label}: prompt {own_prompts.get(PROMPTS[-1], 'DIFFERS')}; largest difference of {found}")
    return max(differences.values()) if PROMPTS[-1] in own_prompts else float("inf")


if __name__ == "__main__":
    main()
