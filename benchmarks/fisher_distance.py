"""How far each Fisher approximation is from the dense per-token one: `python -m benchmarks.fisher_distance --out DIR`.

The embedded model with an adapter that has been trained for a few steps; some of its sites, thousands of
answer tokens, all in float64. For A and B of each site, F = E[vec(∇) vec(∇)ᵀ] over tokens is built as a
matrix and compared with what each approximation stands for, its side of width d taken as isotropic where it
says nothing about it:

- distance: ‖F − c F̂‖ / ‖F‖ at the best c, since a common factor is the learning rate's business;
- cosine: between (F̂ + λ)⁻¹ ∇ and (F + λ)⁻¹ ∇ for the gradient ∇ of the whole batch, λ relative to the mean
  eigenvalue.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import environment, packing
from .files import write_json, write_text
from .results import RunConfig

if TYPE_CHECKING:
    from torch import Tensor

    from grit_optim import Site

DAMPING = 0.3  # what the default, "spectral", uses
SITES = ("layers.0.self_attn.q_proj", "layers.2.self_attn.v_proj")
LABELS = {
    "none": "none: the identity",
    "kfac-paper": "kfac, the paper's pairing",
    "kfac": "kfac (default)",
    "block_diagonal": "block_diagonal",
    "diagonal": "diagonal",
    "ekfac": "ekfac",
    "kfac-full": "K-FAC with both sides, for comparison",
}
STATE = {
    "none": "0", "kfac-paper": "2 r²", "kfac": "2 r²", "block_diagonal": "4 r²", "diagonal": "2 r² + r (d_in + d_out)",
    "ekfac": "4 r² + r (d_in + d_out)", "kfac-full": "d_in² + d_out² + 2 r²",
}  # fmt: skip


def per_token(site: Site, run: Callable[[], None]) -> tuple[Tensor, Tensor]:
    """The outer halves of every token's gradients, float64: for A (δ ``[T, r]``, x ``[T, d_in]``), for B (g, h) alike.

    Args:
        site: the pair.
        run: one forward and backward pass; gradients are left alone.
    """
    import torch

    seen: list[Tensor] = []

    def watch(module: Any, args: Any, output: Tensor) -> None:
        """Keep input, output and the output's gradient."""
        x, h = args[0].detach(), output.detach()
        output.register_hook(lambda delta: seen.extend((x, h, delta.detach())))

    def watch_output(module: Any, args: Any, output: Tensor) -> None:
        """Keep the gradient behind B."""
        output.register_hook(lambda g: seen.append(g.detach()))

    hooks = [
        site.tap.register_forward_hook(watch),
        site.b_modules[site.adapter].register_forward_hook(watch_output),
    ]
    run()
    for hook in hooks:
        hook.remove()
    g, x, h, delta = (t.flatten(0, -2).double() for t in seen)
    matters = (delta != 0).any(-1)
    g, x, h, delta = (t[matters] for t in (g, x, h, delta))
    return torch.cat((delta, x), 1), torch.cat((h, g), 1)


def approximations(inner: Tensor, outer: Tensor, opposite: Tensor) -> dict[str, Tensor]:
    """Each approximation's dense matrix ``[r d, r d]`` for one matrix of a pair, the rank side first.

    Args:
        inner: the rank side of every token's gradient ``[T, r]`` (δ for A, h for B).
        outer: its other side ``[T, d]`` (x for A, g for B).
        opposite: the rank side of the pair's other matrix ``[T, r]``.
    """
    import torch

    count, d = outer.shape
    eye = torch.eye(d, dtype=inner.dtype)
    factor, wide = inner.T @ inner / count, outer.T @ outer / count
    second = inner.square().T @ outer.square() / count
    basis = torch.linalg.eigh(factor)[1].contiguous()
    corrected = (inner @ basis).square().T @ outer.square() / count
    turn = torch.kron(basis, eye)
    weighted = (inner * outer.square().sum(1, keepdim=True)).T @ inner / count  # E[∇A ∇Aᵀ] over single tokens
    return {
        "none": torch.eye(factor.shape[0] * d, dtype=inner.dtype),
        "kfac-paper": torch.kron(opposite.T @ opposite / count, eye),
        "kfac": torch.kron(factor, eye),
        "block_diagonal": torch.kron(weighted, eye),
        "diagonal": torch.diag(second.flatten()),
        "ekfac": (turn * corrected.flatten()) @ turn.T,
        "kfac-full": torch.kron(factor, wide),
    }


def natural(matrix: Tensor, gradient: Tensor) -> Tensor:
    """``(F + λ)⁻¹ ∇`` with λ relative to the mean eigenvalue."""
    import torch

    damped = matrix + DAMPING * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)
    return torch.linalg.solve(damped, gradient)


