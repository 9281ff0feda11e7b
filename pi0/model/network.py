"""The pi0 network: a vision-language prefix and a flow-matching action expert that attends to it.

Black et al. 2024, "pi0: A Vision-Language-Action Flow Model for General Robot Control". Three blocks of tokens:

    prefix   image tokens of each camera, prompt tokens    run by the Gemma expert
    state    one token                                     run by the action expert
    actions  one token per action of the noisy chunk       run by the action expert

pi0.5 (Physical Intelligence 2025, "pi0.5: a VLA with Open-World Generalization") has no state block; its prompt
may spell the state instead. Its flow time does not enter the action tokens. It scales, shifts and gates every
layer of the action expert (`AdaptiveRMSNorm`). Both models follow openpi,
src/openpi/models_pytorch/pi0_pytorch.py.

A block attends to itself and to all blocks before it. In every layer the two experts have their own weights, but
share one attention. The prefix never attends to later blocks, so its keys and values are computed once and the
action expert runs alone against them: `encode_prefix` once, then `velocity` any number of times. Training and
sampling both do this. Shapes: B prefixes, N suffixes, H actions in a chunk, A features of an action, P prefix
tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pi0.model import cpu_math, cpu_waiting
from pi0.model.config import ConvDims, GemmaDims, Pi0Config
from pi0.model.lora import LoRALinear, is_lora
from pi0.model.precision import without_autocast
from pi0.model.vision import ConvTowers, SiglipTower

NULL, POSITIVE, NEGATIVE = 0, 1, 2  # rows of `condition_embedding`
ROPE_BASE = 10_000.0
TIME_PERIODS = (4e-3, 4.0)  # shortest and longest period of the time embedding, for t in [0, 1]

cpu_math.choose_kernels()


class PrefixCache(NamedTuple):
    """What the action expert needs of a prefix."""

    keys: list[Tensor]  # per layer [B, kv_heads, P, head_dim], rotated to their positions
    values: list[Tensor]  # per layer [B, kv_heads, P, head_dim]
    valid: Tensor  # bool [B, P], False for padding and for missing cameras

    @property
    def length(self) -> Tensor:
        """Valid tokens [B]: the position of the token after the prefix."""
        return self.valid.sum(1)


class ChunkMasks(NamedTuple):
    """Who sees whom in a suffix of several chunks: all tokens see prefix and state, actions also their own chunk.

    The chunks of a prefix are laid out as sequences of their own, so that no chunk pays for another.
    """

    state: Tensor  # additive [B, 1, 1, P + states]
    chunk: Tensor  # additive [B * S, 1, 1, P + states + H]
    states: int  # tokens of the state block
    samples: int  # S


class Pi0Network(nn.Module):
    """The parameters of pi0 and the two passes through them."""

    def __init__(self, config: Pi0Config):
        super().__init__()
        cpu_waiting.watch_cores()
        self.config = config
        width = config.action_expert.width
        if isinstance(config.vision, ConvDims):
            self.vision = ConvTowers(config.vision, config.cameras)
        else:
            self.vision = SiglipTower(config.vision)
        self.projector = nn.Linear(config.vision.width, config.gemma.width)
        self.token_embedding = nn.Embedding(config.vocab_size, config.gemma.width)
        self.gemma = Gemma(config.gemma)
        self.expert = Gemma(config.action_expert, adaptive=config.pi05)
        if not config.pi05:
            self.state_proj = nn.Linear(config.action_dim, width)
        self.action_in_proj = nn.Linear(config.action_dim, width)
        if config.pi05:
            self.time_mlp_in = nn.Linear(width, width)
            self.time_mlp_out = nn.Linear(width, width)
        else:
            self.action_time_mlp_in = nn.Linear(2 * width, width)
            self.action_time_mlp_out = nn.Linear(width, width)
        self.action_out_proj = nn.Linear(width, config.action_dim)
        self.apply(_initialise)
        if config.guidance:
            self.add_condition(config)
        self.choose_trained(config)

    def add_condition(self, config: Pi0Config) -> None:
        """Add the optimality condition. It starts at zero, so that no condition changes the model's actions."""
        self.config = config
        weight = torch.zeros(3, config.action_expert.width, device=self.action_in_proj.weight.device)
        self.condition_embedding = nn.Embedding.from_pretrained(weight, freeze=False)

    def choose_trained(self, config: Pi0Config) -> None:
        """Set which parameters are trained, as `config` asks, and their types.

        Low-rank adaptation is added where `config` has it and the network does not, and merged into the weights
        where the network has it and `config` does not.
        """
        self.config = config
        # No output depends on this matrix, so it is never trained and always has the lower type.
        low_dtype = self.gemma.layers[-1].self_attn["q_proj"].weight.dtype
        for expert, dims in self._transformers():
            for part in _parts(expert):
                for name, linear in part.items():
                    adapted = isinstance(linear, LoRALinear)
                    if dims.lora_rank and not adapted:
                        part[name] = LoRALinear(linear, dims.lora_rank)
                    elif adapted and not dims.lora_rank:
                        part[name] = linear.merged()
        self._freeze()
        self._set_types(low_dtype)

    def _transformers(self) -> list[tuple[Gemma, GemmaDims]]:
        return [(self.gemma, self.config.gemma), (self.expert, self.config.action_expert)]

    def _frozen_parts(self) -> tuple[str, ...]:
        """Prefixes of the names of the parameters that the configuration freezes.

        Low-rank adaptation freezes its transformer. That of the prefix also freezes the token embedding, but not
        the vision tower, as in openpi (src/openpi/models/pi0_config.py: get_freeze_filter).
        `freeze_vision_encoder` and `train_expert_only` are LeRobot's
        (src/lerobot/policies/pi0/modeling_pi0.py: _set_requires_grad).
        """
        config = self.config
        frozen: tuple[str, ...] = ()
        if config.freeze_vision_encoder or config.train_expert_only:
            frozen += ("vision.",)
        if config.train_expert_only:
            frozen += ("projector.",)
        if config.train_expert_only or config.gemma.lora_rank:
            frozen += ("token_embedding.", "gemma.")
        if config.action_expert.lora_rank:
            frozen += ("expert.",)
        return frozen

    def _freeze(self) -> None:
        """Train what the configuration asks for, except parameters that no output depends on."""
        frozen = self._frozen_parts()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_lora(name) or not name.startswith(frozen))
        for parameter in self.unused_parameters():
            parameter.requires_grad_(False)

    def _set_types(self, low_dtype: torch.dtype) -> None:
        """Give `low_precision_parameters` the type `low_dtype`, the others float32 or a wider type."""
        low, exact = self.low_precision_parameters(), torch.promote_types(low_dtype, torch.float32)
        for name, parameter in self.named_parameters():
            parameter.data = parameter.data.to(low_dtype if name in low else exact)

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, which hold most of the parameters and run one after another."""
        vision = self.vision.encoder["layers"] if isinstance(self.vision, SiglipTower) else []
        return [*vision, *self.gemma.layers, *self.expert.layers]

    def checkpoint_gradients(self) -> None:
        """Keep only the inputs of each block for the backward pass, which then runs the block again."""
        for block in self.blocks():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)

    def unused_parameters(self) -> list[nn.Parameter]:
        """Published weights that no output depends on: they come after the prefix's last keys and values."""
        last = self.gemma.layers[-1]
        modules = [
            self.gemma.norm,
            last.self_attn["q_proj"],
            last.self_attn["o_proj"],
            last.post_attention_layernorm,
        ]
        return [p for module in [*modules, last.mlp] for p in module.parameters()]

    def low_precision_parameters(self) -> set[str]:
        """Names of the parameters that may be in bfloat16; the others stay in float32.

        They are those that openpi keeps in bfloat16. If only a part of the network is trained, that part stays in
        float32, as in openpi (scripts/train.py: init_train_state casts what is frozen): the values next to a
        bfloat16 weight of 0.1 are 0.0005 apart, and the steps of a small learning rate would round away. If the
        whole network is trained, that rule would leave no parameter in bfloat16, so it does not apply.
        """
        norms = ("input_layernorm", "post_attention_layernorm", "gemma.norm", "expert.norm")
        exact = (*norms, "patch_embedding", "position_embedding")
        partly = bool(self._frozen_parts())
        return {
            name
            for name, parameter in self.named_parameters()
            if name.startswith(("vision.", "projector.", "token_embedding.", "gemma.", "expert."))
            and not any(part in name for part in exact)
            and not is_lora(name)
            and not (partly and parameter.requires_grad)
        }

    def encode_prefix(
        self,
        images: Mapping[str, Tensor],
        image_masks: Mapping[str, Tensor],
        tokens: Tensor,
        token_masks: Tensor,
    ) -> PrefixCache:
        """Run the Gemma expert over images and prompt.

        Args:
            images: for every camera of the configuration, float [B, 3, size, size] in [-1, 1].
            image_masks: by camera, bool [B]; False hides the camera's tokens.
            tokens: prompt token ids, int [B, L].
            token_masks: bool [B, L], False for padding.

        Raises:
            ValueError: a camera has no image or no mask.
        """
        cameras = self.config.cameras
        missing = [name for name in cameras if name not in images or name not in image_masks]
        if missing:
            raise ValueError(
                f"no image or image mask for camera {', '.join(missing)}; got {', '.join(images)}"
            )
        image_tokens = self.vision([images[name] for name in cameras])
        prompt = self.token_embedding(tokens) * math.sqrt(self.config.gemma.width)
        valid = [image_masks[name][:, None].expand(-1, self.vision.tokens) for name in cameras]
        valid = torch.cat([*valid, token_masks], 1).bool()  # [B, P]
        projected = [self.projector(t.to(self.projector.weight.dtype)) for t in image_tokens]
        x = torch.cat([*projected, prompt], 1).to(self.gemma.dtype)  # [B, P, width]
        rope = rotary_angles(valid.cumsum(1) - 1, self.config.gemma.head_dim)
        mask = _additive_mask(valid[:, None, None, :], x.dtype)
        keys, values = [], []
        for layer in self.gemma.layers:
            last = layer is self.gemma.layers[-1]
            x, k, v = layer(x, rope, None if last else mask)
            keys.append(k)
            values.append(v)
        return PrefixCache(keys, values, valid)

    def velocity(
        self, prefix: PrefixCache, state: Tensor, x_t: Tensor, t: Tensor, condition: Tensor | None = None
    ) -> Tensor:
        """The flow field at noisy actions: run the action expert against a prefix.

        Several suffixes may share a prefix: N = samples * B, and suffix n belongs to prefix n % B.

        Args:
            prefix: prefix of B observations.
            state: normalised and padded, float [B, A]; pi0.5 does not use it.
            x_t: noisy actions, float [N, H, A].
            t: flow time in [0, 1], 1 is noise, float [N].
            condition: NULL, POSITIVE or NEGATIVE, int [N]; None means NULL. Only with `config.guidance`.

        Returns:
            Velocity from actions to noise, float [N, H, A].

        Raises:
            ValueError: N is not a multiple of B, or the model has no optimality condition and one is given.
        """
        batch = len(prefix.valid)
        samples = len(x_t) // batch
        if len(x_t) != samples * batch:
            raise ValueError(f"{len(x_t)} noisy chunks cannot share {batch} prefixes evenly")
        # One sequence per prefix: the state token, then the chunks, which do not attend to each other.
        with without_autocast(x_t.device):
            chunks, time = self._embed_actions(x_t, t, condition)
            if not self.config.pi05:
                state = self.state_proj(state)[:, None]
        x = chunks.unflatten(0, (samples, batch)).transpose(0, 1).flatten(1, 2)  # [B, S * H, width]
        if time is not None:
            time = time.unflatten(0, (samples, batch)).transpose(0, 1)  # [B, S, width]
        if not self.config.pi05:
            x = torch.cat([state, x], 1)
        x = x.to(self.expert.dtype)  # [B, T, width]
        states = self._state_tokens
        steps = torch.arange(states, states + self.config.action_horizon, device=x.device).repeat(samples)
        positions = prefix.length[:, None] + F.pad(steps, (states, 0))  # every chunk follows the state
        rope = rotary_angles(positions, self.config.gemma.head_dim)
        mask = self._suffix_mask(prefix.valid, samples, x.dtype)
        for layer, *before in zip(self.expert.layers, prefix.keys, prefix.values, strict=True):
            x, _, _ = layer(x, rope, mask, *before, time)
        x, _ = normed(self.expert.norm, x[:, states:], time)
        with without_autocast(x.device):
            x = self.action_out_proj(x.to(self.action_out_proj.weight.dtype))
        return x.unflatten(1, (samples, -1)).transpose(0, 1).flatten(0, 1)

    @property
    def _state_tokens(self) -> int:
        """Tokens of the state block."""
        return 0 if self.config.pi05 else 1

    def _embed_actions(
        self, x_t: Tensor, t: Tensor, condition: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [N, H, width] of noisy actions [N, H, A] under a condition [N].

        Flow time [N] is mixed into them. For pi0.5 it is returned as the input of the adaptive norms, [N, width].
        """
        tokens = self.action_in_proj(x_t)
        time = time_embedding(t, tokens.shape[-1]).to(tokens.dtype)
        if self.config.pi05:
            time = F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(time))))
        else:
            mixed = torch.cat([tokens, time[:, None].expand_as(tokens)], -1)
            tokens, time = self.action_time_mlp_out(F.silu(self.action_time_mlp_in(mixed))), None
        if self.config.guidance:
            if condition is None:
                condition = torch.full((len(x_t),), NULL, device=x_t.device)
            tokens = tokens + self.condition_embedding(condition)[:, None]
        elif condition is not None:
            raise ValueError("this model has no optimality condition; build it with guidance=True")
        return tokens, time

    def _suffix_mask(self, prefix_valid: Tensor, samples: int, dtype: torch.dtype) -> Tensor | ChunkMasks:
        """Who sees whom: all tokens see prefix and state, actions also their own chunk.

        One chunk has a mask [B, 1, T, P + T] of its whole suffix; several have `ChunkMasks`.
        """
        states, horizon = self._state_tokens, self.config.action_horizon
        shared = F.pad(prefix_valid, (0, states), value=True)  # [B, P + states]
        own = F.pad(shared, (0, horizon), value=True)  # [B, P + states + H]
        if samples > 1:
            each = own.repeat_interleave(samples, 0)[:, None, None]
            return ChunkMasks(
                _additive_mask(shared[:, None, None], dtype), _additive_mask(each, dtype), states, samples
            )
        of_state = F.pad(shared, (0, horizon), value=False)
        rows = [of_state[:, None].expand(-1, states, -1), own[:, None].expand(-1, horizon, -1)]
        return _additive_mask(torch.cat(rows, 1)[:, None], dtype)


class Gemma(nn.Module):
    """Layers and final norm of a Gemma transformer (Gemma Team 2024); `Pi0Network` runs them.

    Args:
        dims: sizes.
        adaptive: norms are `AdaptiveRMSNorm`.
    """

    def __init__(self, dims: GemmaDims, adaptive: bool = False):
        super().__init__()
        self.layers = nn.ModuleList(GemmaLayer(dims, adaptive) for _ in range(dims.depth))
        self.norm = make_norm(dims.width, adaptive)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the matrices that outputs depend on; norms may stay in float32."""
        return self.layers[0].self_attn["k_proj"].weight.dtype


class GemmaLayer(nn.Module):
    """One layer; its attention can also use the keys and values of the other expert."""

    def __init__(self, dims: GemmaDims, adaptive: bool):
        super().__init__()
        self.head_dim = dims.head_dim
        self.input_layernorm = make_norm(dims.width, adaptive)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(dims.width, dims.num_heads * dims.head_dim, bias=False),
                "k_proj": nn.Linear(dims.width, dims.num_kv_heads * dims.head_dim, bias=False),
                "v_proj": nn.Linear(dims.width, dims.num_kv_heads * dims.head_dim, bias=False),
                "o_proj": nn.Linear(dims.num_heads * dims.head_dim, dims.width, bias=False),
            }
        )
        self.post_attention_layernorm = make_norm(dims.width, adaptive)
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(dims.width, dims.mlp_dim, bias=False),
                "up_proj": nn.Linear(dims.width, dims.mlp_dim, bias=False),
                "down_proj": nn.Linear(dims.mlp_dim, dims.width, bias=False),
            }
        )

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | ChunkMasks | None,
        keys_before: Tensor | None = None,
        values_before: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pass tokens through attention and MLP.

        Args:
            x: tokens [N, T, width].
            rope: `rotary_angles` of the tokens' positions.
            mask: additive [N, 1, T, P + T], or `ChunkMasks`; None if only the tokens' keys and values are needed.
            keys_before, values_before: those of the earlier tokens, [N, kv_heads, P, head_dim].
            condition: input of adaptive norms, [N, S, width].

        Returns:
            Tokens [N, T, width], `x` itself without a mask; their own keys and values, [N, kv_heads, T, head_dim].
        """
        h, gate = normed(self.input_layernorm, x, condition)
        k, v = rotate(self._heads("k_proj", h), rope), self._heads("v_proj", h)
        if mask is None:
            return x, k, v
        q = rotate(self._heads("q_proj", h), rope)
        if isinstance(mask, ChunkMasks):
            attended = _attend_in_chunks(q, k, v, keys_before, values_before, mask)
        else:
            attended = _attend(q, _joined(keys_before, k), _joined(values_before, v), mask)
        x = gated_sum(x, self.self_attn["o_proj"](attended.transpose(1, 2).flatten(2)), gate)
        h, gate = normed(self.post_attention_layernorm, x, condition)
        h = F.gelu(self.mlp["gate_proj"](h), approximate="tanh") * self.mlp["up_proj"](h)
        return gated_sum(x, self.mlp["down_proj"](h), gate), k, v

    def _heads(self, name: str, h: Tensor) -> Tensor:
        return self.self_attn[name](h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def _joined(before: Tensor | None, own: Tensor) -> Tensor:
    """Earlier keys or values and a block's own, [N, kv_heads, P + T, head_dim], in the type of the own ones."""
    # The earlier ones may come from the other expert, in another type.
    return own if before is None else torch.cat([before.to(own.dtype), own], 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def _attend_in_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys_before: Tensor | None,
    values_before: Tensor | None,
    masks: ChunkMasks,
) -> Tensor:
    """Attention of a suffix [B, heads, states + S * H, head_dim] whose chunks do not see each other."""
    states, samples = masks.states, masks.samples

    def chunks(x: Tensor) -> Tensor:
        """[B, heads, states + S * H, head_dim] to [B * S, heads, H, head_dim]."""
        return x[:, :, states:].unflatten(2, (samples, -1)).transpose(1, 2).flatten(0, 1)

    def seen(before: Tensor | None, own: Tensor) -> tuple[Tensor, Tensor]:
        """What the state sees, and what each chunk sees."""
        shared = _joined(before, own[:, :, :states])
        each = shared[:, None].expand(-1, samples, -1, -1, -1).flatten(0, 1)
        return shared, torch.cat([each, chunks(own)], 2)

    (of_state_k, of_chunk_k), (of_state_v, of_chunk_v) = seen(keys_before, k), seen(values_before, v)
    attended = _attend(chunks(q), of_chunk_k, of_chunk_v, masks.chunk)
    attended = attended.unflatten(0, (-1, samples)).transpose(1, 2).flatten(2, 3)
    if not states:
        return attended
    of_state = _attend(q[:, :, :states], of_state_k, of_state_v, masks.state)
    return torch.cat([of_state, attended], 2)


