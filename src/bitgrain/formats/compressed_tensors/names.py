"""Names of tensors and of the configuration that several modules of this format need."""

from __future__ import annotations

from bitgrain.formats.config_reader import words

WHERE = "quantization_config"
# Local names that only a quantized module has.
QUANTIZED_NAMES = words(
    "weight_packed weight_scale weight_zero_point weight_g_idx weight_shape weight_global_scale input_scale input_zero_point"
    " input_global_scale scale_packed meta"
)