def compare(approximation: Tensor, dense: Tensor, gradient: Tensor, truth: Tensor) -> dict[str, float]:
    """Distance and cosine, as the module's docstring defines them; ``truth`` is the dense natural gradient."""
    overlap = (approximation * dense).sum() / (approximation.norm() * dense.norm())
    ours = natural(approximation, gradient)
    cosine = ours @ truth / (ours.norm() * truth.norm())
    return {"distance": float((1 - overlap.square()).clamp_min(0).sqrt()), "cosine": float(cosine)}


def measure_site(site: Site, run: Callable[[], None]) -> Iterator[dict[str, Any]]:
    """A row per matrix and approximation."""
    import torch

    for side, halves in zip("AB", pair := per_token(site, run), strict=True):
        r = site.rank
        inner, outer = halves[:, :r], halves[:, r:]
        opposite = pair["BA".index(side)][:, :r]
        flat = torch.einsum("ti,tj->tij", inner, outer).flatten(1)
        dense, gradient = flat.T @ flat / len(flat), flat.sum(0)
        truth = natural(dense, gradient)
        for name, approximation in approximations(inner, outer, opposite).items():
            numbers = compare(approximation, dense, gradient, truth)
            yield {"site": site.name, "side": side, "tokens": len(flat), "fisher": name, **numbers}


def step_seconds(model: Any, batch: Any, fisher: str, steps: int = 6) -> float:
    """Median processor seconds of one GritOptimizer step ("inverse", refreshed at every step), whatever else runs."""
    import statistics

    import torch

    from grit_optim import GritOptimizer

    from .objective import answer_loss

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = GritOptimizer(torch.optim.SGD(trained, lr=0.0), model, precondition="inverse", fisher=fisher)
    seconds = []
    for _ in range(steps):
        answer_loss(model, batch).backward()
        begun = time.process_time()
        optimizer.step()
        seconds.append(time.process_time() - begun)
        optimizer.zero_grad()
    optimizer.close()
    return statistics.median(seconds[2:])


def measure(config: RunConfig, examples: int) -> dict[str, Any]:
    """Train an adapter, then compare on one large batch; returns rows and times."""
    import torch

    from grit_optim import GritOptimizer
    from grit_optim.sites import find_sites

    from .base_model import load_tokenizer
    from .objective import answer_loss, collate
    from .tasks import load_task
    from .train import Run

    run = Run(config, load_task(config.task, load_tokenizer()))
    for _ in range(config.steps):
        run.train_step()
    kinds = ("kfac", "block_diagonal", "diagonal", "ekfac")
    assert isinstance(run.optimizer, GritOptimizer)
    run.optimizer.close()
    small = collate(list(run.task.heldout[: config.batch_size]))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # waiting threads would count as work
    seconds = {kind: step_seconds(run.model, small, kind) for kind in kinds}
    torch.set_num_threads(threads)
    model, batch = run.model.double(), collate(list(run.task.train[-examples:]))
    found = find_sites(model, model.parameters())[0]
    chosen = [site for site in found if any(part in site.name for part in SITES)]
    rows = [
        row for site in chosen for row in measure_site(site, lambda: answer_loss(model, batch).backward())
    ]
    return {"rows": rows, "step_seconds": seconds}


def read(path: Path) -> dict[str, Any]:
    """A result of `main`."""
    return packing.read(path)


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: means over sites."""
    import statistics

    lines = [
        "| `fisher` | distance, A | distance, B | cosine, A | cosine, B | state, floats per pair | optimizer step, ms |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, label in LABELS.items():
        cells = [
            f"{statistics.fmean(r[what] for r in result['rows'] if (r['fisher'], r['side']) == (name, side)):.3f}"
            for what in ("distance", "cosine")
            for side in "AB"
        ]
        seconds = result["step_seconds"].get(name)
        cells += [STATE[name], "–" if seconds is None else f"{1e3 * seconds:.1f}"]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write `fisher.json` and `fisher.md`."""
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10, help="training steps before the comparison")
    parser.add_argument("--examples", type=int, default=32, help="examples of the comparison's batch")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    config = RunConfig(
        "naming", "grit", 1e-2, 0, steps=given.steps, rank=given.rank, alpha=given.rank, batch_size=16
    )
    result = {
        "rank": given.rank,
        "training_steps": given.steps,
        "examples": given.examples,
        "damping": DAMPING,
        **measure(config, given.examples),
        "versions": environment.versions(),
        "code": environment.commit(),
        "hardware": environment.hardware("cpu"),
    }
    write_json(given.out / "fisher.json", result)
    write_text(given.out / "fisher.md", table(result))
    print(table(result))


if __name__ == "__main__":
    main()
