"""The natural gradient of the GRIT paper."""

from __future__ import annotations

import torch

from grit_optim.curvature.bucket import BucketCurvature
from grit_optim.options import Options
from grit_optim.preconditioners.held_gradients import Held, inner_product, norm
from grit_optim.preconditioners.mode import Mode
from grit_optim.processes.pieces import Columns, Norm, Rows, Sum, Work


class Inverse(Mode):
    """``"inverse"``: ``∇A ← Σ⁻¹ ∇A``, ``∇B ← ∇B Σ⁻¹`` with damped inverses, then the base's own step."""

    name = "inverse"
    uses = Mode.uses | {"step_length"}

    @classmethod
    def check(cls, options: Options) -> None:
        """Refuse a length that "inverse" does not have."""
        if options.preconditioning.step_length not in ("base", "natural"):
            raise ValueError(
                f"step_length={options.preconditioning.step_length!r} is for 'spectral' and 'steer'; in "
                "'inverse' the gradient keeps its norm ('base') or has that of Σ⁻¹∇ ('natural'), and the "
                "base's own step follows"
            )

    def refresh(self, curvature: BucketCurvature) -> None:
        """Invert the factors."""
        curvature.refresh_inverses()

    def before(self, held: Held) -> Work[None]:
        """Multiply by the inverse, and keep each matrix's norm if asked to."""
        (columns,) = yield [Columns(held.gradient)]
        (natural,) = yield [Rows(held.curvature.apply(held.group, columns))]
        along = Sum(inner_product(natural, held.gradient))
        size, natural_size, along_size = yield [Norm(norm(held.gradient)), Norm(norm(natural)), along]
        held.cosine = along_size / (natural_size * size)
        held.without, held.turned = size, natural_size
        if self.options.step_length == "base":
            natural = natural * (size / natural_size).nan_to_num(0.0, posinf=0.0)
        held.gradient = torch.where(held.ready, natural, held.gradient)
