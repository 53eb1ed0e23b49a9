"""PEFT's names: of the files of a saved adapter, and of the tensors in them."""

WEIGHTS = "adapter_model.safetensors"
STALE_WEIGHTS = "adapter_model.bin"
"""The weights in PEFT's older format, which do not belong to an adapter that is written anew."""

PREFIX = "base_model.model."
"""What stands in front of a layer's name in the base model."""
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
"""What follows the layer's name: A and B of a pair."""
LORA_B_BIAS = ".lora_B.bias"
"""What follows the layer's name: the bias of B."""
EMBEDDING_A, EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
"""What follows the layer's name: A and B of an embedding."""
