"""What dropping directions of a trained adapter costs: predicted from its factors, and measured.

Every way to drop directions replaces h = A x by M h, with M an r×r matrix of each site: the optimal one in
balanced coordinates, the GRIT paper's projections, the truncated SVD of ΔW, the largest rows and columns. To
second order, and with the K-FAC factors, that changes the loss by ``½·N·T·tr((I − M)ᵀ Σ_g (I − M) Σ_a)`` (see
:meth:`grit_optim.fisher.Factors.fold`). Nothing is trained after the cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from grit_optim import GritOptimizer, linalg
from grit_optim.curvature.bucket import BucketCurvature
from grit_optim.rank import moves
from grit_optim.rank.coordinates import BALANCING_DAMPING, Coordinates
from grit_optim.rank.projections import paper_projection
from grit_optim.rank.selection import Bids, RankPolicy, ranks_within

from ..base_model.load import load_tokenizer
from ..core import environment
from ..core.files import BenchmarkError, write_json
from ..core.results import RunConfig
from ..core.settings import trainable
from ..tasks.objective import answer_loss, collate, evaluate
from ..tasks.registry import load_task
from ..tasks.task import Example, Task
from ..training.train import Run, data_fingerprint, train

FORMAT, KIND = 1, "truncation"
COMMON_BUDGET = "balanced, common budget"
_EVERY_SITE = "all"


@dataclass(frozen=True)
class Point:
    """One cut, predicted and measured.

    Attributes:
        method: how directions were chosen.
        site: the site that was cut, or "all".
        rank: directions kept per site; None where sites differ.
        parameters: share of the adapter's parameters that is kept.
        predicted: rise of the loss by the factors, in nats per token.
        first_order: what the gradient alone predicts (it is no part of ``predicted``), on the examples of the
            factors.
        measured: rise of the loss on the examples that the factors come from.
        heldout: rise of the loss on the task's held-out examples; None where only one site was cut.
    """

    method: str
    site: str
    rank: int | None
    parameters: float
    predicted: float
    first_order: float
    measured: float
    heldout: float | None


class Adapter:
    """A trained adapter of one rank, its factors, and its weights to come back to."""

    def __init__(self, model: Any, curvature: BucketCurvature, gradient: Tensor) -> None:
        self.model, self.curvature, self.gradient = model, curvature, gradient  # (∂L/∂B)ᵀ B, [S, r, r]
        sites = curvature.bucket.sites
        self.a, self.b = [s.a.detach().clone() for s in sites], [s.b.detach().clone() for s in sites]
        self.found: Coordinates = moves.coordinates(curvature, BALANCING_DAMPING)

    def predicted(self, operators: Tensor) -> Tensor:
        """``½·N·T·tr((I − M)ᵀ Σ_g (I − M) Σ_a)`` of each site: ``[S, r, r] -> [S]``."""
        factors = self.curvature.factors
        rest = linalg.eye_like(operators) - operators
        moved = rest.mT @ factors.gradient.double() @ rest @ factors.activation.double()
        return factors.price.double() * moved.diagonal(dim1=-2, dim2=-1).sum(-1)

    def first_order(self, operators: Tensor) -> Tensor:
        """``⟨∂L/∂B, B M − B⟩``, which is ``tr((∂L/∂B)ᵀ B (M − I))``, of each site: ``[S, r, r] -> [S]``."""
        return (self.gradient @ (operators - linalg.eye_like(operators))).diagonal(dim1=-2, dim2=-1).sum(-1)

    def apply(self, operators: Tensor) -> None:
        """Set B of every site to B M, which leaves the product B M A."""
        for site, b, operator in zip(self.curvature.bucket.sites, self.b, operators, strict=True):
            site.b.data.copy_((b.double() @ operator).to(b.dtype))

    def restore(self) -> None:
        """Set the weights back to their trained values."""
        self.apply(linalg.eye_like(self.curvature.factors.activation).double())


def balanced(adapter: Adapter, rank: Tensor) -> Tensor:
    """``M = T⁻¹ P T``: keep the leading balanced coordinates."""
    keep = linalg.leading_mask(rank, adapter.curvature.bucket.rank)
    return (adapter.found.inverse * keep[:, None, :]) @ adapter.found.transform


def _paper(two_sided: bool) -> Callable[[Adapter, Tensor], Tensor]:
    def project(adapter: Adapter, rank: Tensor) -> Tensor:
        """``M = P_b P_a``, the GRIT paper's projections of B and A."""
        curvature = adapter.curvature
        policy = RankPolicy(fixed=int(rank[0]), threshold=None, floor=1)
        move, _ = paper_projection(
            curvature.factors, curvature.ranks.rank, policy, curvature.factors_ready(), two_sided
        )
        return (move.b_weight @ move.a_weight).double()

    return project


