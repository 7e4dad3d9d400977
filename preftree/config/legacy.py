"""Flags of older versions of transformers, of optimum-habana, and of the original script."""

from __future__ import annotations

_RENAMED = "renamed in transformers 5"
_GONE = "gone from transformers 5 and ignored"
_SAFETENSORS = "ignored: weights are always written as safetensors"
_LOADING = "ignored: weights are always loaded that way"
_SCRATCH = "ignored: it was for models trained from scratch, which the original never did"
_GAUDI = "ignored: an optimum-habana setting without a counterpart here"
_GAUDI_ATTENTION = "ignored: attention is chosen by --attention"
_GAUDI_COMPILING = "ignored: it was about torch.compile under optimum-habana"
_GAUDI_PROFILING = "ignored: --profile says where a step's time goes"

OLD_FLAGS: dict[str, tuple[str | None, str]] = {
    "evaluation_strategy": ("eval_strategy", _RENAMED),
    "no_cuda": ("use_cpu", _RENAMED),
    "warmup_ratio": ("warmup_steps", "a value below 1 is a share of all steps"),
    "per_gpu_train_batch_size": ("per_device_train_batch_size", _RENAMED),
    "per_gpu_eval_batch_size": ("per_device_eval_batch_size", _RENAMED),
    "push_to_hub_token": ("hub_token", _RENAMED),
    "push_to_hub_model_id": ("hub_model_id", _RENAMED),
    "push_to_hub_organization": (None, "ignored: write it into --hub_model_id, as ORGANIZATION/NAME"),
    "xpu_backend": ("ddp_backend", _RENAMED),
    "logging_dir": (None, "ignored: logs are in OUTPUT_DIR/run/metrics.jsonl"),
    "save_safetensors": (None, _SAFETENSORS),
    "low_cpu_mem_usage": (None, _LOADING),
    "preprocessing_num_workers": (None, "ignored: the tokenizer uses every core while texts are rendered"),
    "group_by_length": (None, "ignored: forests are packed to a token budget, so lengths need no grouping"),
    "padding_side": (None, "ignored: forests hold no padding"),
    "dispatch_batches": (None, "gone from transformers 5 and ignored; see --accelerator_config"),
    "split_batches": (None, "gone from transformers 5 and ignored; see --accelerator_config"),
    "include_tokens_per_second": (None, "ignored: tokens per second are always logged"),
    "include_inputs_for_metrics": (None, _GONE),
    "fp16_backend": (None, _GONE),
    "fp16_opt_level": (None, _GONE),
    "half_precision_backend": (None, _GONE),
    "jit_mode_eval": (None, _GONE),
    "fsdp_min_num_params": (None, "ignored: see --fsdp_config"),
    "fsdp_transformer_layer_cls_to_wrap": (None, "ignored: see transformer_layer_cls_to_wrap in --fsdp_config"),
    "mp_parameters": (None, _GONE),
    "past_index": (None, _GONE),
    "ray_scope": (None, _GONE),
    "torchdynamo": (None, "gone from transformers 5 and ignored; see --torch_compile"),
    "tpu_metrics_debug": (None, _GONE),
    "tpu_num_cores": (None, _GONE),
    "use_ipex": (None, "ignored: what it did is in torch itself by now"),
    "use_legacy_prediction_loop": (None, _GONE),
    "use_mps_device": (None, "ignored: an Apple GPU is used where there is one; --use_cpu avoids it"),
    "model_type": (None, _SCRATCH),
    "config_name": (None, _SCRATCH),
    "config_overrides": (None, _SCRATCH),
    "use_hpu_graphs": (None, _GAUDI),
    "use_hpu_graphs_for_inference": (None, _GAUDI),
    "disable_tensor_cache_hpu_graphs": (None, _GAUDI),
    "max_hpu_graphs": (None, _GAUDI),
    "distribution_strategy": (None, _GAUDI),
    "throughput_warmup_steps": (None, _GAUDI),
    "adjust_throughput": (None, _GAUDI),
    "pipelining_fwd_bwd": (None, _GAUDI),
    "non_blocking_data_copy": (None, _GAUDI),
    "ignore_eos": (None, _GAUDI),
    "minimize_memory": (None, _GAUDI),
    "use_zero3_leaf_promotion": (None, _GAUDI),
    "attn_implementation": (None, _GAUDI_ATTENTION),
    "flash_attention_causal_mask": (None, _GAUDI_ATTENTION),
    "flash_attention_fast_softmax": (None, _GAUDI_ATTENTION),
    "flash_attention_recompute": (None, _GAUDI_ATTENTION),
    "sdp_on_bf16": (None, _GAUDI_ATTENTION),
    "allow_unspec_int_on_nn_module": (None, _GAUDI_COMPILING),
    "cache_size_limit": (None, _GAUDI_COMPILING),
    "compile_dynamic": (None, _GAUDI_COMPILING),
    "compile_from_sec_iteration": (None, _GAUDI_COMPILING),
    "inline_inbuilt_nn_modules": (None, _GAUDI_COMPILING),
    "use_compiled_autograd": (None, _GAUDI_COMPILING),
    "use_regional_compilation": (None, _GAUDI_COMPILING),
    "profiling_record_shapes": (None, _GAUDI_PROFILING),
    "profiling_steps": (None, _GAUDI_PROFILING),
    "profiling_steps_eval": (None, _GAUDI_PROFILING),
    "profiling_warmup_steps": (None, _GAUDI_PROFILING),
    "profiling_warmup_steps_eval": (None, _GAUDI_PROFILING),
    "profiling_with_stack": (None, _GAUDI_PROFILING),
}
"""What each flag is called now (None: nothing), and why."""
