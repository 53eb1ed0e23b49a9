"""The curvature of one bucket: its sites' Fisher approximations, and the operators derived from them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import copy

import torch
from torch import Tensor

from grit_optim import linalg
from grit_optim.base.transport import Move
from grit_optim.capture.sums import Sums
from grit_optim.curvature.factors import RANK_AXES, Factors
from grit_optim.curvature.kinds import KindFactors, make_kinds
from grit_optim.curvature.moments import GradientMoments
from grit_optim.integrity.fields import Fields, flag, rotation, tensor
from grit_optim.lora.buckets import Bucket, Group, in_pieces
from grit_optim.lora.kept_ranks import KeptRanks
from grit_optim.lora.site import Site
from grit_optim.options import CurvatureOptions

_OPERATORS = ("a_operator", "b_operator", "a_ready", "b_ready")


class BucketCurvature:
    """The Fisher approximations of a bucket's sites, and the operators derived from them.

    An operator multiplies the rank side of a gradient. It is a damped inverse, a power of one, or an
    eigenbasis, depending on the mode of preconditioning.

    Attributes:
        bucket: the sites, in the order of every ``[S, …]`` tensor.
        ranks: the ranks in force. They are read here and set elsewhere.
        factors: the K-FAC factors Σ_a and Σ_g.
        kinds: what each kind of token brings to the factors, where kinds are told apart; else None.
        moments: second moments of the gradients, for the kinds of ``fisher`` that need them; else None.
        a_operator: what multiplies A's gradient ``[S, r, r]``.
        b_operator: what multiplies B's gradient ``[S, r, r]``.
        a_ready: sites whose ``a_operator`` comes from enough samples ``[S]``. Elsewhere it is the identity.
        b_ready: sites whose ``b_operator`` comes from enough samples ``[S]``. Elsewhere it is the identity.
        damping_used: λ of the latest inverses, ``[2, S]`` for A and B; NaN where there was no inverse.
        damping_scale: what the adaptive schedule multiplies ``kfac_damping`` by.
    """

    def __init__(self, bucket: Bucket, ranks: KeptRanks, options: CurvatureOptions) -> None:
        self.bucket = bucket
        self.ranks = ranks
        self.factors = Factors.zeros(len(bucket.sites), bucket.rank, bucket.device)
        self.kinds = make_kinds(len(bucket.sites), bucket.rank, bucket.device, options.modality_weights)
        self.moments = None if options.fisher == "kfac" else GradientMoments(options.fisher, bucket)
        self.damping_used = torch.full(
            (2, len(bucket.sites)), torch.nan, dtype=torch.float32, device=bucket.device
        )
        self.damping_scale = 1.0
        self._options = options
        self.reset_operators()

    def view(self) -> BucketCurvature:
        """A copy whose ranks and factors can be set without setting ours. The tensors are shared."""
        seen = copy(self)
        seen.ranks, seen.factors, seen.kinds = copy(self.ranks), copy(self.factors), copy(self.kinds)
        return seen

    def apply(self, group: Group, stacked: Tensor) -> Tensor:
        """Multiply matrices of ``group`` ``[m, rows, columns]`` by the operators of the latest refresh.

        With fisher="ekfac" or "diagonal" each entry is multiplied by its scale, in the eigenbasis.
        """
        if self.moments is None or not self.moments.elementwise:
            return group.apply(self.operator(group.side), stacked)
        scales = self.moments.stacked(self.moments.scales, group).to(stacked.dtype)
        return self.from_eigenbasis(group, scales * self.to_eigenbasis(group, stacked))

    def to_eigenbasis(self, group: Group, stacked: Tensor) -> Tensor:
        """``Qᵀ X`` for A, ``X Q`` for B, where the operators Q are eigenbases (I for fisher="diagonal")."""
        basis = self.operator(group.side)
        return group.apply(basis.mT if group.side == "A" else basis, stacked)

    def from_eigenbasis(self, group: Group, stacked: Tensor) -> Tensor:
        """``Q X`` for A, ``X Qᵀ`` for B: undoes :meth:`to_eigenbasis`."""
        basis = self.operator(group.side)
        return group.apply(basis if group.side == "A" else basis.mT, stacked)

    def fold(
        self,
        sums: Sums,
        accept: Tensor,
        gradient_unit: Tensor,
        loss_tokens: Tensor,
        moment_unit: Tensor | None,
        by_gradients: Tensor | None = None,
    ) -> None:
        """Fold one step into the factors and, where ``fisher`` needs them, the moments of the gradients.

        Args:
            sums: the step's sums over tokens.
            accept: boolean scalar; where false nothing changes.
            gradient_unit: the unit in which this step's Σ_g is measured, a scalar.
            loss_tokens: number of tokens that the step's loss is a mean over, a scalar.
            moment_unit: the unit in which this step's squared gradients are measured, a scalar; None without
                moments.
            by_gradients: sites whose sums come from gradients, boolean ``[S]``; None: none.
        """
        decay, weight = self._options.fisher_decay, self.factors.activation_weight
        self.factors.fold(sums, accept, decay, gradient_unit, loss_tokens, by_gradients)
        if self.kinds is not None:
            self.kinds.fold(sums, accept, decay, gradient_unit, weight)
            self.factors.activation, self.factors.gradient = self.kinds.combined()
        if self.moments is None or moment_unit is None:
            return
        found = [part for group in self.bucket.groups if (part := group.with_gradient()) is not None]
        for part in in_pieces(found):
            gradients = part.stack(part.gradients()) / moment_unit.sqrt()
            if self.moments.kind == "ekfac":
                gradients = self.to_eigenbasis(part, gradients)
            self.moments.fold(part, gradients, (sums.rows > 0) & accept, self._options.fisher_decay)

    def operator(self, side: str) -> Tensor:
        """The operator of one side, ``[S, r, r]``."""
        return self.a_operator if side == "A" else self.b_operator

    def ready(self, side: str) -> Tensor:
        """Whether each site's operator of one side comes from enough samples, ``[S]``."""
        return self.a_ready if side == "A" else self.b_ready

    @property
    def damping(self) -> float:
        """``kfac_damping``, times the factor of the adaptive schedule."""
        assert self._options.kfac_damping is not None  # the mode has set its default
        return self._options.kfac_damping * self.damping_scale

    @property
    def relative(self) -> bool:
        """Whether λ is in units of the factors' mean eigenvalue."""
        return self._options.damping == "relative"

    def factors_ready(self) -> tuple[Tensor, Tensor]:
        """Whether each site's Σ_a and Σ_g have seen ``kfac_min_samples`` tokens, ``[S]`` each."""
        return self.factors.ready(self._options.kfac_min_samples)

    def paired_factors(self) -> tuple[Tensor, Tensor]:
        """The factor that preconditions A and the one that preconditions B, each ``[S, r, r]``.

        K-FAC pairs A with Σ_g and B with Σ_a, since ``F_A ≈ Σ_g ⊗ E[x xᵀ]`` and ``F_B ≈ E[g gᵀ] ⊗ Σ_a``. The
        GRIT paper does the opposite. With fisher="block_diagonal" they are the covariances of the gradients.
        They are returned on ``kfac_inversion_device``.
        """
        pair = (self.factors.gradient, self.factors.activation)
        if self._options.pairing == "paper":
            pair = pair[::-1]
        if self.moments is not None and not self.moments.elementwise:
            pair = (self.moments.matrices("A"), self.moments.matrices("B"))
        device = self._options.kfac_inversion_device or self.bucket.device
        return pair[0].to(device), pair[1].to(device)

    def paired_readiness(self) -> tuple[Tensor, Tensor]:
        """Whether each site's factor for A, and its factor for B, has seen enough samples, ``[S]`` each."""
        activation, gradient = self.factors_ready()
        if self.moments is not None:  # a step whose δ is zero tells nothing about ∇A
            return gradient, gradient
        return (gradient, activation) if self._options.pairing == "kfac" else (activation, gradient)

    def refresh_inverses(self) -> None:
        """Set the operators to the damped inverses of the paired factors."""
        if self.moments is not None and self.moments.elementwise:
            self._refresh_scales(self.moments, 1.0)
            return
        stacked = torch.cat(self.paired_factors())
        inverse, used = linalg.damped_inverse(stacked, self._strength(stacked))
        self._set_operators(inverse.to(self.bucket.device), used.to(self.bucket.device).reshape(2, -1))

    def refresh_powers(self, power: float) -> None:
        """Set the operators to the damped inverses of the paired factors, each raised to ``power``."""
        if self.moments is not None and self.moments.elementwise:
            self._refresh_scales(self.moments, power)
            return
        if power == 1:
            self.refresh_inverses()
            return
        stacked = torch.cat(self.paired_factors())
        if self.relative and power > 0 and (1 / power).is_integer():
            roots, used = linalg.damped_root(stacked, self._strength(stacked), int(1 / power), self.damping)
        else:
            roots, used = linalg.damped_power(stacked, self._strength(stacked), power)
        mask = self.ranks.mask.to(stacked.device)  # coordinates that were given up stay exactly zero
        roots = linalg.block(roots, torch.cat((mask, mask)))
        self._set_operators(roots.to(self.bucket.device), used.to(self.bucket.device).reshape(2, -1))

    def _strength(self, stacked: Tensor) -> Tensor:
        """λ of the paired factors ``[2S]``, from the mean over the coordinates in use."""
        in_use = self.ranks.in_use.to(stacked.device)
        relative = self.relative
        return linalg.damping_strength(stacked, self.damping, relative, torch.cat((in_use, in_use)))

    def _refresh_scales(self, moments: GradientMoments, power: float) -> None:
        """Set the scales to the damped moments to the power ``−power``; for ekfac, renew the eigenbases."""
        used = torch.full_like(self.damping_used, torch.nan)
        turns = self.refresh_eigenbases() if moments.kind == "ekfac" else None
        for group in self.bucket.groups:
            side = 0 if group.side == "A" else 1
            values = moments.stacked(moments.means, group)
            if turns is not None:  # second moments change coordinates by the squared entries
                turn = turns[side].square()
                values = group.apply(turn if side == 0 else turn.mT, values)
                moments.set(moments.means, group, values)
            mean = values.mean((1, 2))
            strength = self.damping * (mean if self.relative else torch.ones_like(mean))
            scales, used_here = linalg.damped_elementwise_power(values, strength, power)
            moments.set(moments.scales, group, scales)
            used[side] = used[side].index_copy(0, group.index, used_here.to(used.dtype))
        self._set_operators(torch.cat((self.a_operator, self.b_operator)), used)

    def _set_operators(self, operators: Tensor, damping_used: Tensor) -> None:
        """Set the operators of A and then B, ``[2S, r, r]``, where the factor is ready and λ is finite."""
        self.damping_used = damping_used
        ready_a, ready_b = self.paired_readiness()
        size = len(self.bucket.sites)
        self.a_ready, self.b_ready = (
            ready_a & damping_used[0].isfinite(),
            ready_b & damping_used[1].isfinite(),
        )
        self.a_operator = _where_ready(self.a_ready, operators[:size])
        self.b_operator = _where_ready(self.b_ready, operators[size:])

    def put_operators(self, of_a: Tensor, of_b: Tensor, ready: Tensor) -> None:
        """Set the operators ``[S, r, r]`` of the sites that are ``ready`` ``[S]``; else the identity."""
        self.a_ready, self.b_ready = ready.clone(), ready.clone()
        self.a_operator, self.b_operator = (
            _where_ready(ready, operator.to(self.a_operator.dtype)) for operator in (of_a, of_b)
        )

    def refresh_eigenbases(self) -> tuple[Tensor, Tensor]:
        """Set the operators to the eigenvectors of the paired factors.

        Returns:
            ``Q_newᵀ Q_old`` for A and for B, ``[S, r, r]`` each, which turns old coordinates into new ones.
        """
        a_factor, b_factor = self.paired_factors()
        mask = self.ranks.mask.to(a_factor.device)
        _, bases = linalg.leading_eigenbasis(torch.cat((a_factor, b_factor)), torch.cat((mask, mask)))
        old_a, old_b = self.a_operator, self.b_operator
        self._set_operators(bases.to(self.bucket.device), torch.zeros_like(self.damping_used))
        return self.a_operator.mT @ old_a, self.b_operator.mT @ old_b

    def drop_operators(self, same_fisher: bool) -> None:
        """Put no operator in force until the next refresh. For a checkpoint of another mode or ``fisher``.

        Args:
            same_fisher: whether the checkpoint has our ``fisher``. For ekfac the eigenbases are then kept,
                since the moments are expressed in them.
        """
        if same_fisher and self.moments is not None and self.moments.kind == "ekfac":
            self.a_ready, self.b_ready = torch.zeros_like(self.a_ready), torch.zeros_like(self.b_ready)
        else:
            self.reset_operators()

    def reset_operators(self) -> None:
        """Set the operators to the identity, and none in force."""
        identity = linalg.eye_like(self.factors.activation)
        self.a_operator, self.b_operator = identity.clone(), identity.clone()
        self.a_ready, self.b_ready = torch.zeros(
            2, len(self.bucket.sites), dtype=torch.bool, device=self.bucket.device
        )

    @property
    def engaged(self) -> Tensor:
        """Sites whose operators are in force for both A and B, boolean ``[S]``."""
        return self.a_ready & self.b_ready

    def scale_damping(self, scale: float) -> None:
        """Set the factor of the adaptive schedule on ``kfac_damping``."""
        self.damping_scale = scale

    def change_coordinates(self, move: Move) -> None:
        """Express the factors in the coordinates that ``move`` brought A and B to."""
        self.factors.change_coordinates(move.a_weight, move.b_weight)
        if self.kinds is not None:
            self.kinds.change_coordinates(move.a_weight, move.b_weight)

    def forget(self, sites: Tensor) -> None:
        """Let the factors of the chosen sites, boolean ``[S]``, be as if nothing had been seen."""
        self.factors.forget(sites)
        if self.kinds is not None:
            self.kinds.forget(sites)

    def forget_named(self, names: Collection[str]) -> None:
        """As :meth:`forget`, for the sites among ``names``."""
        chosen = [name in names for name in self.bucket.names()]
        if any(chosen):
            self.forget(torch.tensor(chosen, dtype=torch.bool, device=self.bucket.device))

    def rank_axes(self) -> dict[str, tuple[int, ...]]:
        """Names of a site's saved tensors to the axes that run over its rank; the others have none."""
        operators = dict.fromkeys(_OPERATORS[:2], (0, 1))
        moments = {} if self.moments is None else self.moments.rank_axes()
        return {**RANK_AXES, **KindFactors.rank_axes(), **operators, **moments}

    @staticmethod
    def saved_fields(fisher: str, site: Site, rotations: bool) -> Fields:
        """What a checkpoint of this ``fisher`` may hold of ``site``, under the names of :meth:`pack`.

        Args:
            fisher: the option.
            site: the pair.
            rotations: whether the operators are eigenvectors.
        """
        matrix = rotation(site.rank) if rotations else tensor(site.rank, site.rank)
        operators = dict.fromkeys(_OPERATORS[:2], matrix) | dict.fromkeys(_OPERATORS[2:], flag)
        moments = {} if fisher == "kfac" else GradientMoments.saved_fields(fisher, site)
        of_kinds = KindFactors.saved_fields(site.rank)
        return {**Factors.saved_fields(site.rank), **of_kinds, **operators, **moments}

    def pack(self, with_operators: bool) -> dict[str, dict[str, Tensor]]:
        """The state of each site for a checkpoint: site name to tensors by name.

        Args:
            with_operators: whether operators, and scales of moments, are included.
        """
        packed = {}
        for position, name in enumerate(self.bucket.names()):
            state = self.factors.pack(position)
            state.update({} if self.kinds is None else self.kinds.pack(position))
            if with_operators:
                state.update({key: getattr(self, key)[position].clone() for key in _OPERATORS})
            if self.moments is not None:
                state.update(self.moments.pack(position, with_operators))
            packed[name] = state
        return packed

    def unpack(self, position: int, state: Mapping[str, Tensor]) -> None:
        """Put the state of the site at ``position`` back. Tensors that ``state`` lacks stay as they are."""
        self.factors.unpack(position, state)
        if self.kinds is not None:
            self.kinds.unpack(position, state)
        if self.moments is not None:
            self.moments.unpack(position, state)
        for key in _OPERATORS:
            if key in state:
                getattr(self, key)[position].copy_(state[key])


def _where_ready(ready: Tensor, operators: Tensor) -> Tensor:
    """The operators of ready sites, the identity elsewhere, row by row in memory.

    Cholesky inverses come column by column. A product of theirs is rounded otherwise than one of their copies
    from a checkpoint.
    """
    return torch.where(ready[:, None, None], operators, linalg.eye_like(operators)).contiguous()
