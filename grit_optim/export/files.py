"""PEFT's names: of the files of a saved adapter, and of the tensors in them."""

WEIGHTS = "adapter_model.safetensors"
STALE_WEIGHTS = "adapter_model.bin"
"""The file of PEFT's older format. PEFT would read it if ``WEIGHTS`` were deleted."""

PREFIX = "base_model.model."
"""What PEFT puts in front of a layer's name in the base model."""
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
"""What PEFT puts after it."""
