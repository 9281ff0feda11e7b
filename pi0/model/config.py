"""Sizes of a pi0 model. The same dataclass describes the published 3.5 B model and the small CPU model."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

POSE_DIM = 6  # first features of LIBERO's state and of its actions: position 3, rotation 3
PUBLISHED_CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


@dataclasses.dataclass(frozen=True)
class SiglipDims:
    """A SigLIP vision transformer. One token per patch: (image_size / patch_size)^2 tokens per camera."""

    width: int = 1152
    depth: int = 27
    mlp_dim: int = 4304
    num_heads: int = 16
    patch_size: int = 14  # pixels
    image_size: int = 224  # pixels, height and width

    def __post_init__(self):
        _require(
            self.width % self.num_heads == 0, f"siglip: width {self.width} is not a multiple of num_heads"
        )
        _require(
            self.image_size % self.patch_size == 0,
            f"siglip: image_size {self.image_size} is not a multiple of patch_size {self.patch_size}",
        )


@dataclasses.dataclass(frozen=True)
class ConvDims:
    """A convolutional tower with spatial softmax; learns from tens of demonstrations, where a ViT does not."""

    width: int = 64  # features of each camera token
    tokens: int = 8  # tokens per camera
    channels: tuple[int, ...] = (32, 64, 64)  # one convolution each
    kernels: tuple[int, ...] = (3, 3, 3)
    strides: tuple[int, ...] = (2, 2, 1)
    keypoints: int = 32  # spatial softmax maps; each gives x, y and its mean activation
    shared: bool = False  # one set of weights for all cameras, or one per camera
    image_size: int = 64  # pixels, height and width

    def __post_init__(self):
        lengths = {len(self.channels), len(self.kernels), len(self.strides)}
        _require(len(lengths) == 1, "conv: channels, kernels and strides differ in length")


@dataclasses.dataclass(frozen=True)
class GemmaDims:
    """A Gemma transformer. The two experts attend jointly, so all but width and mlp_dim must agree."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    lora_rank: int = 0  # rank of low-rank adaptation, which freezes the transformer's own weights; 0: none

    def __post_init__(self):
        _require(self.lora_rank >= 0, f"lora_rank is {self.lora_rank}; it is 0 or more")


