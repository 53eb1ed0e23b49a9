"""Doubles of fused LoRA kernels: they read A and B, call no module of the adapter, and return gradients.

The forms are those that Unsloth and Axolotl publish: one projection, the three of an attention layer at once,
and a whole SwiGLU MLP. What is fused is the autograd function; the arithmetic is torch's.
"""

import torch
from torch.nn import functional as F


def parts_of(layer):
    """Frozen weight, A, B and s of a PEFT layer."""
    pair = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return layer.base_layer.weight, *pair, layer.scaling["default"]


def _multiply(x, w, a, b, s):
    return x @ w.T + s * (x @ a.T) @ b.T


def _gradients(x, g, a, b, s):
    """∂L/∂A and ∂L/∂B, as products that never form h's gradient by a module."""
    x, g = x.flatten(0, -2), g.flatten(0, -2)
    return s * (g @ b).T @ x, s * g.T @ (x @ a.T)


class FusedProjections(torch.autograd.Function):
    """One function for n projections of one input: w, a, b, s of each follow the input."""

    @staticmethod
    def forward(ctx, x, *parts):
        ctx.save_for_backward(x, *(p for p in parts if isinstance(p, torch.Tensor)))
        ctx.scales = parts[3::4]
        return tuple(_multiply(x, *parts[i : i + 4]) for i in range(0, len(parts), 4))

    @staticmethod
    def backward(ctx, *gradients):
        x, *tensors = ctx.saved_tensors
        into_x, others = torch.zeros_like(x), []
        for i, (g, s) in enumerate(zip(gradients, ctx.scales, strict=True)):
            w, a, b = tensors[3 * i : 3 * i + 3]
            into_x = into_x + g @ w + s * (g @ b) @ a
            others += [None, *_gradients(x, g, a, b, s), None]
        return into_x, *others


class FusedSwiglu(torch.autograd.Function):
    """down(silu(gate(x)) · up(x)), with its own backward pass."""

    @staticmethod
    def forward(ctx, x, *parts):
        gate, up, down = parts[:4], parts[4:8], parts[8:]
        ctx.save_for_backward(x, *(p for p in parts if isinstance(p, torch.Tensor)))
        ctx.scales = parts[3::4]
        return _multiply(F.silu(_multiply(x, *gate)) * _multiply(x, *up), *down)

    @staticmethod
    def backward(ctx, g):
        x, *tensors = ctx.saved_tensors
        gate, up, down = ((*tensors[3 * i : 3 * i + 3], ctx.scales[i]) for i in range(3))
        e, u = _multiply(x, *gate), _multiply(x, *up)
        sigmoid = e.sigmoid()
        into_h = g @ down[0] + down[3] * (g @ down[2]) @ down[1]
        into_e = into_h * u * sigmoid * (1 + e * (1 - sigmoid))
        into_u = into_h * e * sigmoid
        into_x = sum(d @ w + s * (d @ b) @ a for d, (w, a, b, s) in ((into_e, gate), (into_u, up)))
        found = [
            _gradients(source, into, *part[1:])
            for source, into, part in ((x, into_e, gate), (x, into_u, up), (e * sigmoid * u, g, down))
        ]
        return into_x, *(entry for a, b in found for entry in (None, a, b, None))


def fuse_each(model):
    """Every projection by a function of its own."""
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            layer.forward = lambda x, layer=layer: FusedProjections.apply(x, *parts_of(layer))[0]
    return model


def fuse_qkv(model):
    """The three projections of each attention layer by one function; it runs where the first is called."""
    for layer in model.base_model.model.model.layers:
        attention, waiting = layer.self_attn, []
        projections = attention.q_proj, attention.k_proj, attention.v_proj

        def first(x, projections=projections, waiting=waiting):
            waiting[:] = FusedProjections.apply(x, *(part for p in projections for part in parts_of(p)))
            return waiting[0]

        projections[0].forward = first
        for place in (1, 2):
            projections[place].forward = lambda x, place=place, waiting=waiting: waiting[place]
    return model


def fuse_mlp(model):
    """Each MLP by one function."""
    for layer in model.base_model.model.model.layers:
        mlp = layer.mlp
        parts = [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        mlp.forward = lambda x, parts=parts: FusedSwiglu.apply(x, *(q for p in parts for q in parts_of(p)))
    return model


def fuse_all(model):
    """Attention by one function, its output projection by another, and the MLP by a third."""
    return fuse_mlp(fuse_qkv(fuse_each(model)))
