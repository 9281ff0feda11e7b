"""Names of tensors in files of weights, and the layout of a file that they show.

openpi's names are the common ones. `PREFIXES` maps the network's own names to them, a `Layout` those of other files.
Parts that published weights do not have (the convolutional tower, the condition embedding) have this project's
names.

Sources: openpi, src/openpi/models_pytorch/{pi0_pytorch,gemma_pytorch}.py and transformers_replace/; LeRobot,
policies/pi0/modeling_pi0.py as of February 2025 (commit 638d411c), July 2025 (71eff183) and since October 2025.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

PALIGEMMA = "paligemma_with_expert.paligemma."
EXPERT = "paligemma_with_expert.gemma_expert."

# prefix in the network -> openpi's prefix; a name that matches none is the same in both
PREFIXES = (
    ("vision.towers.", "conv_vision_tower."),
    ("vision.", PALIGEMMA + "model.vision_tower.vision_model."),
    ("projector.", PALIGEMMA + "model.multi_modal_projector.linear."),
    ("token_embedding.", PALIGEMMA + "lm_head."),
    ("gemma.", PALIGEMMA + "model.language_model."),
    ("expert.", EXPERT + "model."),
)
# The embedding is tied to the output head, on which no output depends. Files hold one of the names. In a file with
# both they are not tied, and this one is the embedding.
EMBEDDING = PALIGEMMA + "model.language_model.embed_tokens.weight"
OUTPUT_HEAD = PALIGEMMA + "lm_head.weight"
# Published files hold it, but no output depends on it.
UNUSED = EXPERT + "lm_head.weight"
# Modules of LeRobot's before September 2025 that hold statistics, not weights (lerobot/common/policies/normalize.py).
STATISTICS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")


@dataclass(frozen=True)
class Layout:
    """How a family of files names its tensors.

    Args:
        name: its name in options.
        title: its name in messages.
        prefix: start of every name.
        renames: pairs of openpi's prefix and this layout's, for nested modules; both without `prefix`.
    """

    name: str
    title: str
    prefix: str = ""
    renames: tuple[tuple[str, str], ...] = ()

    def to_openpi(self, key: str) -> str:
        """openpi's name for a key of this layout; a key that does not belong to it is returned unchanged."""
        if not key.startswith(self.prefix):
            return key
        name = key.removeprefix(self.prefix)
        for theirs, ours in self.renames:
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name

    def from_openpi(self, name: str) -> str:
        """This layout's key for one of openpi's names."""
        for theirs, ours in self.renames:
            if name.startswith(theirs):
                return self.prefix + ours + name.removeprefix(theirs)
        return self.prefix + name


OPENPI = Layout("openpi", "openpi PyTorch")
LEROBOT = Layout("lerobot", "LeRobot", "model.")
# Its modules are nested as in transformers before 4.52.
LEROBOT_EARLY = Layout(
    "lerobot_early",
    "LeRobot of the first half of 2025",
    "model.",
    (
        (PALIGEMMA + "lm_head.", PALIGEMMA + "language_model.lm_head."),
        (PALIGEMMA + "model.language_model.", PALIGEMMA + "language_model.model."),
        (PALIGEMMA + "model.vision_tower.", PALIGEMMA + "vision_tower."),
        (PALIGEMMA + "model.multi_modal_projector.", PALIGEMMA + "multi_modal_projector."),
    ),
)
WRITABLE = {layout.name: layout for layout in (OPENPI, LEROBOT)}


def file_name(parameter: str) -> str:
    """openpi's name for one of the network's parameters."""
    for ours, theirs in PREFIXES:
        if parameter.startswith(ours):
            return theirs + parameter.removeprefix(ours)
    return parameter


def layout_of(keys: Iterable[str]) -> Layout:
    """The layout that a file's keys belong to; openpi's if they belong to none."""
    weights = [key for key in keys if not key.startswith(STATISTICS)]
    if not any(key.startswith("model.paligemma_with_expert.") for key in weights):
        return OPENPI
    nested = tuple("model." + ours for _, ours in LEROBOT_EARLY.renames)
    return LEROBOT_EARLY if any(key.startswith(nested) for key in weights) else LEROBOT


def holds_pi05(names: Iterable[str]) -> bool:
    """Whether openpi's names belong to pi0.5: its flow time enters through adaptive norms, not with the actions."""
    return any(n.startswith("time_mlp_") or n.startswith(EXPERT) and ".dense." in n for n in names)


def describe(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Describe the model that tensors with these names (openpi's) and shapes belong to."""
    if not shapes:
        return "an empty file"
    parts = []
    for label, prefix in (
        ("a SigLIP tower", PALIGEMMA + "model.vision_tower."),
        ("a convolutional tower", "conv_vision_tower."),
        ("a Gemma prefix expert", PALIGEMMA + "model.language_model."),
        ("an action expert", EXPERT + "model."),
    ):
        keys = [key for key in shapes if key.startswith(prefix)]
        if keys:
            layers = {int(m.group(1)) for key in keys if (m := re.search(r"\.layers\.(\d+)\.", key))}
            widths = {shapes[key][-1] for key in keys if key.endswith((".q_proj.weight", ".fc1.weight"))}
            detail = [f"{len(layers)} layers"] * bool(layers) + [f"width {w}" for w in sorted(widths)]
            parts.append(label + (f" ({', '.join(detail)})" if detail else ""))
    if len(shapes.get("action_in_proj.weight", ())) == 2:
        parts.append(f"actions of {shapes['action_in_proj.weight'][-1]} features")
    if not parts:
        return f"no pi0 policy in openpi's layout: its tensors begin with {', '.join(sorted(shapes)[:3])}"
    if holds_pi05(shapes):
        parts.append("the adaptive norms and time embedding of pi0.5")
    return "a model with " + ", ".join(parts)