@dataclasses.dataclass(frozen=True)
class Pi0Config:
    """Everything that decides the shapes and the inputs of a `PI0Policy`.

    `config.json` holds the same names, with the vision tower under the key of its kind ("siglip" or "conv").

    Raises:
        ValueError: sizes that contradict each other, an unknown preset or an unknown key; names it.
    """

    vision: SiglipDims | ConvDims
    gemma: GemmaDims  # sees images and prompt
    action_expert: GemmaDims  # sees state and actions
    vocab_size: int
    action_dim: int  # features of a state and of an action as the network sees them, zero-padded
    action_horizon: int  # actions in a chunk
    num_steps: int = 10  # Euler steps of sampling
    prompt_length: int = 48  # tokens of a prompt, padded
    cameras: tuple[str, ...] = PUBLISHED_CAMERAS  # in the order in which the prefix holds them
    guidance: bool = False  # learned optimality condition for classifier-free guidance
    robot_state_dim: int = 8  # LIBERO: end-effector position 3, axis-angle 3, gripper 2
    robot_action_dim: int = 7  # LIBERO: position 3, rotation 3, gripper 1
    pi05: bool = False  # pi0.5: flow time acts through adaptive norms, and no token holds the state
    discrete_state_input: bool = (
        False  # pi0.5 alone: the prompt spells the state in bins (pi0.policy.tokenizer)
    )
    pad_discrete_state: bool = (
        False  # the prompt also spells the zero-padding, as LeRobot's code from 2025-10 to 2026-03 did
    )
    use_quantile_norm: bool = False  # normalise by 1st and 99th percentile instead of mean and deviation
    delta_actions: bool | None = (
        None  # actions minus the state (pi0.policy.normalization); None: the statistics decide
    )
    freeze_vision_encoder: bool = False  # do not train the vision tower
    train_expert_only: bool = False  # train only the action expert and the projections around it
    mirror_images: bool = (
        False  # see LIBERO's frames turned by 180 degrees, as openpi does (pi0.policy.images)
    )
    tokenizer: str = "paligemma"  # "paligemma" or "tiny"
    tokenizer_path: str | None = None  # sentencepiece file of "paligemma"; else $PALIGEMMA_TOKENIZER
    # The file it was read from, for errors; no key of config.json.
    source: str = dataclasses.field(default="the policy", compare=False, repr=False)

    def __post_init__(self):
        for name in ("depth", "num_heads", "num_kv_heads", "head_dim"):
            ours, theirs = getattr(self.gemma, name), getattr(self.action_expert, name)
            _require(
                ours == theirs,
                f"gemma.{name} is {ours} but action_expert.{name} is {theirs}; they must agree",
            )
        _require(
            self.gemma.num_heads % self.gemma.num_kv_heads == 0, "num_heads is not a multiple of num_kv_heads"
        )
        _require(self.action_expert.width % 2 == 0, "action_expert.width must be even for the time embedding")
        _require(
            self.action_dim >= max(self.robot_state_dim, self.robot_action_dim),
            f"action_dim {self.action_dim} is below robot_state_dim {self.robot_state_dim} "
            f"or robot_action_dim {self.robot_action_dim}",
        )
        _require(
            len(set(self.cameras)) == len(self.cameras) > 0, f"cameras must be distinct names: {self.cameras}"
        )
        _require(
            self.tokenizer in ("tiny", "paligemma"),
            f'tokenizer is "tiny" or "paligemma", not {self.tokenizer!r}',
        )
        _require(
            self.pi05 or not self.discrete_state_input,
            "discrete_state_input is true but pi05 is false; only pi0.5 reads the state from its prompt",
        )
        _require(
            not (self.train_expert_only and self.gemma.lora_rank),
            "train_expert_only is true, and gemma.lora_rank asks to train the prefix; choose one",
        )
        _require(
            not self.delta_actions or min(self.robot_state_dim, self.robot_action_dim) >= POSE_DIM,
            f"delta_actions needs {POSE_DIM} features of pose in robot_state_dim and robot_action_dim",
        )

    @property
    def image_size(self) -> int:
        """Height and width of the images that the network takes, in pixels."""
        return self.vision.image_size

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Pi0Config:
        """A preset, with fields changed by name.

        `pi0` is the published model: 3.24 B parameters, and 0.26 B more in its files that nothing uses.
        `pi05` is pi0.5, of 3.35 B. `pi0_tiny` and `pi05_tiny` are for a CPU: 1.4 and 1.8 M parameters, two
        64-pixel cameras, chunks of 10.
        """
        if name not in _PRESETS:
            raise ValueError(f"unknown preset {name!r}; known: {', '.join(sorted(_PRESETS))}")
        return dataclasses.replace(cls(**_PRESETS[name]), **changes)

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json."""
        fields = dataclasses.asdict(self)
        del fields["source"]
        kind = "siglip" if isinstance(self.vision, SiglipDims) else "conv"
        return {"pi05": fields.pop("pi05"), kind: fields.pop("vision"), **fields}

    @classmethod
    def from_dict(cls, content: dict[str, Any], source: str = "config.json") -> Pi0Config:
        """Read config.json's content; `source` names the file in errors.

        Keys that a pi0.5 model's file leaves out get openpi's values: see `_PI05`. Every published policy
        learned from mirrored images, so a policy with PaliGemma's tokenizer mirrors them unless its file has
        `mirror_images`.
        """
        content = (_PI05 if content.get("pi05") else {}) | content
        content.setdefault("mirror_images", content.get("tokenizer", "paligemma") == "paligemma")
        content.pop("batch", None)  # files of reference outputs hold their batch size here
        kinds = [kind for kind in ("siglip", "conv") if kind in content]
        if len(kinds) != 1:
            raise ValueError(
                f'{source}: needs exactly one vision tower, "siglip" or "conv"; found {kinds or "none"}'
            )
        tower = SiglipDims if kinds[0] == "siglip" else ConvDims
        try:
            config = _build(
                cls,
                content
                | {
                    "vision": _build(tower, content.pop(kinds[0]), f"{source}: {kinds[0]}"),
                    "gemma": _build(GemmaDims, content.pop("gemma", {}), f"{source}: gemma"),
                    "action_expert": _build(
                        GemmaDims, content.pop("action_expert", {}), f"{source}: action_expert"
                    ),
                },
                source,
            )
            return dataclasses.replace(config, source=source)
        except ValueError as error:
            raise error if str(error).startswith(source) else ValueError(f"{source}: {error}") from error


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _build(cls: type, content: Any, where: str) -> Any:
    """Make dataclass `cls` from a JSON object; unknown and missing keys raise `ValueError`."""
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected an object, got {content!r}")  # noqa: TRY004
    fields = {field.name: field for field in dataclasses.fields(cls) if field.name != "source"}
    for key in content:
        if key in ("siglip", "conv") and cls is Pi0Config:
            continue
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            raise ValueError(
                f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
    required = [n for n, f in fields.items() if f.default is dataclasses.MISSING]
    missing = [name for name in required if name not in content]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items() if k in fields}
    for name, value in values.items():
        expected = fields[name].type
        known = expected in ("int", "bool", "str", "bool | None", "str | None")
        if known and (type(value).__name__ if value is not None else "None") not in expected.split(" | "):
            raise ValueError(f"{where}: {name} must be {expected}, not {value!r}")
    return cls(**values)


# openpi, src/openpi/models/pi0_config.py and ModelTransformFactory and create_base_config in
# training/config.py. Its pi05_libero alone leaves the state out of the prompt: discrete_state_input is false
# there.
_PI05 = {"pi05": True, "discrete_state_input": True, "use_quantile_norm": True, "prompt_length": 200}

_PRESETS: dict[str, dict[str, Any]] = {
    "pi0": {
        "vision": SiglipDims(),
        "gemma": GemmaDims(width=2048, depth=18, mlp_dim=16384, num_heads=8, num_kv_heads=1, head_dim=256),
        "action_expert": GemmaDims(
            width=1024, depth=18, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=256
        ),
        "vocab_size": 257152,
        "action_dim": 32,
        "action_horizon": 50,
        "mirror_images": True,
    },
    "pi0_tiny": {
        # 1.4 M parameters. In equal CPU time narrow towers and experts learn demonstrations better than wide ones.
        "vision": ConvDims(channels=(16, 32, 64)),
        "gemma": GemmaDims(width=128, depth=4, mlp_dim=256, num_heads=4, num_kv_heads=1, head_dim=32),
        "action_expert": GemmaDims(width=128, depth=4, mlp_dim=256, num_heads=4, num_kv_heads=1, head_dim=32),
        "vocab_size": 384,
        "action_dim": 8,
        "action_horizon": 10,
        "num_steps": 5,
        "prompt_length": 14,
        "cameras": ("base_0_rgb", "left_wrist_0_rgb"),
        "tokenizer": "tiny",
    },
}
_PRESETS["pi05"] = _PRESETS["pi0"] | _PI05
_PRESETS["pi05_tiny"] = _PRESETS["pi0_tiny"] | _PI05 | {"prompt_length": 80}
