"""NVIDIA's Puzzletron v1 (`nvidia-modelopt`, modelopt.torch.puzzletron) as a peer, on a processor it was not made for.

Its stages are its own, called as its entry point calls them; the configuration is that of its published Llama examples
but for sizes. Nothing of it is changed except what asks for CUDA by name, and autocast, which computes more in float32
there: on a processor its scores would have the three digits of bfloat16, and a model would be 0.0006 nats from itself.
"""

from __future__ import annotations

import json
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
import transformers
from modelopt.torch.prune.importance_hooks import base_hooks
from modelopt.torch.puzzletron.activation_scoring import launch_score_activations
from modelopt.torch.puzzletron.anymodel.converter import ConverterFactory
from modelopt.torch.puzzletron.anymodel.model_descriptor import ModelDescriptorFactory
from modelopt.torch.puzzletron.anymodel.models.llama import llama_model_descriptor as llama
from modelopt.torch.puzzletron.build_library_and_stats import launch_build_library_and_stats
from modelopt.torch.puzzletron.mip import launch_mip_and_realize_model
from modelopt.torch.puzzletron.pruning import launch_prune_ckpt, pruning_utils
from modelopt.torch.puzzletron.pruning.ffn_intermediate_pruning_mixin import FFNIntermediatePruningMixIn
from modelopt.torch.puzzletron.pruning.kv_heads_pruning_mixin import KVHeadsPruningMixIn
from modelopt.torch.puzzletron.scoring import launch_scoring
from modelopt.torch.utils import distributed
from omegaconf import DictConfig, OmegaConf
from torch.overrides import TorchFunctionMode

from peers.protocol import serve

BFLOAT16 = "torch.bfloat16"
# What autocast computes in float32 on CUDA and not on a processor, as far as Puzzletron scores and ranks with it.
NAMES = ("pow", "__pow__", "sum", "exp", "log", "softmax", "log_softmax", "cosine_similarity")
WIDE = {getattr(room, name) for room in (torch, torch.Tensor, F) for name in NAMES if hasattr(room, name)}
STATS = "subblock_stats.json"
JUDGED = ("lm_loss", "kl_div", "cosine_embedding_loss_hidden_states", "greedy_teacher_prediction_in_student_top_1")
REPORTED = ("memory_mib", "num_params", "kv_cache_memory_mib", "has_attention", "has_ffn", "num_kv_heads")


