"""Do LeRobot and openpi load the folders of this project and act the same? Does this project load LeRobot's?

    python tools/check_upstream.py      # with the Python of an environment of LeRobot ("lerobot[pi]"), or of openpi
    make upstream                       # makes an environment of openpi's PyTorch code, and runs this there

It checks small policies with random weights, pi0 and pi0.5. For LeRobot this project saves in the layout "lerobot".
LeRobot's own classes load the weights (strictly), the configuration and both processors from that folder, and both
sides sample from the same observation and noise. Then LeRobot saves, and this project loads. For openpi this project
saves in its default layout, and openpi's `PI0Pytorch` loads the weights. The tool prints the largest differences; the
exit status is 1 if one is above 1e-4 or a prompt differs.

Both build only the published sizes, so their tables of sizes are replaced. PaliGemma's tokenizer must be downloaded,
so it is replaced by one with simple tokens. Everything else is theirs. Whichever of the two is installed is checked.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import sys
import tempfile
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from safetensors.torch import load_model

from pi0 import PI0Policy
from pi0.acrlpd.checkpointing import save_openpi_pi0_checkpoint
from pi0.policy import lerobot_files
from pi0.policy.normalization import add_state, normalize, unnormalize
from pi0.policy.tokenizer import clean_prompt, state_prompt
from tests.support.published_files import (
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

VOCAB = 257_152  # the only size that LeRobot builds
TOLERANCE = 1e-4
TASK = "put the bowl on the plate"
PROMPTS: list[str] = []  # the prompts that LeRobot tokenized


def main() -> None:
    """Check LeRobot or openpi, whichever is installed."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    lerobot_files._variant = lambda dims, name: "gemma_2b" if name == "gemma" else "gemma_300m"
    differences = []
    if importlib.util.find_spec("lerobot"):
        print(
            f"LeRobot {version('lerobot')}, transformers {transformers_version()}, torch {torch.__version__}"
        )
        # Relative actions are newer than release 0.4.
        known = importlib.util.find_spec("lerobot.processor.relative_action_processor")
        for relative in (False, True) if known else (False,):
            differences += [check_lerobot(kind, relative) for kind in ("pi0", "pi05")]
    if importlib.util.find_spec("openpi"):
        print(f"openpi, transformers {transformers_version()}, torch {torch.__version__}")
        differences += [check_openpi(kind) for kind in ("pi0", "pi05")]
    if not differences:
        sys.exit("neither LeRobot nor openpi is installed here")
    sys.exit(0 if max(differences) <= TOLERANCE else f"a prompt differs, or numbers by more than {TOLERANCE}")


def transformers_version() -> str:
    """The version that its code gives itself: openpi's transformers are installed under another name."""
    return importlib.import_module("transformers").__version__


def check_openpi(kind: str) -> float:
    """Load this project's file into openpi's model; returns the largest difference of chunks."""
    sizes = importlib.import_module("openpi.models.gemma")
    experts = importlib.import_module("openpi.models_pytorch.gemma_pytorch")
    preprocessing = importlib.import_module("openpi.models_pytorch.preprocessing_pytorch")
    module = importlib.import_module("openpi.models_pytorch.pi0_pytorch")
    g = torch.Generator().manual_seed(1)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as patches:
        start = write_openpi(Path(folder, "start"), weights(pi05=kind == "pi05", vocab=VOCAB))
        ours = PI0Policy.from_pretrained(start)
        written = save_openpi_pi0_checkpoint(ours, folder, 0)  # it saves in the default layout
        config = ours.config
        make_small(patches, sizes, "get_config", experts, config.image_size)
        prepare = functools.partial(
            preprocessing.preprocess_observation_pytorch, image_resolution=(config.image_size,) * 2
        )
        patches.enter_context(patch.object(preprocessing, "preprocess_observation_pytorch", prepare))
        # Not compiled, which would need a C++ compiler. Newer code of openpi reads `pytorch_compile_mode`; that of the
        # package registry always compiles.
        patches.enter_context(patch.object(torch, "compile", lambda function, **_: function))
        theirs = module.PI0Pytorch(
            SimpleNamespace(
                pi05=config.pi05,
                action_dim=config.action_dim,
                action_horizon=config.action_horizon,
                paligemma_variant="gemma_2b",
                action_expert_variant="gemma_300m",
                dtype="float32",
                pytorch_compile_mode=None,
            )
        ).eval()
        load_model(theirs, written / "model.safetensors")
        pixels = (1, 3, config.image_size, config.image_size)
        inputs: dict[str, Any] = {
            "images": {name: torch.rand(pixels, generator=g) * 2 - 1 for name in config.cameras},
            "image_masks": {name: torch.tensor([name != config.cameras[2]]) for name in config.cameras},
            "state": torch.randn(1, ACTIONS, generator=g),
            "tokenized_prompt": torch.randint(VOCAB, (1, config.prompt_length), generator=g),
            "tokenized_prompt_mask": torch.arange(config.prompt_length)[None] < 20,
        }
        noise = torch.randn(1, HORIZON, ACTIONS, generator=g)
        rest = {"token_ar_mask": None, "token_loss_mask": None}
        with torch.no_grad():
            chunk = theirs.sample_actions("cpu", SimpleNamespace(**inputs, **rest), noise=noise)
    difference = (chunk - ours.sample_actions(**inputs, noise=noise)).abs().max().item()
    print(f"{kind}: openpi from our file: largest difference of chunk {difference:.1e}")
    return difference


def check_lerobot(kind: str, relative: bool) -> float:
    """Pass a policy to LeRobot and back; returns the largest difference. `relative`: the state is subtracted from actions."""
    what = f"{kind}{', relative actions' if relative else ''}"
    module = importlib.import_module(f"lerobot.policies.{kind}.modeling_{kind}")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as patches:
        make_small(patches, module, "get_gemma_config", module)
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


def make_small(
    patches: ExitStack, sizes: Any, getter: str, models: Any, image_size: int | None = None
) -> None:
    """Make their modules build the sizes of the test files."""
    dims = {"num_heads": HEADS, "num_kv_heads": 1, "head_dim": HEAD_DIM, "depth": LAYERS}
    table = {
        "gemma_2b": SimpleNamespace(width=WIDTH, mlp_dim=64, **dims),
        "gemma_300m": SimpleNamespace(width=EXPERT, mlp_dim=40, **dims),
    }
    patches.enter_context(patch.object(sizes, getter, table.__getitem__))
    name = next(name for name in vars(models) if name.startswith("PaliGemmaForConditionalGeneration"))
    build = getattr(models, name)

    def build_small(config: Any) -> Any:
        vision = config.vision_config
        vision.hidden_size, vision.intermediate_size, vision.projection_dim = VISION, 96, WIDTH
        vision.num_hidden_layers, vision.num_attention_heads = LAYERS, 1
        vision.image_size = image_size or vision.image_size
        return build(config=config)

    patches.enter_context(patch.object(models, name, build_small))


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
    seen = config.cameras[:2]  # LIBERO does not have the third
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
