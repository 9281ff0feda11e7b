"""pi0.5 once more, in NumPy and float64: what `tests/golden/pi05.safetensors` was computed with.

    PYTHONPATH=. python tests/support/pi05_reference.py     # writes the golden file again

Shares no code with `pi0.model`. It follows openpi's formulation (src/openpi/models/pi0.py, gemma.py,
siglip.py): all tokens in one sequence, both experts in one attention under one mask, nothing cached, one
example at a time; and its names of tensors, which are those of its PyTorch checkpoints.
"""

import math
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden" / "pi05.safetensors"
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb")
CONFIG = {
    "pi05": True,
    "siglip": {"width": 8, "depth": 1, "mlp_dim": 12, "num_heads": 2, "patch_size": 4, "image_size": 8},
    "gemma": {
        "width": 12, "depth": 2, "mlp_dim": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8,
    },
    "action_expert": {
        "width": 8, "depth": 2, "mlp_dim": 12, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8,
    },
    "vocab_size": 16,
    "action_dim": 8,
    "action_horizon": 3,
    "prompt_length": 5,
    "cameras": list(CAMERAS),
    "tokenizer": "tiny",
}  # fmt: skip
BATCH, STEPS = 2, 4
VISION = "paligemma_with_expert.paligemma.model.vision_tower.vision_model."
PROJECTOR = "paligemma_with_expert.paligemma.model.multi_modal_projector.linear"
PREFIX = "paligemma_with_expert.paligemma.model.language_model."
EXPERT = "paligemma_with_expert.gemma_expert.model."