class _Wide(TorchFunctionMode):
    """Takes bfloat16 operands of `WIDE` as float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WIDE:
            args = [a.float() if isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 else a for a in args]
        return func(*args, **(kwargs or {}))


class _Autocast(torch.autocast):
    """Autocast where the model is, whatever device was named, with the results that it has on CUDA."""

    def __init__(self, device_type: str, *rest: Any, **named: Any):
        super().__init__("cpu", *rest, **named)
        self.wide = _Wide()

    def __enter__(self) -> Any:
        self.wide.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        super().__exit__(*error)
        return self.wide.__exit__(*error)


def without_cuda() -> None:
    """What asks for CUDA by name does nothing, or means the processor."""
    torch.cuda.set_device = torch.cuda.synchronize = torch.cuda.empty_cache = lambda *_, **__: None
    torch.nn.Module.cuda = lambda self, *_: self
    torch.autocast = _Autocast
    distributed.local_rank = lambda: "cpu"  # only ever the name of a device


def stored_tokens(dataset_path: str, *_: Any) -> datasets.DatasetDict:
    """{split: (N, L) token ids} of a JSON file, each split as one text that its loader cuts again at every L tokens.
    The loader adds an end of text, which is the label of the last token."""
    splits = json.loads(Path(dataset_path).read_text(encoding="utf-8"))
    texts = {name: {"token_ids": [[i for row in rows for i in row]]} for name, rows in splits.items()}
    return datasets.DatasetDict({name: datasets.Dataset.from_dict(text) for name, text in texts.items()})


class Puzzletron:
    """One compression in a folder of its own; each method is a stage, and answers with the seconds it took."""

    def open(
        self, parent: str, folder: str, tokens: str, widths: list[int], groups: list[int], scenario: list[int],
        dtype: str,
    ) -> str:  # fmt: skip
        """`parent`: a Hugging Face folder of a Llama. `widths`: of narrower FFNs, in channels; `groups`: query heads a
        KV head, of attention with fewer of these. `scenario`: batch, prompt, generated. `dtype`: what models compute
        in; memory is counted in bfloat16."""
        without_cuda()
        self.parent, self.folder, self.tokens = Path(parent), Path(folder).resolve(), tokens
        self.teacher = self.folder / "ckpts" / "teacher"
        self.widths, self.groups, self.dtype = widths, groups, f"torch.{dtype}"
        self.batch, self.prompt, self.generated = scenario
        self.splits = json.loads(Path(tokens).read_text(encoding="utf-8"))
        versions = {"modelopt": version("nvidia-modelopt"), "torch": torch.__version__,
                    "transformers": transformers.__version__}  # fmt: skip
        return ", ".join(f"{name} {number}" for name, number in versions.items())

    def convert(self) -> float:
        began = time.perf_counter()
        converter, descriptor = ConverterFactory.get("llama"), ModelDescriptorFactory.get("llama")
        converter.convert(descriptor=descriptor, input_dir=self.parent, output_dir=self.teacher)
        return time.perf_counter() - began

    def prune(self) -> float:
        """Channels and KV heads ranked by activations, and a checkpoint for every width and group."""
        began = time.perf_counter()
        for part in (self._ffn(), *([self._attention()] if self.groups else [])):
            pruning_utils.ACTIVATIONS_LOG.clear()  # it reads one ranking a process, and here are two
            launch_score_activations(self._settings(part))
            launch_prune_ckpt(self._settings(part))
        return time.perf_counter() - began

    def library(self) -> float:
        began = time.perf_counter()
        (self.folder / STATS).unlink(missing_ok=True)  # it refuses to write over what it finds
        launch_build_library_and_stats(self._settings(self._ffn()))
        return time.perf_counter() - began

    def score(self) -> float:
        """The parent with one layer replaced, for every layer and composition. Goes on where it was stopped."""
        began = time.perf_counter()
        launch_scoring(self._settings(self._ffn()))
        return time.perf_counter() - began

    def solve(self, memory_mib: float, objective: str) -> dict[str, Any]:
        """The mixed-integer program within a memory, and the child made: where it lies and what is said of it."""
        began = time.perf_counter()
        settings = self._settings(self._ffn())
        out = self.folder / "mip" / objective
        shutil.rmtree(out, ignore_errors=True)
        settings.mip.output_path = out
        settings.mip.objective = f"metrics.{objective}"
        settings.mip.human_constraints = {"target_memory": memory_mib}
        paths = launch_mip_and_realize_model(settings)
        seconds = time.perf_counter() - began
        solutions = json.loads(Path(paths[0]).read_text(encoding="utf-8"))
        if not solutions:
            raise ValueError(f"no choice of its library takes at most {memory_mib:.1f} MiB")
        judged = json.loads((Path(paths[0]).parent / "solutions--validation" / "solution_0.json").read_text())
        return {
            "checkpoint": str(Path(paths[0]).parent / "solutions--checkpoints" / "solution_0"),
            "seconds": seconds,
            "value": solutions[0]["total_value"],
            "costs": solutions[0]["total_costs"],
            "judged": {name: judged[name]["avg"] for name in JUDGED},
        }

    def _ffn(self) -> dict[str, Any]:
        return {
            "pruning_mixin": FFNIntermediatePruningMixIn(llama.LlamaFFNIntermediateLayerDescriptor()),
            "hook_class": base_hooks.IterativeChannelContributionHook,
            "activations_log_dir": str(self.folder / "pruning" / "scores" / "ffn"),
            "activation_hooks_kwargs": {"method": "iterative", "target_layer": "mlp.down_proj",
                                        "layer_input_descriptors_path": None},
            "intermediate_size_list": self.widths,
            "mlp_init_mode": "PruneByActivationsLog",
        }  # fmt: skip

    def _attention(self) -> dict[str, Any]:
        return {
            "pruning_mixin": KVHeadsPruningMixIn(llama.LlamaKVHeadsLayerDescriptor()),
            "hook_class": base_hooks.IndependentKvHeadContributionHook,
            "activations_log_dir": str(self.folder / "pruning" / "scores" / "attention"),
            "activation_hooks_kwargs": {"method": "independent_kv_head_contribution", "optimize_for": "memory",
                                        "target_layer": "self_attn.o_proj", "layer_input_descriptors_path": None},
            "n_heads_in_group_list": self.groups,
            "gqa_init_mode": "PruneKVHeads",
        }  # fmt: skip

    def _run_on(self, split: str) -> dict[str, Any]:
        """How a model runs on one split of the tokens."""
        rows = self.splits[split]
        return {
            "descriptor": "llama", "model_dtype": self.dtype, "autocast_dtype": self.dtype,
            "dataset_path": self.tokens, "load_dataset_fn": stored_tokens, "data_column": "", "val_dataset_name": split,
            "eval_samples": len(rows), "block_size": len(rows[0]), "micro_batch_size": 1, "varlen": False,
            "bos_rate": 1.0, "fim_rate": 0, "fim_spm_rate": 0, "source_datasets_to_discard": None,
            "seed": 42, "shuffle_seed": None, "write_results": False, "calc_losses_on_cpu": False,
            "activations_log_dir": None, "model_name_or_path": None,
        }  # fmt: skip

    def _settings(self, part: dict[str, Any]) -> DictConfig:
        """All that its stages read; a stage changes what it was given, so each has its own."""
        library = self.folder / "replacement_library.json"
        scores = self.folder / "single_sequence_replacement_solutions--validation"
        judged = {
            **self._run_on("scoring"), "teacher_dir": self.teacher, "replacement_library_path": library,
            "solutions_to_validate": None, "sort_solutions_by": None, "bigger_is_better": False,
            "skip_validation": False, "calculate_full_score_ablations": False,
        }  # fmt: skip
        settings = {
            "puzzle_dir": str(self.folder), "descriptor": "llama", "teacher_dir": str(self.teacher),
            "replacement_library_path": str(library), "dataset_path": self.tokens, "skip_realize_model": False,
            "pruning": {
                **self._run_on("calibration"), "model_name_or_path": str(self.teacher),
                "pruned_ckpts_output_dir": str(self.folder / "pruning" / "checkpoints"),
                "gqa_init_mode": "AverageKV", "mlp_init_mode": "Truncate",
                "mlp_init_config_yaml": {"activations_log_dir": part["activations_log_dir"]}, **part,
            },
            "build_replacement_library": {"add_ffn_no_ops": True, "add_attention_no_ops": True},
            "calc_subblock_stats": {
                "batch_sizes": [self.batch], "prefill_seq_len": self.prompt, "generation_seq_len": self.generated,
                "num_active_tokens_override": None, "prefill_queue_size": 0, "allocate_prefill_query": False,
                "merge_with_existing_stats": False, "subblock_stats_filename": STATS,
                "moe_stats_filename": "moe_stats.json",
            },
            "scoring": {
                **judged, "save_models": False, "skip_existing_solutions": True, "output_dir": scores,
                "solutions_path": self.folder / "single_sequence_replacement_solutions.json",
            },
            "mip": {
                "single_block_replacement_validation_dir": scores, "subblock_stats_path": self.folder / STATS,
                "gathered_metrics_path": None, "puzzle_profile": None, "bigger_is_better": False,
                "subblock_stats_args": [{"batch_size": self.batch, "weights_dtype": BFLOAT16,
                                         "activations_dtype": BFLOAT16, "kv_cache_dtype": BFLOAT16}],
                "report_additional_costs": [f"stats.{name}" for name in REPORTED],
                "mip_constraints": None, "metric_overrides": None, "max_seconds_per_solution": 60,
            },
            "realize_model": {
                **judged, "save_models": True, "tokenizer_name": str(self.teacher), "solutions_path": None,
            },
        }  # fmt: skip
        return OmegaConf.create(settings, flags={"allow_objects": True})


if __name__ == "__main__":
    peer = Puzzletron()
    stages = (peer.open, peer.convert, peer.prune, peer.library, peer.score, peer.solve)
    serve({stage.__name__: stage for stage in stages})