class RMSNorm(nn.Module):
    """Root-mean-square norm, scaled by 1 + weight; computed in float32 or a wider type."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return (unit_rms(x) * (1.0 + self.weight)).to(x.dtype)


class AdaptiveRMSNorm(nn.Module):
    """Root-mean-square norm; a condition sets its scale, its shift and the gate of the layer that it feeds.

    It follows openpi's GemmaRMSNorm with a condition
    (models_pytorch/transformers_replace/models/gemma/modeling_gemma.py): the three are one linear map of the
    condition, in this order. All are zero at the start, as in openpi's models/gemma.py: tokens are then only
    normalised, and a layer with gate 0 returns them unchanged.
    """

    def __init__(self, width: int):
        super().__init__()
        self.dense = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Return normed tokens and their gates, both [N, S * H, width], under conditions [N, S, width]."""
        h = unit_rms(x).unflatten(1, (condition.shape[1], -1))  # [N, S, H, width]
        with without_autocast(x.device):
            scale, shift, gate = self.dense(condition)[:, :, None].to(h.dtype).chunk(3, -1)
        h = h * (1.0 + scale) + shift
        return h.flatten(1, 2).to(x.dtype), gate.to(x.dtype).expand_as(h).flatten(1, 2)


def _parts(transformer: Gemma) -> list[nn.ModuleDict]:
    """The modules that hold the matrices of a transformer's layers."""
    return [part for layer in transformer.layers for part in (layer.self_attn, layer.mlp)]