class Reference:
    """The model with `weights`, float64 arrays by published name."""

    def __init__(self, weights: dict[str, np.ndarray]):
        self.w = weights

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.w[name + ".weight"].T + self.w.get(name + ".bias", 0.0)

    def image_tokens(self, image: np.ndarray) -> np.ndarray:
        """[3, size, size] -> [patches, width of the Gemma prefix]."""
        sizes = CONFIG["siglip"]
        patch, heads = sizes["patch_size"], sizes["num_heads"]
        kernel, bias = (self.w[VISION + f"embeddings.patch_embedding.{part}"] for part in ("weight", "bias"))
        count = sizes["image_size"] // patch
        rows = []
        for row in range(count):
            for column in range(count):
                square = image[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
                rows.append(np.array([(k * square).sum() for k in kernel]) + bias)
        x = np.array(rows) + self.w[VISION + "embeddings.position_embedding.weight"]
        for layer in range(sizes["depth"]):
            at = VISION + f"encoder.layers.{layer}."
            h = self.layer_norm(at + "layer_norm1", x)
            q, k, v = (self.linear(at + f"self_attn.{part}_proj", h) for part in "qkv")
            size = q.shape[-1] // heads
            parts = []
            for head in range(heads):
                own = slice(head * size, (head + 1) * size)
                parts.append(softmax(q[:, own] @ k[:, own].T / math.sqrt(size)) @ v[:, own])
            x = x + self.linear(at + "self_attn.out_proj", np.concatenate(parts, -1))
            h = gelu(self.linear(at + "mlp.fc1", self.layer_norm(at + "layer_norm2", x)))
            x = x + self.linear(at + "mlp.fc2", h)
        return self.linear(PROJECTOR, self.layer_norm(VISION + "post_layernorm", x))

    def layer_norm(self, name: str, x: np.ndarray) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return x * self.w[name + ".weight"] + self.w[name + ".bias"]

    def rms_norm(self, name: str, x: np.ndarray, time: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Normed tokens and the gate; with `time` the adaptive norm, else the plain one, whose gate is 1."""
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        if time is None:
            return x * (1 + self.w[name + ".weight"]), np.ones(x.shape[-1])
        scale, shift, gate = np.split(self.linear(name + ".dense", time), 3)
        return x * (1 + scale) + shift, gate

    def velocity(self, example: dict, x_t: np.ndarray, t: float) -> np.ndarray:
        """Velocity [H, A] of one example at noisy actions [H, A] and flow time t."""
        width = CONFIG["action_expert"]["width"]
        tokens, present = [], []
        for name in CAMERAS:
            seen = self.image_tokens(example["images"][name])
            tokens.append(seen)
            present += [example["image_masks"][name]] * len(seen)
        table = self.w["paligemma_with_expert.paligemma.lm_head.weight"]
        tokens.append(table[example["tokenized_prompt"]] * math.sqrt(CONFIG["gemma"]["width"]))
        present += list(example["tokenized_prompt_mask"])
        prefix = np.concatenate(tokens)
        suffix = self.linear("action_in_proj", x_t)
        present = np.array(present + [True] * len(suffix))
        in_suffix = np.arange(len(present)) >= len(prefix)
        # A token sees all that are there, but no prefix token sees an action.
        allowed = present[None] & present[:, None] & (in_suffix[:, None] | ~in_suffix[None])
        positions = np.cumsum(present) - 1

        fractions = np.linspace(0, 1, width // 2)
        angles = 2 * math.pi * t / (4e-3 * (4.0 / 4e-3) ** fractions)
        time = np.concatenate([np.sin(angles), np.cos(angles)])
        time = swish(self.linear("time_mlp_out", swish(self.linear("time_mlp_in", time))))

        streams, names, conditions = [prefix, suffix], [PREFIX, EXPERT], [None, time]
        for layer in range(CONFIG["gemma"]["depth"]):
            q, k, v, gates = [], [], [], []
            for x, at, condition in zip(streams, names, conditions, strict=True):
                h, gate = self.rms_norm(f"{at}layers.{layer}.input_layernorm", x, condition)
                for part, found in zip("qkv", (q, k, v), strict=True):
                    found.append(self.linear(f"{at}layers.{layer}.self_attn.{part}_proj", h))
                gates.append(gate)
            q, k, v = (np.concatenate(found) for found in (q, k, v))
            attended = np.split(self.attention(q, k, v, allowed, positions), [len(prefix)])
            for i, (at, condition) in enumerate(zip(names, conditions, strict=True)):
                at = f"{at}layers.{layer}."
                x = streams[i] + gates[i] * self.linear(at + "self_attn.o_proj", attended[i])
                h, gate = self.rms_norm(at + "post_attention_layernorm", x, condition)
                h = gelu(self.linear(at + "mlp.gate_proj", h)) * self.linear(at + "mlp.up_proj", h)
                streams[i] = x + gate * self.linear(at + "mlp.down_proj", h)
        return self.linear("action_out_proj", self.rms_norm(EXPERT + "norm", streams[1], time)[0])

    @staticmethod
    def attention(q, k, v, allowed, positions) -> np.ndarray:
        """All heads share one key-value head; queries and keys are turned to their positions."""
        size = CONFIG["gemma"]["head_dim"]
        k = turn(k, positions)
        heads = []
        for head in range(CONFIG["gemma"]["num_heads"]):
            scores = turn(q[:, head * size : (head + 1) * size], positions) @ k.T / math.sqrt(size)
            heads.append(softmax(np.where(allowed, scores, -2.3819763e38)) @ v)
        return np.concatenate(heads, -1)

    def loss(self, example: dict, actions: np.ndarray, noise: np.ndarray, t: float) -> np.ndarray:
        velocity = self.velocity(example, t * noise + (1 - t) * actions, t)
        return (velocity - (noise - actions)) ** 2

    def sample(self, example: dict, noise: np.ndarray, steps: int) -> np.ndarray:
        x = noise
        for step in range(steps):
            x = x - self.velocity(example, x, 1 - step / steps) / steps
        return x


def turn(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Rotary embedding of [T, size]: pairs (i, i + size / 2)."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * 10_000.0 ** (-np.arange(half) / half)
    a, b = x[:, :half], x[:, half:]
    return np.concatenate(
        [a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], -1
    )


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def swish(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def shapes() -> dict[str, tuple[int, ...]]:
    """Published name of each tensor to its shape, written out and not asked of the network."""
    s, g, e = CONFIG["siglip"], CONFIG["gemma"], CONFIG["action_expert"]
    d, f = s["width"], s["mlp_dim"]
    found = {
        VISION + "embeddings.patch_embedding.weight": (d, 3, s["patch_size"], s["patch_size"]),
        VISION + "embeddings.patch_embedding.bias": (d,),
        VISION + "embeddings.position_embedding.weight": ((s["image_size"] // s["patch_size"]) ** 2, d),
        PROJECTOR + ".weight": (g["width"], d),
        PROJECTOR + ".bias": (g["width"],),
        "paligemma_with_expert.paligemma.lm_head.weight": (CONFIG["vocab_size"], g["width"]),
    }
    matrices = {f"self_attn.{part}_proj": (d, d) for part in ("q", "k", "v", "out")}
    matrices |= {"mlp.fc1": (f, d), "mlp.fc2": (d, f), "layer_norm1": (d,), "layer_norm2": (d,)}
    for layer in range(s["depth"]):
        for name, shape in matrices.items():
            found[f"{VISION}encoder.layers.{layer}.{name}.weight"] = shape
            found[f"{VISION}encoder.layers.{layer}.{name}.bias"] = shape[:1]
    found |= {VISION + f"post_layernorm.{part}": (d,) for part in ("weight", "bias")}
    for at, sizes in ((PREFIX, g), (EXPERT, e)):
        width, mlp = sizes["width"], sizes["mlp_dim"]
        queries, keys = (sizes[n] * sizes["head_dim"] for n in ("num_heads", "num_kv_heads"))
        norm = {".weight": (width,)}
        if at == EXPERT:
            norm = {".dense.weight": (3 * width, width), ".dense.bias": (3 * width,)}
        for layer in range(sizes["depth"]):
            here = f"{at}layers.{layer}."
            found[here + "self_attn.q_proj.weight"] = (queries, width)
            found[here + "self_attn.k_proj.weight"] = found[here + "self_attn.v_proj.weight"] = (keys, width)
            found[here + "self_attn.o_proj.weight"] = (width, queries)
            found[here + "mlp.gate_proj.weight"] = found[here + "mlp.up_proj.weight"] = (mlp, width)
            found[here + "mlp.down_proj.weight"] = (width, mlp)
            for name in ("input_layernorm", "post_attention_layernorm"):
                found |= {here + name + part: shape for part, shape in norm.items()}
        found |= {f"{at}norm{part}": shape for part, shape in norm.items()}
    width, actions = e["width"], CONFIG["action_dim"]
    for name, shape in (
        ("action_in_proj", (width, actions)),
        ("action_out_proj", (actions, width)),
        ("time_mlp_in", (width, width)),
        ("time_mlp_out", (width, width)),
    ):
        found |= {name + ".weight": shape, name + ".bias": shape[:1]}
    return found


def make() -> dict[str, np.ndarray]:
    """Random weights and inputs in float32, and what the reference makes of them in float64."""
    rng = np.random.default_rng(5)
    weights = {
        name: (rng.standard_normal(shape) / math.sqrt(np.prod(shape[1:], dtype=int))).astype(np.float32)
        if len(shape) > 1
        else (0.3 * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes().items()
    }
    size, chunk = CONFIG["siglip"]["image_size"], (BATCH, CONFIG["action_horizon"], CONFIG["action_dim"])
    inputs: dict[str, np.ndarray] = {
        f"images.{name}": rng.uniform(-1, 1, (BATCH, 3, size, size)).astype(np.float32) for name in CAMERAS
    }
    inputs |= {f"image_masks.{name}": np.ones(BATCH, bool) for name in CAMERAS}
    inputs["image_masks.left_wrist_0_rgb"][1] = False
    inputs["tokenized_prompt"] = rng.integers(0, CONFIG["vocab_size"], (BATCH, CONFIG["prompt_length"]))
    inputs["tokenized_prompt_mask"] = np.arange(CONFIG["prompt_length"]) < np.array([[3], [5]])
    inputs |= {name: rng.standard_normal(chunk).astype(np.float32) for name in ("actions", "noise")}
    inputs["time"] = np.array([0.3, 0.85], np.float32)
    reference = Reference({name: value.astype(np.float64) for name, value in weights.items()})
    losses, samples = [], []
    for row in range(BATCH):
        example = {
            "images": {name: inputs[f"images.{name}"][row].astype(np.float64) for name in CAMERAS},
            "image_masks": {name: inputs[f"image_masks.{name}"][row] for name in CAMERAS},
            "tokenized_prompt": inputs["tokenized_prompt"][row],
            "tokenized_prompt_mask": inputs["tokenized_prompt_mask"][row],
        }
        actions, noise = (inputs[name][row].astype(np.float64) for name in ("actions", "noise"))
        losses.append(reference.loss(example, actions, noise, float(inputs["time"][row])))
        samples.append(reference.sample(example, noise, STEPS))
    expected = {"expected_loss": np.array(losses), "expected_actions": np.array(samples)}
    return {f"weights.{name}": value for name, value in weights.items()} | inputs | expected


if __name__ == "__main__":
    from safetensors.numpy import save_file

    GOLDEN.parent.mkdir(exist_ok=True)
    save_file(make(), GOLDEN)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size} bytes")
