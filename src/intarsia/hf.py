"""Children that no stock family can express, in transformers.

`import intarsia.hf` registers `IntarsiaConfig` and `IntarsiaForCausalLM` with the Auto classes; after that
`AutoModelForCausalLM.from_pretrained(child)` works, generates with transformers' own caches and gives our logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from intarsia.arch import Architecture, Attention
from intarsia.base.errors import IntarsiaError
from intarsia.model import Decoder, Rows
from intarsia.ops.attention import visible


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


class _Borrowed:
    """A transformers cache with the face of ours; attention blocks count as its layers, in order.

    It keeps padding among the keys, so the mask is made from where every token stands in its row.
    """

    def __init__(self, past: Any, arch: Architecture, keep: torch.Tensor | None):
        self.past, self.keep = past, keep
        self.length = 0 if past is None else past.get_seq_length()
        attention = [i for i, block in enumerate(arch.blocks) if isinstance(block, Attention)]
        self.layers = {block: layer for layer, block in enumerate(attention)}

    def rows(self, x: torch.Tensor) -> Rows | None:
        if self.keep is None:
            return None
        return Rows(x.shape[:2], x.device, self.keep[:, self.length :], before=self.keep[:, : self.length].sum(1))

    def advance(self, length: int, rows: Rows | None) -> None:
        self.length += length

    def states(self, index: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self.past is None:
            return None
        raise IntarsiaError(
            "the caches of transformers have no place for the state of a Mamba block: generate with use_cache=False, "
            "or with intarsia.generate."
        )

    def extend(
        self, index: int, k: torch.Tensor, v: torch.Tensor, window: int | None, rows: Rows | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        if self.past is not None:
            k, v = self.past.update(k, v, self.layers[index])
        if rows is None:
            return k, v, None
        keys = (self.keep.long().cumsum(1) - 1).clamp(min=0)
        return k, v, visible(rows.positions, keys, window, self.keep)


class IntarsiaForCausalLM(PreTrainedModel, GenerationMixin):
    """Our `Decoder` under transformers' interface."""

    config_class = IntarsiaConfig
    base_model_prefix = "decoder"  # files hold our bare names; transformers finds them under this prefix
    main_input_name = "input_ids"
    _supports_sdpa = True
    _no_split_modules = ["ResidualBlock"]  # noqa: RUF012

    def __init__(self, config: IntarsiaConfig):
        super().__init__(config)
        self.decoder = Decoder(Architecture.from_dict(config.architecture), dtype=torch.get_default_dtype())
        self.post_init()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.decoder.embed

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        self.decoder.embed = value

    def get_output_embeddings(self) -> torch.nn.Module | None:
        return getattr(self.decoder, "head", None)

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing to draw: weights come from a checkpoint."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids (B, L) -> logits (B, L, V). `attention_mask` (B, T) may mark padding on either side."""
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        keep = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
        cache = _Borrowed(past_key_values, self.decoder.arch, keep)
        x = self.decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x = self.decoder.run(x, cache=cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.decoder.head_logits(x[:, kept])
        loss = None
        if labels is not None:
            targets = labels[:, 1:].flatten()
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets, ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)


AutoConfig.register("intarsia", IntarsiaConfig, exist_ok=True)
AutoModelForCausalLM.register(IntarsiaConfig, IntarsiaForCausalLM, exist_ok=True)
