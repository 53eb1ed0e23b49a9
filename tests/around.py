"""A layer whose adapter is used without its modules being called, so that no tap on them fires."""

from torch.nn import functional as F


def layer_of(model, ending):
    return next(module for name, module in model.named_modules() if name.endswith(ending))


def go_around_the_tap(layer):
    """What a fused kernel does: reads the adapter's weights, never calls its modules."""
    a, b, s = layer.lora_A["default"], layer.lora_B["default"], layer.scaling["default"]
    layer.forward = lambda x: layer.base_layer(x) + s * F.linear(F.linear(x, a.weight), b.weight)
