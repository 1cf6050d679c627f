"""convert, explain, report: each stage in turn."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from revify._analysis.links import find_links
from revify._analysis.model import Analyser, Block
from revify._analysis.observe import check_fit, observe, random_numbers_kept
from revify._analysis.plan import ChainPlan, Form, Plan, little_saved, make_plan
from revify._analysis.report import ChainReport, Report, UnitReport
from revify._arguments import arguments, rebound
from revify._conversion.apply import apply
from revify._conversion.blocks import MODEL, Converted
from revify._conversion.memory import with_choices, with_memory
from revify._conversion.trial import as_observed, refusal, trial
from revify._engine.budget import check_memory_budget
from revify._engine.chain import check_exact, check_grid, check_slices, settings_of
from revify._errors import NotConvertibleError, RevifyError
from revify._paths import joined
from revify._refusals import Refusal, reason
from revify._schemes import Scheme, scheme_of


def convert(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    coupling: str | Scheme = "revnet",
    entry: str = "duplicate",
    exit: str = "mean",
    tie_shortcuts: bool = True,
    exact: bool = True,
    memory_budget: float | None = None,
    slices: int = 1,
    strict: bool = False,
) -> nn.Module:
    """Makes a reversible network of a residual one; ``model`` is left as it was.

    The new model has copies of the same parameters under the same names, and computes a *different function* of
    them: each chain of residual additions runs in two streams (Gomez et al. 2017). Its training step keeps
    activations that do not grow with the number of units. It is an instance of the model's class, with the same
    modules; only the blocks' own forward is another.

    Args:
        model: a residual network.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs, of which shapes and dtypes
            matter. With them the calls of the blocks are seen, and tried, without values: needed where a block's
            forward asks for shapes, and worth giving where the model's own code cannot be traced.
        coupling: the scheme: ``"revnet"``, or one of `RevNet`, `Midpoint`, `Momentum`, `Dr2`, `BDIA`, `Recurrence`.
            All but RevNet go on from one value to the next, so that whole blocks may stand between two of them
            (post-norm, an activation after the addition), and evaluate a block that changes the shape as it is; `BDIA`,
            and `Dr2` at its start, keep the function of a pretrained network.
        entry: how the two streams begin: ``"duplicate"`` (both are the chain's input) or ``"widen"`` (the layer that
            makes the input gets twice the output channels, and its output is split in halves by channel).
        exit: how they end: ``"mean"`` ((x1 + x2) / 2) or ``"concat"`` (by channel; the layers that read the result
            are widened). New weights are drawn from the global random generator.
        tie_shortcuts: whether both streams share the projections of a transition; otherwise the second stream has
            a copy of its own, under ``stream2``.
        exact: whether the state runs on a grid, so that the backward pass reconstructs it bit for bit and checks
            that it did; see `ReversibleChain`.
        memory_budget: what the chains may keep of their activations, as a fraction (0 to 1) of what plain autograd
            keeps or in bytes, together; None keeps the least. The first training step of each input shape measures what
            there is to keep; from the second on it is spent where it saves most time, and `report` says how.
        slices: in how many parts the batch goes through each branch that treats the samples apart; see
            `ReversibleChain`. Less memory at the peak; 1 is the batch as it is.
        strict: refuse the whole model where any unit is refused.

    Returns:
        An instance of a class made of the model's own, on the same device.

    Raises:
        NotConvertibleError: no unit can be converted, or, with ``strict``, not every one; lists each reason.
        RevifyError: an argument is not as it must be.
    """
    scheme = _check_options(coupling, entry, exit, tie_shortcuts, exact, memory_budget, slices, strict)
    analysis = _analyse(model, example_inputs, Form(scheme, entry, exit, tie_shortcuts))
    report = analysis.report
    if not report.chains:
        raise NotConvertibleError(
            _listing(f"{report.model} has nothing that can be converted", report.refusals), refusals=report.refusals
        )
    if strict and report.refusals:
        raise NotConvertibleError(
            _listing(f"{report.model} cannot be converted completely", report.refusals), refusals=report.refusals
        )
    return apply(analysis.plan, analysis.root, report, exact, memory_budget, slices)


def explain(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    coupling: str | Scheme = "revnet",
    entry: str = "duplicate",
    exit: str = "mean",
    tie_shortcuts: bool = True,
    exact: bool = True,
    memory_budget: float | None = None,
    slices: int = 1,
    strict: bool = False,
) -> Report:
    """What `convert` with the same arguments would do, as a `Report`; ``model`` is left as it was. A model that cannot
    be converted is no error here: its report has no chains. With ``example_inputs`` the report also says what a
    training step keeps, found out without values, which takes about as long again.

    Args:
        model: any module.
        example_inputs: as for `convert`.
        coupling: as for `convert`, as the others are too.
        entry: how the two streams begin.
        exit: how they end.
        tie_shortcuts: whether both streams share the projections of a transition.
        exact: whether the state runs on a grid.
        memory_budget: what the chains may keep.
        slices: in how many parts the batch goes through a branch.
        strict: changes nothing here; `convert` would refuse the model where ``refusals`` are listed.

    Returns:
        The report.

    Raises:
        RevifyError: an argument is not as it must be.
    """
    scheme = _check_options(coupling, entry, exit, tie_shortcuts, exact, memory_budget, slices, strict)
    analysis = _analyse(model, example_inputs, Form(scheme, entry, exit, tie_shortcuts))
    if example_inputs is None or not analysis.report.chains:
        return analysis.report
    return with_memory(
        analysis.report,
        lambda: apply(analysis.plan, analysis.root, analysis.report, exact, memory_budget, slices),
        example_inputs,
    )


def report(model: nn.Module, example_inputs: Any = None) -> Report:
    """The `Report` of a converted model.

    Args:
        model: what `convert` returned.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs, of which shapes and dtypes
            matter: the report also says what a training step on them keeps, found out without values. Without them it
            says what is known of the chains since a step was made with a memory budget.

    Returns:
        The report of its conversion.

    Raises:
        RevifyError: the model was not made by `convert`, or the inputs do not fit it.
    """
    held = model.__dict__.get(MODEL) if isinstance(model, nn.Module) else None
    if not isinstance(held, Converted):
        raise RevifyError(
            f"model must be a model that convert returned, got {type(model).__name__}. "
            "For a model that is not converted, use explain."
        )
    made: Report = held.report
    if example_inputs is None:
        return with_choices(made, held.settings)
    check_fit(model, *arguments(example_inputs))
    return with_memory(made, lambda: model, example_inputs)


@dataclass(frozen=True)
class _Analysis:
    root: nn.Module  # a copy of the user's model
    plan: Plan
    report: Report


def _analyse(model: nn.Module, example_inputs: Any, form: Form) -> _Analysis:
    if not isinstance(model, nn.Module):
        raise RevifyError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    check_plain(model)
    with random_numbers_kept():
        return _analysed(_copy(model), example_inputs, form)


def _analysed(root: nn.Module, example_inputs: Any, form: Form) -> _Analysis:
    calls = {} if example_inputs is None else observe(root, example_inputs)
    found = Analyser(calls, form.whole_blocks).blocks(root)
    failed: list[Refusal] = []
    while True:
        plan = make_plan(root, found, find_links(root, found), form)
        if example_inputs is None or not plan.chains or form.entry != "duplicate" or form.exit != "mean":
            break
        outcome = trial(plan, root, example_inputs)
        if outcome.failed is None:
            plan = plan if outcome.runs is None else as_observed(plan, outcome)
            break
        failed.append(refusal(outcome))
        if not found.drop(outcome.failed.unit):
            break
    refusals = (*found.refusals, *failed, *plan.refusals)
    name = type(root).__name__
    if not plan.chains and not refusals:
        refusals = (Refusal(name, "no-additions", reason("no-additions")),)
    chains = tuple(_chain_report(chain, form, found.swallowed) for chain in plan.chains)
    return _Analysis(
        root,
        plan,
        Report(name, chains, refusals, (*_notes(plan, root), *little_saved(root, plan.chains), *found.notes)),
    )


def _copy(model: nn.Module) -> nn.Module:
    """A copy of the model, also of tensors that it holds and that were computed."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        made = copy.deepcopy(model, memo)
    except Exception as error:
        held = _uncopied(model)
        raise RevifyError(
            f"model cannot be copied: {held or type(model).__name__} ({type(error).__name__}: {error}). Set it after "
            "the conversion, or give its class a __deepcopy__; a model that is wrapped for distributed training is "
            "converted first, and wrapped then."
        ) from error
    for module in made.modules():
        for name, value in vars(module).items():
            if inspect.isfunction(value) and value.__closure__:
                vars(module)[name] = rebound(value, lambda x: memo.get(id(x), x))
    return made