def svd_of_product(adapter: Adapter, rank: Tensor) -> Tensor:
    """``B M A`` is the truncated SVD of ``B A``: with ``B A = U S Vᵀ``, ``M = B⁺ U_k U_kᵀ B``."""
    operators = []
    for a, b, k in zip(adapter.a, adapter.b, rank.tolist(), strict=True):
        right, left = (torch.linalg.qr(m.double(), mode="r").R for m in (a.mT, b))
        u, _, _ = torch.linalg.svd(left @ right.mT)
        operators.append(torch.linalg.solve(left, u[:, :k] @ (u[:, :k].mT @ left)))
    return torch.stack(operators)


def largest_entries(adapter: Adapter, rank: Tensor) -> Tensor:
    """Keep the coordinates with the largest ``‖row of A‖·‖column of B‖``, as magnitude pruning does."""
    size = torch.stack([a.norm(dim=1) * b.norm(dim=0) for a, b in zip(adapter.a, adapter.b, strict=True)])
    place = size.argsort(-1, descending=True).argsort(-1)
    return torch.diag_embed((place < rank[:, None]).double())


METHODS: dict[str, Callable[[Adapter, Tensor], Tensor]] = {
    "balanced": balanced,
    "one-sided (paper)": _paper(two_sided=False),
    "two-sided (paper)": _paper(two_sided=True),
    "SVD of ΔW": svd_of_product,
    "magnitude": largest_entries,
}


def gather(model: Any, batches: Sequence[Sequence[Example]], device: str) -> Adapter:
    """Factors and gradients over ``batches``, without a change of the weights."""
    base = torch.optim.SGD(trainable(model), lr=0.0)
    optimizer = GritOptimizer(
        base,
        model,
        precondition="none",
        fisher_decay=None,
        max_tokens=None,
        kfac_min_samples=1,
        reprojection="balanced",
        reprojection_warmup_steps=len(batches),  # never: the rate is 0, and nothing else may move the weights
    )
    total: dict[int, Tensor] = {}
    for batch in batches:
        answer_loss(model, collate(batch).to(device)).backward()
        for parameter in trainable(model):
            assert parameter.grad is not None
            total[id(parameter)] = total.get(id(parameter), 0.0) + parameter.grad.double() / len(batches)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.close()
    if len(optimizer.curvature) != 1:
        raise BenchmarkError("the measurement is for an adapter of one rank on one device")
    curvature = optimizer.curvature[0]
    sites = curvature.bucket.sites
    return Adapter(model, curvature, torch.stack([total[id(s.b)].mT @ s.b.detach().double() for s in sites]))


