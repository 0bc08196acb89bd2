"""Children that no stock family can express, in transformers.

`import intarsia.hf` registers classes for `intarsia` and `nemotron_h_puzzle` with the Auto classes; after that
`AutoModelForCausalLM.from_pretrained(child)` works, generates, and gives our logits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from intarsia.arch import Architecture, Attention, Mamba1, Mamba2
from intarsia.base.errors import IntarsiaError
from intarsia.formats import load, nemotron_h_puzzle, save
from intarsia.model import Cache, Decoder, Rows
from intarsia.ops.attention import attend, visible

# What transformers calls the cache in outputs and arguments; `past_key_values` until 5.24.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class IntarsiaConfig(PretrainedConfig):
    """config.json of our own format: `architecture` holds `Architecture.to_dict()`, the rest are mirrors of it."""

    model_type = "intarsia"

    def __init__(self, architecture: dict[str, Any] | None = None, **fields: Any):
        if architecture is not None:
            arch = Architecture.from_dict(architecture)
            fields["vocab_size"], fields["hidden_size"] = arch.vocab_size, arch.hidden_size
            fields["max_position_embeddings"] = arch.max_positions
            fields["tie_word_embeddings"] = arch.tied_embeddings
            # transformers sizes its caches by layers, and only attention has one.
            fields["num_hidden_layers"] = max(1, len(arch.attentions))
        super().__init__(**fields)
        self.architecture = architecture


class IntarsiaCache(DynamicCache):
    """transformers' growing keys and values, with the conv inputs and states of Mamba blocks beside them.

    Attention blocks count as its layers, in order. Shapes of the states: `intarsia.model.Cache`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens = 0  # a model without attention has no keys to count
        self.states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tokens

    def states_for(self, arch: Architecture, x: torch.Tensor) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """The states of every Mamba block for a stream x (B, L, D), zeros where no token went in yet."""
        if not self.states:
            fresh = Cache(arch, len(x), 1, x.dtype, x.device).entries
            self.states = {i: fresh[i] for i, block in enumerate(arch.blocks) if isinstance(block, (Mamba1, Mamba2))}
        return self.states

    def _each_state(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.states = {index: (change(held), change(state)) for index, (held, state) in self.states.items()}

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._each_state(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._each_state(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._each_state(lambda t: t[indices])

    def reset(self) -> None:
        super().reset()
        self.tokens, self.states = 0, {}

    def crop(self, *_: Any, **__: Any) -> None:
        raise IntarsiaError("the state of a scan cannot go back to an earlier token: generate without an assistant.")


class _Borrowed:
    """A transformers cache with the face of ours.

    It keeps padding among the keys, so the mask is made from where every token stands in its row.
    """

    def __init__(self, past: Any, arch: Architecture, keep: torch.Tensor | None, x: torch.Tensor):
        self.past, self.keep = past, keep
        self.length = 0 if past is None else past.get_seq_length()
        attention = [i for i, block in enumerate(arch.blocks) if isinstance(block, Attention)]
        self.layers = {block: layer for layer, block in enumerate(attention)}
        self.scans = past.states_for(arch, x) if isinstance(past, IntarsiaCache) else {}
        if past is not None and not self.scans and any(isinstance(b, (Mamba1, Mamba2)) for b in arch.blocks):
            raise IntarsiaError(
                f"a {type(past).__name__} has no place for the state of a Mamba block: leave {CACHE} out, or "
                "give an intarsia.hf.IntarsiaCache."
            )

    def rows(self, x: torch.Tensor) -> Rows | None:
        if self.keep is None:
            return None
        keep = self.keep[:, self.length :]
        before = self.keep[:, : self.length].sum(1)
        return Rows(x.shape[:2], x.device, None if bool(keep.all()) else keep, before=before)

    def advance(self, length: int, rows: Rows | None) -> None:
        self.length += length
        if isinstance(self.past, IntarsiaCache):
            self.past.tokens = self.length

    def scan(self, index: int, run: Callable[..., torch.Tensor], *tokens: torch.Tensor) -> torch.Tensor:
        return run(*tokens, self.scans.get(index))

    def attend(
        self, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, rows: Rows | None
    ) -> torch.Tensor:
        if self.past is not None:
            k, v = self.past.update(k, v, self.layers[index])
        if rows is None:
            return attend(q, k, v, window)
        keys = (self.keep.long().cumsum(1) - 1).clamp(min=0)
        return attend(q, k, v, window, visible(rows.positions, keys, window, self.keep))


class IntarsiaForCausalLM(PreTrainedModel, GenerationMixin):
    """Our `Decoder` under transformers' interface."""

    config_class = IntarsiaConfig
    base_model_prefix = "decoder"  # files hold our bare names; transformers finds them under this prefix
    main_input_name = "input_ids"
    _supports_sdpa = True
    _no_split_modules = ["ResidualBlock"]  # noqa: RUF012

    def __init__(self, config: IntarsiaConfig, decoder: Decoder | None = None):
        super().__init__(config)
        arch = Architecture.from_dict(config.architecture)
        self.decoder = decoder or Decoder(arch, dtype=torch.get_default_dtype())
        self.hybrid = any(isinstance(b, (Mamba1, Mamba2)) for b in arch.blocks)
        self.post_init()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.decoder.embed

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        self.decoder.embed = value

    def get_output_embeddings(self) -> torch.nn.Module | None:
        return getattr(self.decoder, "head", None)

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing to draw: weights come from a checkpoint."""

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *rest: Any) -> None:
        """`generate` makes a cache from the config, which knows nothing of scans: a hybrid gets its own."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *rest)
        if self.hybrid and type(model_kwargs.get(CACHE)) is DynamicCache:
            model_kwargs[CACHE] = IntarsiaCache()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Any = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids (B, L) -> logits (B, L, V). `attention_mask` (B, T) may mark padding on either side.

        `cache` and `past_key_values` are the newer and the older name of one thing.
        """
        past = past_key_values if cache is None else cache
        if use_cache and past is None:
            past = IntarsiaCache() if self.hybrid else DynamicCache()
        keep = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
        x = self.decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x = self.decoder.run(x, cache=_Borrowed(past, self.decoder.arch, keep, x))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.decoder.head_logits(x[:, kept])
        loss = None
        if labels is not None:
            targets = labels[:, 1:].flatten()
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets, ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: past})


class NemotronHPuzzleConfig(IntarsiaConfig):
    """config.json of nemotron_h_puzzle: nemotron_h with `block_configs`."""

    model_type = nemotron_h_puzzle.MODEL_TYPE

    def __init__(self, architecture: dict[str, Any] | None = None, **fields: Any):
        if architecture is None and "block_configs" in fields:
            architecture = nemotron_h_puzzle.from_config(fields).to_dict()
        super().__init__(architecture=architecture, **fields)


class NemotronHPuzzleForCausalLM(IntarsiaForCausalLM):
    """A nemotron_h child of unequal layers. Files are read and written by `intarsia.formats`."""

    config_class = NemotronHPuzzleConfig

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *_: Any,
        config: Any = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        **options: Any,
    ) -> NemotronHPuzzleForCausalLM:
        """`dtype` None or "auto" keeps that of the file. Raises `IntarsiaError` for what `formats.load` refuses, for
        quantisation, and for a `device_map` that spreads one model over devices.
        """
        if options.get("quantization_config") is not None or isinstance(device_map, dict):
            raise IntarsiaError("this model loads whole and unquantised: give no quantization_config and one device.")
        dtype = dtype or torch_dtype
        device = "cpu" if device_map in (None, "auto") else device_map
        decoder, _ = load(path, None if dtype == "auto" else dtype, device)
        model = cls(config or cls.config_class.from_pretrained(path), decoder)
        if (Path(path) / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(path)
        return model.eval()

    def save_pretrained(self, path: str | os.PathLike, **_: Any) -> None:
        save(self.decoder, path, family=nemotron_h_puzzle.MODEL_TYPE)


AutoConfig.register("intarsia", IntarsiaConfig, exist_ok=True)
AutoModelForCausalLM.register(IntarsiaConfig, IntarsiaForCausalLM, exist_ok=True)
AutoConfig.register(nemotron_h_puzzle.MODEL_TYPE, NemotronHPuzzleConfig, exist_ok=True)
AutoModelForCausalLM.register(NemotronHPuzzleConfig, NemotronHPuzzleForCausalLM, exist_ok=True)