def make_norm(width: int, adaptive: bool) -> nn.Module:
    """One of the two norms."""
    return AdaptiveRMSNorm(width) if adaptive else RMSNorm(width)


def normed(norm: nn.Module, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Apply either norm: normed tokens, and the gate of an adaptive norm."""
    return (norm(x), None) if condition is None else norm(x, condition)


def gated_sum(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """Residual connection; a gate scales what is added."""
    return x + y if gate is None else x + y * gate


def unit_rms(x: Tensor) -> Tensor:
    """Scale vectors to root mean square 1, in float32 or a wider type."""
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)


def rotary_angles(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [N, 1, T, head_dim] of rotary embedding (Su et al. 2021) at positions [N, T]."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[..., None].float() * ROPE_BASE**-exponents  # [N, T, head_dim / 2]
    angles = torch.cat([angles, angles], -1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each (i, i + head_dim / 2) pair of [N, heads, T, head_dim] by its position's angle."""
    cos, sin = rope
    first, second = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], -1) * sin.to(x.dtype)


def time_embedding(t: Tensor, width: int) -> Tensor:
    """Sines and cosines [N, width] of flow times [N]; TIME_PERIODS bounds their geometric series of periods."""
    shortest, longest = TIME_PERIODS
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=t.device)
    angles = t[:, None] * (2 * math.pi / (shortest * (longest / shortest) ** fraction))
    return torch.cat([angles.sin(), angles.cos()], -1).to(t.dtype)


def _additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where attention is allowed; elsewhere the lowest finite number, so that no row can become NaN."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(
        ~allowed, torch.finfo(dtype).min
    )


def _initialise(module: nn.Module) -> None:
    """Initial values for training from scratch: every linear map keeps its input's scale."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        fan_in = module.weight[0].numel()
        nn.init.trunc_normal_(module.weight, std=fan_in**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
    elif isinstance(module, AdaptiveRMSNorm):  # after its linear map, which comes first
        nn.init.zeros_(module.dense.weight)