class Measurement:
    """The losses of an adapter, whole and cut."""

    def __init__(self, adapter: Adapter, examples: Sequence[Example], task: Task, device: str) -> None:
        self.adapter, self.examples, self.task, self.device = adapter, examples, task, device
        sizes = adapter.curvature.bucket.direction_size.double()
        self.sizes, self.total = sizes, float(sizes.sum() * adapter.curvature.bucket.rank)
        self.before = self._loss(examples), self._loss(task.heldout)

    def _loss(self, examples: Sequence[Example]) -> float:
        return evaluate(self.adapter.model, examples, device=self.device).loss

    @torch.no_grad()
    def point(self, method: str, operators: Tensor, rank: Tensor, site: int | None = None) -> Point:
        """Cut, measure, and put everything back; ``site`` for the cut of one site alone."""
        adapter = self.adapter
        if site is not None:
            alone = linalg.eye_like(operators).clone()
            alone[site] = operators[site]
            operators, full = alone, torch.full_like(rank, adapter.curvature.bucket.rank)
            full[site] = rank[site]
            rank = full
        adapter.apply(operators)
        measured = self._loss(self.examples) - self.before[0]
        heldout = self._loss(self.task.heldout) - self.before[1] if site is None else None
        adapter.restore()
        chosen = rank if site is None else rank[site : site + 1]
        return Point(
            method=method,
            site=_EVERY_SITE if site is None else adapter.curvature.bucket.names()[site],
            rank=int(chosen[0]) if bool((chosen == chosen[0]).all()) else None,
            parameters=float((self.sizes * rank).sum()) / self.total,
            predicted=float(adapter.predicted(operators).sum()),
            first_order=float(adapter.first_order(operators).sum()),
            measured=measured,
            heldout=heldout,
        )

    def points(self, drops: Sequence[int], budgets: Sequence[float]) -> Iterator[Point]:
        """All sites by every method, all sites by one budget, and each site alone in balanced coordinates."""
        curvature, full = self.adapter.curvature, self.adapter.curvature.bucket.rank
        for dropped in drops:
            rank = torch.full_like(curvature.ranks.rank, full - dropped)
            for name, method in METHODS.items():
                yield self.point(name, method(self.adapter, rank), rank)
        for budget in budgets:
            rank = common_ranks(self.adapter, budget * self.total)
            yield self.point(COMMON_BUDGET, balanced(self.adapter, rank), rank)
        for dropped in drops:
            rank = torch.full_like(curvature.ranks.rank, full - dropped)
            operators = balanced(self.adapter, rank)
            for site in range(len(curvature.bucket.sites)):
                yield self.point("balanced", operators, rank, site)


def common_ranks(adapter: Adapter, parameters: float) -> Tensor:
    """The ranks within one budget for all sites, chosen as ``rank_budget`` chooses them."""
    curvature = adapter.curvature
    loss = curvature.factors.price[:, None] * adapter.found.energy
    bids = [Bids(loss, curvature.bucket.direction_size, curvature.ranks.rank, adapter.found.usable)]
    return ranks_within(bids, torch.tensor(parameters, dtype=torch.float64), floor=0)[0]


def truncation(
    config: RunConfig,
    batches: int,
    drops: Sequence[int],
    budgets: Sequence[float],
    folder: Path,
    threads: int | None,
) -> Path:
    """Train once, gather factors on fresh training batches, cut by every method, write the results file."""
    if max(drops) >= config.rank:
        raise BenchmarkError(
            f"--drops {max(drops)} leaves nothing of rank {config.rank}; drop fewer directions"
        )
    if threads:
        torch.set_num_threads(threads)
    task = load_task(config.task, load_tokenizer())
    code, fingerprint = environment.commit(), data_fingerprint(task)
    run = Run(config, task)
    with tqdm(total=config.steps, desc="training", unit="step") as bar:

        def advance(loss: float) -> None:
            """Move the progress bar by one step."""
            bar.update()

        if train(run, advance):
            raise BenchmarkError(f"the run diverged at learning rate {config.lr:g}; choose a smaller --lr")
    if hasattr(run.optimizer, "close"):
        run.optimizer.close()
    fresh = list(islice(run.batches, batches))  # the stream goes on behind what was trained on
    adapter = gather(run.model, fresh, config.device)
    measurement = Measurement(adapter, [e for batch in fresh for e in batch], task, config.device)
    count = len(drops) * (len(METHODS) + len(adapter.a)) + len(budgets)
    points = list(tqdm(measurement.points(drops, budgets), total=count, desc="cuts", unit="cut"))
    result = {
        "format": FORMAT,
        "kind": KIND,
        "config": asdict(config),
        "batches": batches,
        "loss": {"fresh": measurement.before[0], "heldout": measurement.before[1]},
        "points": [asdict(point) for point in points],
        "fingerprint": fingerprint,
        "versions": environment.versions(),
        "code": code,
        "hardware": environment.hardware(config.device),
    }
    path = folder / f"{KIND}-{config.task}-{config.optimizer}-seed{config.seed}.json"
    write_json(path, result)
    return path
