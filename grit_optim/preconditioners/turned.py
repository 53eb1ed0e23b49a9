"""What the modes share in which the base works in other coordinates than those of A and B."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from grit_optim.base import transport
from grit_optim.curvature.bucket import BucketCurvature
from grit_optim.preconditioners.held_gradients import Held
from grit_optim.preconditioners.mode import Mode
from grit_optim.processes.pieces import Columns, Rows, Work


class Turned(Mode):
    """The base steps in coordinates of its own, and its step is brought back.

    Outside :meth:`~torch.optim.Optimizer.step` A and B, and copies of them in the base's state, are in the
    coordinates that they always had. Averages over steps, which others may take of them, so stay averages.
    The base's averages of gradients stay in its coordinates between steps.
    """

    changes_coordinates = True
    moments_in_operators: ClassVar[bool] = True

    def turn(self, held: Held, stacked: Tensor) -> Tensor:
        """Weights ``[m, rows, columns]`` in the base's coordinates."""
        raise NotImplementedError

    def turn_back(self, held: Held, stacked: Tensor) -> Tensor:
        """What :meth:`turn` made, as weights in the coordinates of A and B."""
        raise NotImplementedError

    def move(
        self, curvature: BucketCurvature, old: tuple[Tensor, Tensor]
    ) -> tuple[transport.Move, tuple[Tensor, Tensor] | None]:
        """From the base's coordinates before to those of the operators now in force.

        Args:
            curvature: of the bucket.
            old: the operators before, ``[S, r, r]`` each.

        Returns:
            The move, and the covariances of the gradients' entries over the rank before it, as
            :func:`~grit_optim.base.transport.move_state` takes them.
        """
        raise NotImplementedError

    def derive(self, curvature: BucketCurvature) -> None:
        """Set the operators by what the factors are now."""
        raise NotImplementedError

    def refresh(self, curvature: BucketCurvature) -> None:
        """Change to the coordinates that the factors give now, and take the base's moments along."""
        old = curvature.a_operator, curvature.b_operator
        self.derive(curvature)
        transport.move_state(self.base, curvature.bucket.groups, *self.move(curvature, old))

    def to_plain_coordinates(self, curvature: BucketCurvature) -> None:
        """Bring the base's moments back to the coordinates of A and B."""
        old = curvature.a_operator, curvature.b_operator
        curvature.reset_operators()
        transport.move_state(self.base, curvature.bucket.groups, *self.move(curvature, old))

    def before(self, held: Held) -> Work[None]:
        """Turn gradient, weights and copies of the weights into the base's coordinates."""
        group = held.group
        held.weights = group.stack(group.parameters)
        gradient, weights = yield [Columns(held.gradient), Columns(held.weights)]
        turned = [Rows(self.as_the_base_sees(held, gradient)), Rows(self.turn(held, weights))]
        held.gradient, weights = yield turned
        group.write(weights)
        held.rotated = group.stack(group.parameters)
        present, copies = transport.weight_copies(self.base, group)
        if copies:
            part, places = group.subset(present), group.matrices(present)
            # A base that makes its copies in this step makes them of the weights.
            held.copies, held.rotated_copies = held.weights.clone(), held.rotated.clone()
            held.copies[places] = part.stack(copies)
            (columns,) = yield [Columns(held.copies)]
            (turned_copies,) = yield [Rows(self.turn(held, columns))]
            transport.write_copies(part, copies, turned_copies[places])
            held.rotated_copies[places] = part.stack(copies)

    def after(self, held: Held) -> Work[None]:
        """Turn the base's step back and add it to the weights as they were; likewise for the copies."""
        assert held.weights is not None
        assert held.rotated is not None
        group = held.group
        step = group.stack(group.parameters) - held.rotated
        held.gradient_norm, step = yield [held.norm_of_own, Columns(step)]
        (step,) = yield [Rows(self.turn_back(held, step))]
        group.write(held.weights + step)
        present, copies = transport.weight_copies(self.base, group)
        if copies:
            part, places = group.subset(present), group.matrices(present)
            # A base that makes its copies in this step makes them of the weights.
            were = held.weights if held.copies is None else held.copies
            turned = held.rotated if held.rotated_copies is None else held.rotated_copies
            now = turned.clone()
            now[places] = part.stack(copies)
            (columns,) = yield [Columns(now - turned)]
            (moved,) = yield [Rows(self.turn_back(held, columns))]
            transport.write_copies(part, copies, (were + moved)[places])

    def abandon(self, held: Held) -> None:
        """Put weights and copies back as they were."""
        if held.weights is not None:
            held.group.write(held.weights)
        if held.copies is not None:
            group = held.group
            present, copies = transport.weight_copies(self.base, group)
            transport.write_copies(group.subset(present), copies, held.copies[group.matrices(present)])
