"""What every way to use the curvature can do around the base optimizer's step; by itself nothing."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from grit_optim.curvature.bucket import BucketCurvature
from grit_optim.options import Options, PreconditionOptions
from grit_optim.preconditioners.held_gradients import Held
from grit_optim.processes.pieces import Work


class Mode:
    """A way to use the curvature: one class with its own defaults.

    A mode has three parts, each a no-op unless it says otherwise: :meth:`refresh` derives operators from the
    factors, :meth:`before` changes the gradient or the coordinates that the base is about to see,
    :meth:`after` changes what the base made of it.

    Attributes:
        name: the value of ``precondition``.
        changes_coordinates: whether :meth:`refresh` moves the base's state or the weights, so that it must
            not run while the mode is not in use.
        holds_gradients: whether the mode, or its guard against gradients that are not finite, needs them
            stacked.
        moments_in_operators: whether the base's moments are expressed in the operators, so that a checkpoint
            needs those.
        operators_rotate: whether the operators are orthogonal, which a checkpoint's then have to be.
        defaults: of the options that are None until a mode says what they are.
        uses: which of the options that are up to the mode (``options.effect.OF_THE_MODE``) it uses. A user
            is told of others.
    """

    name: ClassVar[str]
    changes_coordinates: ClassVar[bool] = False
    holds_gradients: ClassVar[bool] = True
    moments_in_operators: ClassVar[bool] = False
    operators_rotate: ClassVar[bool] = False
    defaults: ClassVar[dict[str, Any]] = {
        "kfac_update_freq": 1,
        "kfac_damping": 0.03,
        "kfac_power": 1.0,
        "direction_momentum": "base",
        "step_length": "base",
    }

    uses: ClassVar[frozenset[str]] = frozenset(
        {
            "fisher",
            "pairing",
            "kfac_damping",
            "kfac_inversion_device",
            "kfac_update_freq",
            "ng_warmup_steps",
        }
    )

    def __init__(self, base: Optimizer, options: PreconditionOptions) -> None:
        self.base = base
        self.options = options

    @classmethod
    def defaults_around(cls, base: Optimizer) -> dict[str, Any]:
        """The defaults where they depend on the base optimizer too."""
        return dict(cls.defaults)

    @classmethod
    def check(cls, options: Options) -> None:
        """Refuse options that the mode cannot work with.

        Raises:
            ValueError: what is wrong, and what to do.
        """
        if options.preconditioning.step_length == "natural":
            raise ValueError(
                f"step_length='natural' is the length of Σ⁻¹∇, which precondition={cls.name!r} does not "
                "apply; use it with precondition='inverse', or leave it out"
            )

    def refresh(self, curvature: BucketCurvature) -> None:
        """Derive from the factors what the mode applies."""

    def before(self, held: Held) -> Work[None]:
        """Change the gradient that the base is about to see."""
        yield from ()

    def as_the_base_sees(self, held: Held, gradient: Tensor) -> Tensor:
        """A gradient of the weights ``[m, rows, columns]`` in the coordinates that the base works in."""
        return gradient

    def after(self, held: Held) -> Work[None]:
        """Change what the base made of it, and let ``gradient_norm`` be that of whole matrices."""
        (held.gradient_norm,) = yield [held.norm_of_own]

    def abandon(self, held: Held) -> None:
        """Put the weights back as they were before the step, as far as :meth:`before` has taken note of them.

        For after it, the base or :meth:`after` failed: no pair is left half-way, or in other coordinates.
        """
        if held.weights is not None:
            held.group.write(held.weights)

    def to_plain_coordinates(self, curvature: BucketCurvature) -> None:
        """Bring the base's state back to the coordinates of A and B themselves."""