def _uncopied(model: nn.Module) -> str | None:
    """The first attribute that cannot be copied."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in ("_modules", "_parameters", "_buffers"):
                try:
                    copy.deepcopy(value, {id(m): m for m in model.modules()})
                except Exception:
                    return f"{joined(path, name)}, a {type(value).__name__}"
    return None


def check_plain(model: nn.Module) -> None:
    name = type(model).__name__
    if model.__dict__.get(MODEL) is not None or settings_of(model):
        held = "is converted already" if model.__dict__.get(MODEL) is not None else "holds a ReversibleChain already"
        raise RevifyError(f"model {held} ({name}): pass the model it was made from.")
    if hasattr(model, "_orig_mod"):
        raise RevifyError(
            "model is compiled: convert the model that was given to torch.compile, and compile the result."
        )
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise RevifyError(f"model is wrapped in {name}: convert model.module, and wrap the result.")
    if isinstance(model, torch.jit.ScriptModule):
        raise RevifyError(
            "model is a TorchScript module, which has no Python code to convert: convert it before scripting."
        )
    if any(type(p).__name__ == "DTensor" for p in model.parameters()):
        raise RevifyError("model is sharded: convert it first, and shard the result.")
    if "forward" in vars(model):
        raise RevifyError(
            "model has a forward of its own set on the instance (by accelerate's prepare or a patch, for instance), "
            "which would go past the converted one: convert the model first, and prepare it then."
        )


def _chain_report(plan: ChainPlan, form: Form, swallowed: Mapping[str, Sequence[str]]) -> ChainReport:
    units = ((segment.block, unit) for segment in plan.chain.segments for unit in segment.units)
    return ChainReport(
        plan.name,
        tuple(UnitReport(b.name(u), u.kind, b.where(u), tuple(swallowed[b.full_name(u)])) for b, u in units),
        "duplicate" if plan.entry is None else "widen",
        "concat" if plan.exit is not None else "last" if form.scheme.of_last else "mean",
    )


def _notes(plan: Plan, root: nn.Module) -> list[str]:
    notes = []
    scheme = plan.form.scheme
    if plan.chains:
        notes.append(scheme.note)
    if plan.chains and not scheme.keeps_function and any(map(_has_running_statistics, root.modules())):
        notes.append(
            "Running statistics of batch norms, where they come from training, belong to the original function: "
            "revify.recalibrate(model, batches) takes them again."
        )
    blocks = {s.block.path: s.block for c in plan.chains for s in c.chain.segments}.values()
    if any(_moves_activation(block) for block in blocks):
        notes.append(
            "The activation after each addition is moved: the streams carry the sum before it, and it is applied "
            "at the head of every branch and projection, and once at the chain's exit."
        )
    if any(unit.heads for block in blocks for unit in block.units):
        notes.append("A norm that a branch and its projection share is called for each.")
    if plan.stem is not None:
        notes.append("What lies ahead of the first chain keeps its input alone, and is evaluated again in backward.")
    return notes


def _has_running_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats


def _moves_activation(block: Block) -> bool:
    ops = block.analysed[0].ops
    return any(ops.is_activation(user) for unit in block.units for user in ops.data_users(unit.total))


def _listing(head: str, refusals: tuple[Refusal, ...]) -> str:
    return "\n".join([head + ":", *(f"  - {refusal}" for refusal in refusals)])


def _check_options(
    coupling: str | Scheme,
    entry: str,
    exit: str,
    tie_shortcuts: bool,
    exact: bool,
    memory_budget: float | None,
    slices: int,
    strict: bool,
) -> Scheme:
    scheme = scheme_of(coupling)
    check_exact(exact)
    check_grid(scheme, exact)
    check_memory_budget(memory_budget)
    check_slices(slices)
    if entry not in ("duplicate", "widen"):
        raise RevifyError(f"entry must be 'duplicate' or 'widen', got {entry!r}.")
    if exit not in ("mean", "concat"):
        raise RevifyError(f"exit must be 'mean' or 'concat', got {exit!r}.")
    for name, value in (("tie_shortcuts", tie_shortcuts), ("strict", strict)):
        if not isinstance(value, bool):
            raise RevifyError(f"{name} must be True or False, got {value!r}.")
    chosen = {"entry": entry != "duplicate", "exit": exit != "mean", "tie_shortcuts": not tie_shortcuts}
    for name, is_chosen in chosen.items():
        if scheme.of_last and is_chosen:
            raise RevifyError(
                f"{name} is for the two streams of coupling='revnet'; {type(scheme).__name__} goes on from one value "
                "to the next: leave it out."
            )
    return scheme
