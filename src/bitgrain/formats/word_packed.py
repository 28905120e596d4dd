"""What the formats that pack codes into 32-bit words (qweight, qzeros, scales) share besides their tensors.

Their producers write one family of configuration files: the same metadata keys, and the same per-module rules under
`dynamic`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import partial
from typing import Any

from bitgrain.formats.base import ModuleKind, ModuleView
from bitgrain.formats.config_reader import ConfigReader
from bitgrain.formats.dynamic_rules import DynamicRule, find_dynamic_rule, read_dynamic_rules
from bitgrain.formats.matching import SegmentRules

# fmt: off
# How the checkpoint was made: calibration, algorithm, progress, file names.  None of it changes what tensors mean.
QUANTIZATION_TIME_KEYS = frozenset(
    {
        "act_data_type", "act_dynamic", "act_group_aware", "act_group_size", "act_sym", "amp", "apply_clip",
        "auto_forward_data_parallel", "auto_round_version", "autoround_version", "batch_size", "block_name_to_quantize",
        "bs", "cache_block_outputs", "calib_data", "compute_device_filter", "damp_auto_increment", "damp_percent",
        "dataset", "dense_vram_strategy", "dense_vram_strategy_devices", "device", "disable_opt_rtn", "duo_scaling",
        "dynamic_max_gap", "enable_alg_ext", "enable_minmax_tuning", "enable_norm_bias_tuning", "enable_opt_rtn",
        "enable_quanted_input", "enable_torch_compile", "export_format", "fail_safe", "failsafe", "fallback", "foem",
        "gc_mode", "gptaq", "gradient_accumulate_steps", "hessian", "hyb_act", "iters",
        "lr", "max_calib_samples", "max_calib_seq_len", "max_seq_len", "meta", "minmax_lr",
        "mock_quantization", "model_file_base_name", "model_name_or_path", "model_seqlen",
        "module_name_preceding_first_block", "moe", "moe_vram_strategy", "moe_vram_strategy_devices", "momentum", "mse",
        "n_parallel_calib_samples", "n_samples", "nblocks", "not_use_best_mse", "nsamples", "offload_to_disk",
        "offload_to_disk_path", "pack_impl", "pad_token_id", "parallel_packing", "preprocessors", "producer", "provider",
        "quant_block_list", "quant_lm_head", "quantization_date", "quantizer", "sampler", "scale_dtype",
        "scale_search_chunked_activations", "seed", "seq_len", "seqlen", "smooth", "smoother", "static_scale_search",
        "supported_types", "telemetry", "to_quant_block_names", "tokenizer", "true_sequential", "uri", "use_quant_input", "v2", "v2_alpha",
        "v2_memory_device", "version_info", "vram_strategy", "wait_for_submodule_finalizers", "weight_only",
    }
)
# How it was or should be run elsewhere.
RUN_TIME_KEYS = frozenset(
    {
        "compute_dtype", "disable_exllama", "disable_exllamav2", "disable_marlin", "do_fuse", "dtype", "exllama_config",
        "fuse_layers", "fuse_max_seq_len", "inject_fused_attention", "inject_fused_mlp", "low_memory", "max_input_length",
        "modules_to_fuse", "torch_dtype", "trainable", "trust_remote_code", "use_exllama", "use_exllama_v2",
        "use_marlin", "use_qigen", "use_triton", "use_tritonv2", "warmup_triton",
    }
)
# fmt: on
METADATA_KEYS = QUANTIZATION_TIME_KEYS | RUN_TIME_KEYS
# Switches of which there is one per device: half precision in its kernels, saving its memory.
_DEVICE_SWITCH = re.compile(r"use_[a-z]+_fp16|low_[a-z]+_mem_usage")

# Second-level scales, per-layer schemes, cache quantization, adapters, rotations, activation quantization, and tensors of another format.
_MUST_BE_EMPTY = (
    "super_bits",
    "super_group_size",
    "extra_config",
    "regex_config",
    "static_attention_dtype",
    "adapter",
    "rotation",
    "rotation_config",
    "activation",
    "awq_gemm_checkpoint",
)
# Keys of a `dynamic` override that steer the algorithm only.
_OVERRIDE_METADATA = QUANTIZATION_TIME_KEYS | {"static_groups"}


def read_neutral_keys(settings: ConfigReader, methods: Collection[str]) -> None:
    """Mark the metadata keys as known, and refuse the values of other keys that would change the numbers.

    Args:
        methods: what `method`, a twin of quant_method, may say.
    """
    settings.skip(METADATA_KEYS | {"quant_method"})
    settings.need("method", lambda v: str(v).lower().replace("_", "-") in methods, f"{next(iter(methods))!r}", "correct the configuration")
    settings.skip(key for key in settings.values if _DEVICE_SWITCH.fullmatch(key))
    undo = "quantize the model without it"
    settings.need("data_type", lambda v: v == "int", "'int': these tensors hold integer codes", "correct the configuration")
    settings.need("act_bits", lambda v: isinstance(v, int) and v >= 16, "16 or more: inputs that are not quantized", undo)
    for key in _MUST_BE_EMPTY:
        settings.need(key, lambda v: not v, "null: this format's tensors do not say what it needs", undo)


def read_code_rules(settings: ConfigReader, meaningful: frozenset[str], bits: frozenset[int]) -> tuple[DynamicRule, ...]:
    """The rules of `dynamic` that change how a module's codes are written.

    Args:
        meaningful: override keys that the format honours.
        bits:       widths that the format knows.
    """
    return read_dynamic_rules(settings, partial(_read_overrides, meaningful=meaningful, bits=bits))


def _read_overrides(settings: ConfigReader, where: str, overrides: object, meaningful: frozenset[str], bits: frozenset[int]) -> dict[str, Any]:
    if not isinstance(overrides, dict):
        settings.problem(where, f"a {type(overrides).__name__}", "an object of settings")
        return {}
    section = ConfigReader(overrides, settings.place(where))
    section.skip(_OVERRIDE_METADATA)
    checked: dict[str, Any] = {}
    for key in sorted(meaningful & {k for k, v in overrides.items() if v is not None}):
        if key == "bits":
            checked[key] = section.integer(key, allowed=bits)
        elif key == "group_size":
            checked[key] = section.group_size(key, default=-1)
        elif key == "pack_dtype":
            checked[key] = section.text(key, default="int32").removeprefix("torch.")
        else:
            checked[key] = section.flag(key)
    section.need("adapter", lambda v: not v, "null: adapters are not part of these tensors", "merge the adapter first")
    settings.collect(section.finish)
    return checked


def named_rule(module: ModuleView, ignore: SegmentRules, dynamic: tuple[DynamicRule, ...], matched: set[str]) -> tuple[bool, str] | None:
    """(quantized, why) for a module that a rule names, or that this family never quantizes; None for all others.

    Args:
        matched: rules that have matched; the one that does now is added.
    """
    rule = ignore.find(module.name)
    if rule is not None:
        matched.add(rule)
        return False, f"modules_to_not_convert has {rule!r}"
    override = find_dynamic_rule(dynamic, module.name)
    if override is not None:
        matched.add(override.key)
        return not override.exclude, f"dynamic has {override.key!r}"
    return (False, "this format leaves embeddings alone") if module.kind is ModuleKind.EMBEDDING else None


def matrix_sizes(module: ModuleView, local: str) -> tuple[int, int] | None:
    """(rows, columns) of a stored matrix, or None if it is absent or no matrix."""
    header = module.tensors.get(local)
    if header is None or len(header.shape) != 2:
        return None
    return (header.shape[0], header.shape[1])


def scale_dtype_of(module: ModuleView, local: str) -> str:
    """The element type of stored scales if it is one that may be, else F16 (the plan reports the difference)."""
    header = module.tensors.get(local)
    return header.dtype if header is not None and header.dtype in ("F16", "BF16", "F32") else "F16"
